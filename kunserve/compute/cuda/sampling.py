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

ROW_BYTES = 40  # of one row of a step: its id, and what it is drawn with
NO_TOKEN = -1  # of a row whose largest logit is not finite


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
    on_host: Tensor  # (R,) int64, or NO_TOKEN; valid after the event
    known: tuple[SampledToken, ...] | None = None

    def tokens(self) -> list[SampledToken]:
        """Return the tokens, once the work that made them has finished."""
        if self.known is not None:
            return list(self.known)
        return [not_finite() if i == NO_TOKEN else SampledToken(i) for i in self.on_host.tolist()]


def is_plain(rows: Sequence[SamplingRow]) -> bool:
    """Tell whether `launch_sample` can choose all rows' tokens; else it takes `sample`, which waits for the device."""
    return all(map(_is_plain, rows))


def is_greedy(rows: Sequence[SamplingRow]) -> bool:
    """Tell whether all rows, which are plain, take the most likely token."""
    return not any(row.params.temperature > 0 for row in rows)


def most_likely(logits: Tensor) -> Tensor:
    """Return the most likely token of each row of logits (R, V), or NO_TOKEN: (R,) int64. A graph can hold it."""
    ids = logits.argmax(-1)
    is_finite = logits.gather(-1, ids[:, None])[:, 0].isfinite()
    return torch.where(is_finite, ids, NO_TOKEN)


def pending(chosen: Tensor, on_device: Tensor, buffers: TokenBuffers, host: Tensor | None = None) -> PendingTokens:
    """Send chosen tokens (R,) int64 to the host, into a buffer of `buffers`; the next step begins with `on_device`."""
    host = buffers.take() if host is None else host
    on_host = host.view(torch.int64)[: len(chosen)]
    on_host.copy_(chosen, non_blocking=True)
    tokens = PendingTokens(on_device, on_host)
    buffers.free_after(tokens, host)
    return tokens


def launch_sample(logits: Tensor, rows: Sequence[SamplingRow], buffers: TokenBuffers) -> PendingTokens:
    """Choose one token per row of logits (R, V), as `sample` does, on the current stream. All rows are plain."""
    try:
        return _launch(logits, rows, buffers)
    except Exception:  # a row's fault: `sample`, which waits for the device, finds out whose
        return sampled(sample(logits, rows), logits.device)


def _launch(logits: Tensor, rows: Sequence[SamplingRow], buffers: TokenBuffers) -> PendingTokens:
    drawn_with = None if is_greedy(rows) else _drawn_with(rows)
    chosen, host, num_rows = most_likely(logits), buffers.take(), len(rows)
    if drawn_with is not None:
        staged = host.view(torch.float64)[num_rows : 5 * num_rows].view(4, num_rows)
        staged.numpy()[:] = drawn_with
        is_drawn, *given = staged.to(logits.device, non_blocking=True)
        # What is drawn from NaNs may be beyond the vocabulary.
        chosen = torch.where((is_drawn > 0) & (chosen != NO_TOKEN), _drawn(logits, *given), chosen)
    return pending(chosen, chosen.clamp(min=0), buffers, host)


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
