"""Sampling on a CUDA device without waiting for it: launch, and read the tokens when the step's event is reached.

Greedy rows and rows with temperature and min_p alone are chosen by the same functions as everywhere
(kunserve.compute.sampler) from arrays in pinned memory. A batch in which one row asks for more (top_k, top_p, whatever
adjusts or masks logits, logprobs) is sampled there as a whole, which waits for the GPU: on a queue of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kunserve.compute.sampler import (
    SLICE_ELEMENTS,
    SampledToken,
    SamplingRow,
    draw,
    integer_weights,
    is_adjusted,
    not_finite,
    sample,
    uniform,
)


@dataclass(frozen=True, slots=True)
class PendingTokens:
    """Tokens that are being sampled. `on_device` is what the next step can be fed with (R,)."""

    on_device: Tensor  # 0 for a row that has none: no step may look up what is no id
    on_host: Tensor  # (2, R) int64: ids, and whether the row's largest logit is finite; valid after the event
    known: tuple[SampledToken, ...] | None = None

    def tokens(self) -> list[SampledToken]:
        """The tokens, once the work that made them has finished."""
        if self.known is not None:
            return list(self.known)
        ids, is_finite = self.on_host.tolist()
        return [
            SampledToken(token_id) if finite else not_finite() for token_id, finite in zip(ids, is_finite, strict=True)
        ]


def is_plain(rows: Sequence[SamplingRow]) -> bool:
    """Whether `launch_sample` can choose the tokens of all rows; else it takes `sample`, which waits for the device."""
    return all(map(_is_plain, rows))


def launch_sample(logits: Tensor, rows: Sequence[SamplingRow]) -> PendingTokens:
    """Choose one token per row of logits (R, V), as `sample` does, on the current stream. All rows are plain."""
    try:
        return _launch(logits, rows)
    except Exception:  # a row's fault: `sample`, which waits for the device, finds out whose
        return sampled(sample(logits, rows), logits.device)


def _launch(logits: Tensor, rows: Sequence[SamplingRow]) -> PendingTokens:
    device = logits.device
    ids = logits.argmax(-1)
    is_finite = logits.gather(-1, ids[:, None])[:, 0].isfinite()
    if any(row.params.temperature > 0 for row in rows):
        ids = torch.where(
            _to_device([row.params.temperature > 0 for row in rows], device) > 0, _drawn(logits, rows), ids
        )
    ids = torch.where(is_finite, ids, 0)  # what is drawn from NaNs may be beyond the vocabulary
    result = torch.stack([ids, is_finite.long()])
    on_host = torch.empty(result.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
    on_host.copy_(result, non_blocking=True)
    return PendingTokens(ids, on_host)


def sampled(tokens: Sequence[SampledToken], device: torch.device) -> PendingTokens:
    """Tokens that the host knows already, for a step on `device` that is fed with them."""
    ids = torch.tensor([token.token_id for token in tokens], dtype=torch.int64)
    return PendingTokens(ids.to(device, non_blocking=True), ids, tuple(tokens))


def _is_plain(row: SamplingRow) -> bool:
    p = row.params
    is_filtered = p.temperature > 0 and (p.top_k > 0 or p.top_p < 1.0)
    return not (is_filtered or is_adjusted(row) or row.given is not None or p.num_logprobs is not None)


def _drawn(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """A draw for every row (R,); greedy ones are drawn at temperature 1, for nothing, so that no row is picked out."""
    temperature = _to_device([row.params.temperature or 1.0 for row in rows], logits.device)
    min_p = _to_device([row.params.min_p for row in rows], logits.device)
    uniforms = _to_device([uniform(row.seed, len(row.output_token_ids)) for row in rows], logits.device)
    step = max(1, SLICE_ELEMENTS // logits.shape[1])
    parts = [slice(start, start + step) for start in range(0, len(rows), step)]
    return torch.cat([draw(integer_weights(logits[p].double(), temperature[p], min_p[p]), uniforms[p]) for p in parts])


def _to_device(values: Sequence[float], device: torch.device) -> Tensor:
    """(R,) float64, by a copy that nobody waits for."""
    host = torch.tensor(values, dtype=torch.float64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
