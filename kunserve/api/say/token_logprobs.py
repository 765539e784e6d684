"""Log-probabilities of tokens as chat and Responses tell them: one object per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import orjson

from kunserve.api.wire.backend import TextTokenizer
from kunserve.api.wire.context import fragment
from kunserve.sampling import TokenLogprobs


def token_logprobs(
    tokenizer: TextTokenizer, token_text: Callable[[int], str], entries: Sequence[TokenLogprobs]
) -> list[orjson.Fragment]:
    """Return one object per token, with as many of the most likely ones as were asked for."""

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": token_text(token_id), "logprob": logprob, "bytes": list(data)}

    return [
        fragment({**token(entry.token_id, entry.logprob), "top_logprobs": [token(*top) for top in entry.top]})
        for entry in entries
    ]
