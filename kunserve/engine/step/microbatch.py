"""The arrays that the stages of a chain read for one microbatch."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from kunserve.compute.ops import AttentionBatch
from kunserve.compute.sampler import SamplingRow, reads_output
from kunserve.engine.batch import Microbatch, Span, scored_positions
from kunserve.engine.blocks.block_table import BlockTable
from kunserve.engine.request import Constraint, Request
from kunserve.sampling import TokenMask
from kunserve.sizes import ceil_div


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What all stages of a microbatch share; made on the event loop when it is scheduled."""

    token_ids: Tensor  # (T,) int32; -1 - i is the i-th token that `depends_on` has sampled
    positions: Tensor  # (T,) int32
    cu_seqlens_q: Tensor  # (B + 1,) int32
    context_lens: Tensor  # (B,) int32
    block_tables: tuple[Tensor, ...]  # per stage: (B, W) int32
    sampled_rows: Tensor  # (R,) int64: rows of T whose logits are needed
    sampling: tuple[SamplingRow, ...]  # one per sampled row
    block_size: int
    near_tables: tuple[Tensor, ...] = ()  # as `block_tables`, of near blocks, where KV is of two kinds
    sampled: Future[Any] = field(default_factory=Future)  # what the last stage sampled, in its executor's terms
    depends_on: Future[Any] | None = None  # `sampled` of the microbatch that placeholders refer to

    def attention(self, stage: int) -> AttentionBatch:
        """Return the view of one stage."""
        arrays = self.positions, self.cu_seqlens_q, self.context_lens
        near = AttentionBatch(*arrays, self.near_tables[stage], self.block_size) if self.near_tables else None
        return AttentionBatch(*arrays, self.block_tables[stage], self.block_size, near=near)

    def previous_tokens(self) -> Any:
        """Wait for the previous microbatch's tokens; None if it failed (then its requests have failed, too)."""
        assert self.depends_on is not None
        try:
            return self.depends_on.result()
        except CancelledError:
            return None


def fill_token_ids(token_ids: Tensor, sampled: Sequence[int] | None) -> Tensor:
    """Put sampled tokens where their placeholders are: (T,) int32, a new one. Without any, what comes out is unused."""
    ids = token_ids.numpy().copy()
    placeholders = np.flatnonzero(ids < 0)
    ids[placeholders] = 0 if sampled is None else np.array(sampled)[-1 - ids[placeholders]]
    return torch.from_numpy(ids)


def fill_sampling(rows: Sequence[SamplingRow], sampled: Sequence[int] | None) -> list[SamplingRow]:
    """Put sampled tokens, as `fill_token_ids` does, in the rows whose next token depends on them."""
    return [
        row._replace(
            output_token_ids=(*row.output_token_ids[:-1], sampled[-1 - row.output_token_ids[-1]] if sampled else 0)
        )
        if row.output_token_ids and row.output_token_ids[-1] < 0 and reads_output(row.params)
        else row
        for row in rows
    ]


def _sampled_indices(batch: Microbatch) -> dict[Request, int]:
    """Return the index of each request's token among those that a microbatch samples."""
    indices, num_sampled = dict[Request, int](), 0
    for span in batch.spans:
        num_sampled += len(scored_positions(span))
        if span.samples:
            indices[span.request] = num_sampled
            num_sampled += 1
    return indices


def _token_ids(spans: Sequence[Span], indices: Mapping[Request, int]) -> list[int]:
    """Return the tokens of all spans; for one that nobody knows yet its index, as `StepInputs.token_ids` says."""
    token_ids = list[int]()
    for request, start, end, _, is_ahead in spans:
        token_ids += request.token_ids[start:end]
        if is_ahead:
            token_ids.append(-1 - indices[request])
    return token_ids


def _sampled(
    batch: Microbatch, indices: Mapping[Request, int], eos_token_ids: tuple[int, ...]
) -> tuple[list[int], list[SamplingRow]]:
    """Return the rows whose logits are needed, and what decides their tokens.

    Span by span: the prompt's tokens to score, then the next to choose.
    """
    numbers, rows, num_tokens = list[int](), list[SamplingRow](), 0
    for span in batch.spans:
        r, params = span.request, span.request.params
        for position in scored_positions(span):
            numbers.append(num_tokens + position - span.start)
            rows.append(SamplingRow(params, 0, (), (), (), given=r.prompt_token_ids[position + 1]))
        num_tokens += span.end - span.start
        if span.samples:
            output: Sequence[int] = range(
                len(r.token_ids) - len(r.prompt_token_ids) + span.is_ahead
            )  # a copy would be longer in each step
            if reads_output(params):
                output = (*r.output_token_ids, -1 - indices[r]) if span.is_ahead else r.output_token_ids
            mask = None if r.constraint is None else _mask(r.constraint, len(output))
            numbers.append(num_tokens - 1)
            rows.append(SamplingRow(params, r.seed, r.prompt_token_ids, output, eos_token_ids, mask))
    return numbers, rows


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


def _padded(tables: Sequence[array[int]], width: int) -> Tensor:
    """Return the first ids of tables as rows, zeros behind those of a shorter one: (B, width) int32."""
    tables = [table if len(table) <= width else table[:width] for table in tables]
    out = np.zeros((len(tables), width), np.int32)
    lens = np.array([len(table) for table in tables])
    out[np.arange(width) < lens[:, None]] = np.frombuffer(b"".join(tables), np.int32)
    return torch.from_numpy(out)


def _by_stage(tables: Sequence[BlockTable], width: int) -> tuple[Tensor, ...]:
    """Return the first ids of tables on each stage: (B, width) int32."""
    return tuple(_padded(of_stage, width) for of_stage in zip(*[table.ids.values() for table in tables], strict=True))


def step_inputs(
    batch: Microbatch, block_size: int, eos_token_ids: tuple[int, ...], oldest: Microbatch | None = None
) -> StepInputs:
    """Snapshot the arrays of a microbatch; of those in flight, `oldest` may yet sample some of its tokens."""
    spans = batch.spans
    is_ahead = any(span.is_ahead for span in spans)
    indices = _sampled_indices(oldest) if is_ahead and oldest is not None else {}
    starts = np.array([span.start for span in spans], np.int32)
    ends = np.array([span.end for span in spans], np.int32)
    lens = ends - starts
    cu_seqlens = np.zeros(len(spans) + 1, np.int32)
    np.cumsum(lens, out=cu_seqlens[1:])
    positions = np.arange(cu_seqlens[-1], dtype=np.int32) + np.repeat(starts - cu_seqlens[:-1], lens)
    width = ceil_div(int(ends.max()), block_size)
    tables = [span.request.table for span in spans]
    near_tables = [table.near for table in tables if table.near is not None]
    sampled_rows, sampling = _sampled(batch, indices, eos_token_ids)
    return StepInputs(
        token_ids=torch.from_numpy(np.array(_token_ids(spans, indices), np.int32)),
        positions=torch.from_numpy(positions),
        cu_seqlens_q=torch.from_numpy(cu_seqlens),
        context_lens=torch.from_numpy(ends),
        block_tables=_by_stage(tables, width),
        sampled_rows=torch.from_numpy(np.array(sampled_rows, np.int64)),
        sampling=tuple(sampling),
        block_size=block_size,
        near_tables=_by_stage(near_tables, width),
        sampled=batch.sampled,
        depends_on=oldest.sampled if is_ahead and oldest is not None else None,
    )
