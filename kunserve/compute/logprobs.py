"""Request flow, beside the sampler: how likely a token was, and which ones were the most likely."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from kunserve.sampling import TokenLogprobs


def logprobs_of(logits: Tensor, token_id: int, num_logprobs: int | None) -> TokenLogprobs | None:
    """Return log probabilities by raw logits (V,), in float64: the chosen token and the largest, ties by id."""
    if num_logprobs is None:
        return None
    logprobs = logits.double().log_softmax(-1)
    top: list[tuple[int, float]] = []
    if num_logprobs > 0:
        least = logprobs.topk(min(num_logprobs, logprobs.shape[0])).values[-1]
        ids = (logprobs >= least).nonzero()[:, 0]
        found = zip(ids.tolist(), logprobs[ids].tolist(), strict=True)
        top = sorted(found, key=lambda entry: (-entry[1], entry[0]))[:num_logprobs]
    return TokenLogprobs(token_id, float(logprobs[token_id]), tuple(top))


def scored(logits: Tensor, token_id: int, num_logprobs: int | None) -> TokenLogprobs | None:
    """Return `logprobs_of` a token that was given, and its rank."""
    if (found := logprobs_of(logits, token_id, num_logprobs)) is None:
        return None
    return replace(found, rank=int((logits > logits[token_id]).sum()) + 1)
