"""What Hugging Face transformers generates: the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Two float32 implementations of smollm2 differ by about 1e-4 in their logits; a position whose two best are closer
# than this cannot be compared on every CPU.
MIN_MARGIN = 1e-3


class NearTieError(AssertionError):
    """Two tokens are as good as equally likely: which one is greedy is up to rounding."""


@torch.inference_mode()
def greedy_reference(model: Any, prompt: Sequence[int], num_tokens: int, min_margin: float = MIN_MARGIN) -> list[int]:
    """Greedy tokens after a prompt; EOS does not end them. NearTieError unless every token wins by `min_margin`."""
    ids, cache, tokens = torch.tensor([list(prompt)]), None, list[int]()
    for _ in range(num_tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        tokens += _most_likely(out.logits[0, -1:], min_margin)
        cache, ids = out.past_key_values, torch.tensor([tokens[-1:]])
    return tokens


@torch.inference_mode()
def assert_greedy(model: Any, prompt: Sequence[int], tokens: Sequence[int], min_margin: float = MIN_MARGIN) -> None:
    """Assert that these are the greedy tokens after a prompt, in one pass: each is most likely after those before it.

    NearTieError unless every token wins by `min_margin`.
    """
    logits = model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
    assert _most_likely(logits, min_margin) == list(tokens)


def _most_likely(logits: Tensor, min_margin: float) -> list[int]:
    best = logits.topk(2)
    margins = best.values[:, 0] - best.values[:, 1]
    if not margins.min() >= min_margin:  # also if it is not a number
        raise NearTieError(f"the best token wins by {margins.min():.1e} at position {int(margins.argmin())}")
    ids: list[int] = best.indices[:, 0].tolist()
    return ids
