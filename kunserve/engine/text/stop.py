"""When a request is finished: token by token, without text (stop strings belong to the detokenizer)."""

from __future__ import annotations

from kunserve.engine.request import Request
from kunserve.sampling import FinishReason


def finish_of(request: Request, eos_token_ids: tuple[int, ...]) -> tuple[FinishReason, int | None] | None:
    """Finish and stop reason after the newest token, or None if the request goes on."""
    params, token = request.params, request.token_ids[-1]
    is_stop_token = token in params.stop_token_ids
    ends = is_stop_token or (token in eos_token_ids and not params.ignore_eos)
    if ends and request.num_output_tokens >= params.min_tokens:
        return FinishReason.STOP, token if is_stop_token else None
    if len(request.token_ids) >= request.max_num_tokens:
        return FinishReason.LENGTH, None
    return None
