"""The arrays that the stages of a chain read for one microbatch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from kunserve.compute.ops import AttentionBatch
from kunserve.compute.sampler import SamplingRow, reads_output
from kunserve.engine.batch import Microbatch, Span, scored_positions
from kunserve.engine.request import Constraint, Request
from kunserve.sampling import TokenMask


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What all stages of a microbatch share; made on the event loop when it is scheduled."""

    token_ids: Tensor  # (T,) int32; -1 - i is the i-th token that `ahead_of` has sampled
    positions: Tensor  # (T,) int32
    cu_seqlens_q: Tensor  # (B + 1,) int32
    context_lens: Tensor  # (B,) int32
    block_tables: tuple[Tensor, ...]  # per stage: (B, W) int32
    sampled_rows: Tensor  # (R,) int64: rows of T whose logits are needed
    sampling: tuple[SamplingRow, ...]  # one per sampled row
    block_size: int
    sampled: Future[Any] = field(default_factory=Future)  # what the last stage sampled, in its executor's terms
    ahead_of: Future[Any] | None = None  # `sampled` of the microbatch that placeholders refer to

    def attention(self, stage: int) -> AttentionBatch:
        """The view of one stage."""
        return AttentionBatch(
            self.positions, self.cu_seqlens_q, self.context_lens, self.block_tables[stage], self.block_size
        )

    def fed(self) -> Any:
        """What the microbatch before has sampled; blocks until then. None if it failed, and all its requests."""
        assert self.ahead_of is not None
        try:
            return self.ahead_of.result()
        except CancelledError:
            return None


def fill_token_ids(token_ids: Tensor, sampled: Sequence[int] | None) -> Tensor:
    """Put sampled tokens where their placeholders are: (T,) int32, a new one. Without any, what comes out is unused."""
    ids = token_ids.numpy().copy()
    places = np.flatnonzero(ids < 0)
    ids[places] = 0 if sampled is None else np.array(sampled)[-1 - ids[places]]
    return torch.from_numpy(ids)


def fill_sampling(rows: Sequence[SamplingRow], sampled: Sequence[int] | None) -> list[SamplingRow]:
    """As `fill_token_ids`, in the rows whose next token depends on it."""
    return [
        replace(
            row, output_token_ids=(*row.output_token_ids[:-1], sampled[-1 - row.output_token_ids[-1]] if sampled else 0)
        )
        if row.output_token_ids and row.output_token_ids[-1] < 0 and reads_output(row.params)
        else row
        for row in rows
    ]


def _places(batch: Microbatch) -> dict[Request, int]:
    """Which of the tokens that a microbatch samples is each request's."""
    places, num_sampled = {}, 0
    for span in batch.spans:
        num_sampled += len(scored_positions(span)) + span.samples
        if span.samples:
            places[span.request] = num_sampled - 1
    return places


def _token_ids(span: Span, places: Mapping[Request, int]) -> list[int]:
    known = span.request.token_ids[span.start : span.end]
    return [*known, -1 - places[span.request]] if span.is_ahead else known


def _sampled(
    batch: Microbatch, places: Mapping[Request, int], eos_token_ids: tuple[int, ...]
) -> Iterator[tuple[int, SamplingRow]]:
    """Rows whose logits are needed, span by span: the prompt's tokens to score, then the next to choose."""
    first_row = 0
    for span in batch.spans:
        r = span.request
        for position in scored_positions(span):
            given = r.prompt_token_ids[position + 1]
            yield first_row + position - span.start, SamplingRow(r.params, 0, (), (), (), given=given)
        first_row += span.end - span.start
        if span.samples:
            output = tuple(r.output_token_ids)
            if span.is_ahead:
                output = (*output, -1 - places[r])
            mask = None if r.constraint is None else _mask(r.constraint, len(output))
            yield first_row - 1, SamplingRow(r.params, r.seed, r.prompt_token_ids, output, eos_token_ids, mask)


def _mask(constraint: Constraint, num_accepted: int) -> TokenMask:
    """Return a grammar's mask. What goes wrong comes out when its row is sampled: here it would end the engine."""
    try:
        return constraint.mask(num_accepted)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        fault = error

    def mask() -> NoReturn:
        raise fault

    return mask


def _padded(tables: Sequence[list[int]], width: int) -> Tensor:
    out = np.zeros((len(tables), width), np.int32)
    for row, table in zip(out, tables, strict=True):
        row[: min(len(table), width)] = table[:width]
    return torch.from_numpy(out)


def step_inputs(
    batch: Microbatch, block_size: int, eos_token_ids: tuple[int, ...], oldest: Microbatch | None = None
) -> StepInputs:
    """Snapshot the arrays of a microbatch from its requests; `oldest` of those in flight may yet sample some tokens."""
    spans = batch.spans
    is_ahead = any(span.is_ahead for span in spans)
    places = _places(oldest) if is_ahead and oldest is not None else {}
    lens = np.array([span.end - span.start for span in spans], np.int32)
    starts = np.array([span.start for span in spans], np.int32)
    cu_seqlens = np.zeros(len(spans) + 1, np.int32)
    np.cumsum(lens, out=cu_seqlens[1:])
    token_ids = np.concatenate([np.array(_token_ids(span, places), np.int32) for span in spans])
    positions = np.arange(cu_seqlens[-1], dtype=np.int32) + np.repeat(starts - cu_seqlens[:-1], lens)
    width = -(-int((starts + lens).max()) // block_size)
    tables = zip(*(span.request.block_tables for span in spans), strict=True)  # by stage
    sampled = list(_sampled(batch, places, eos_token_ids))
    return StepInputs(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        cu_seqlens_q=torch.from_numpy(cu_seqlens),
        context_lens=torch.from_numpy(starts + lens),
        block_tables=tuple(_padded(of_stage, width) for of_stage in tables),
        sampled_rows=torch.tensor([row for row, _ in sampled], dtype=torch.int64),
        sampling=tuple(row for _, row in sampled),
        block_size=block_size,
        sampled=batch.sampled,
        ahead_of=oldest.sampled if is_ahead and oldest is not None else None,
    )
