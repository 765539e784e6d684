"""What Hugging Face transformers generates: the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Two float32 implementations of smollm2 differ by about 1e-4 in their logits; a position whose two best are closer
# than this cannot be compared on every CPU.
MIN_MARGIN = 1e-3


class NearTieError(AssertionError):
    """Two tokens are as good as equally likely: which one is greedy is up to rounding."""


@torch.inference_mode()
def greedy_reference(
    model: Any, prompts: Sequence[Sequence[int]], num_tokens: int, min_margin: float = MIN_MARGIN
) -> list[list[int]]:
    """Greedy tokens of each prompt, all prompts in one left-padded batch. EOS does not end them.

    NearTieError unless every token wins by `min_margin`.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, tokens = None, []
    for _ in range(num_tokens):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        best = out.logits[:, -1].topk(2).values
        margins = best[:, 0] - best[:, 1]
        if not margins.min() >= min_margin:  # also if it is not a number
            raise NearTieError(f"the best token wins by {margins.min():.1e} in prompt {int(margins.argmin())}")
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        tokens.append(ids[:, 0])
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones(len(ids), 1, dtype=mask.dtype)], dim=-1)
    generated: list[list[int]] = torch.stack(tokens, dim=1).tolist()
    return generated
