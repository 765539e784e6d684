"""Sampling on a CUDA device without waiting for it: launch, and read the tokens when the step's event is reached.

Greedy rows and rows with temperature and min_p alone are chosen by the same functions as everywhere
(kunserve.compute.sampler) from arrays in pinned memory. A batch in which one row asks for more (top_k, top_p, whatever
adjusts or masks logits, logprobs) is sampled there as a whole, which waits for the GPU: on a queue of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import finalize

import numpy as np
import numpy.typing as npt
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
from kunserve.gpu.cuda.driver import Driver

ROW_BYTES = 48  # of one row of a step: its id, whether it has one, and what it is drawn with


class TokenBuffers:
    """Pinned buffers of one device, one for each step under way; handed out again when nobody needs the tokens.

    One from torch for every step would be freed at any time, also while somebody captures a graph: see
    `Driver.capture`. All are used on one stream, so that the next step may write into what the last one has let go of.
    """

    def __init__(self, driver: Driver, max_num_rows: int) -> None:
        self._driver, self._num_bytes = driver, ROW_BYTES * max_num_rows
        self._free: list[Tensor] = []

    def take(self) -> Tensor:
        """Return a buffer of `ROW_BYTES` for each row."""
        return self._free.pop() if self._free else self._driver.pinned(self._num_bytes)

    def free_after(self, holder: object, buffer: Tensor) -> None:
        """Hand `buffer` out again when `holder` is gone."""
        finalize(holder, self._free.append, buffer)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PendingTokens:
    """Tokens that are being sampled. `on_device` is what the next step can begin with (R,)."""

    on_device: Tensor  # 0 for a row that has none: no step may look up what is no id
    on_host: Tensor  # (2, R) int64: ids, and whether the row's largest logit is finite; valid after the event
    known: tuple[SampledToken, ...] | None = None

    def tokens(self) -> list[SampledToken]:
        """Return the tokens, once the work that made them has finished."""
        if self.known is not None:
            return list(self.known)
        ids, is_finite = self.on_host.tolist()
        return [
            SampledToken(token_id) if finite else not_finite() for token_id, finite in zip(ids, is_finite, strict=True)
        ]


def is_plain(rows: Sequence[SamplingRow]) -> bool:
    """Tell whether `launch_sample` can choose all rows' tokens; else it takes `sample`, which waits for the device."""
    return all(map(_is_plain, rows))


def launch_sample(logits: Tensor, rows: Sequence[SamplingRow], buffers: TokenBuffers) -> PendingTokens:
    """Choose one token per row of logits (R, V), as `sample` does, on the current stream. All rows are plain."""
    try:
        return _launch(logits, rows, buffers)
    except Exception:  # a row's fault: `sample`, which waits for the device, finds out whose
        return sampled(sample(logits, rows), logits.device)


def _launch(logits: Tensor, rows: Sequence[SamplingRow], buffers: TokenBuffers) -> PendingTokens:
    drawn_with = _drawn_with(rows) if any(row.params.temperature > 0 for row in rows) else None
    ids = logits.argmax(-1)
    is_finite = logits.gather(-1, ids[:, None])[:, 0].isfinite()
    host, num_rows = buffers.take().view(torch.int64), len(rows)
    if drawn_with is not None:
        staged = host[2 * num_rows : 6 * num_rows].view(torch.float64).view(4, num_rows)
        staged.numpy()[:] = drawn_with
        is_drawn, *given = staged.to(logits.device, non_blocking=True)
        ids = torch.where(is_drawn > 0, _drawn(logits, *given), ids)
    ids = torch.where(is_finite, ids, 0)  # what is drawn from NaNs may be beyond the vocabulary
    on_host = host[: 2 * num_rows].view(2, num_rows)
    on_host.copy_(torch.stack([ids, is_finite.long()]), non_blocking=True)
    pending = PendingTokens(ids, on_host)
    buffers.free_after(pending, host)
    return pending


def sampled(tokens: Sequence[SampledToken], device: torch.device) -> PendingTokens:
    """Wrap tokens that the host knows already, for a step on `device` that begins with them."""
    ids = torch.tensor([token.token_id for token in tokens], dtype=torch.int64)
    return PendingTokens(ids.to(device, non_blocking=True), ids, tuple(tokens))


def _is_plain(row: SamplingRow) -> bool:
    p = row.params
    is_filtered = p.temperature > 0 and (p.top_k > 0 or p.top_p < 1.0)
    return not (is_filtered or is_adjusted(row) or row.given is not None or p.num_logprobs is not None)


def _drawn_with(rows: Sequence[SamplingRow]) -> npt.NDArray[np.float64]:
    """Return (4, R): whether a row is drawn, its temperature, min_p, and where in the distribution.

    Greedy ones are drawn at temperature 1, for nothing, so that no row is picked out.
    """
    each = ((r.params.temperature, r.params.min_p, uniform(r.seed, len(r.output_token_ids))) for r in rows)
    return np.array([(t > 0, t or 1.0, min_p, u) for t, min_p, u in each], np.float64).reshape(-1, 4).T


def _drawn(logits: Tensor, temperature: Tensor, min_p: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token for every row (R,)."""
    step = max(1, SLICE_ELEMENTS // logits.shape[1])
    parts = [slice(start, start + step) for start in range(0, len(logits), step)]
    return torch.cat([draw(integer_weights(logits[p].double(), temperature[p], min_p[p]), uniforms[p]) for p in parts])
