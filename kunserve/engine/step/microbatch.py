"""The arrays that the stages of a chain read for one microbatch."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kunserve.compute.ops import AttentionBatch
from kunserve.compute.sampler import SamplingRow, reads_output
from kunserve.engine.batch import Decoding, Microbatch, Span, scored_positions
from kunserve.engine.blocks.block_table import BlockTable
from kunserve.engine.request import Constraint, Request
from kunserve.engine.step.kept_rows import KeptRows
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
    indices = {request: i for i, request in enumerate(batch.decoding.requests)}
    num_sampled = len(indices)
    for span in batch.others:
        num_sampled += len(scored_positions(span))
        if span.samples:
            indices[span.request] = num_sampled
            num_sampled += 1
    return indices


class _Sampling:
    """What decides the next tokens of one microbatch, and where those are that nobody knows yet."""

    def __init__(self, oldest: Microbatch | None, eos_token_ids: tuple[int, ...]) -> None:
        self.oldest, self._eos_token_ids = oldest, eos_token_ids

    @cached_property
    def indices(self) -> Mapping[Request, int]:
        """Return the index of each request's token among those that `oldest` samples."""
        return {} if self.oldest is None else _sampled_indices(self.oldest)

    def newest(self, decoding: Decoding) -> NDArray[np.int32]:
        """Return the newest tokens of those who decode; for one that nobody knows its index, as `StepInputs` says."""
        if not decoding.is_ahead:
            return np.array([request.token_ids[-1] for request in decoding.requests], np.int32)
        if self.oldest is not None and self.oldest.decoding.requests == decoding.requests:  # as nearly always
            return _numbers(len(decoding.requests)).placeholders
        return np.array([-1 - self.indices[request] for request in decoding.requests], np.int32)

    def row(self, request: Request, *, is_ahead: bool) -> SamplingRow:
        """Return what decides the token after all that there are; one more if `is_ahead`."""
        r, params = request, request.params
        # A copy would be longer in each step.
        output: Sequence[int] = range(len(r.token_ids) - len(r.prompt_token_ids) + is_ahead)
        if reads_output(params):
            output = (*r.output_token_ids, -1 - self.indices[r]) if is_ahead else r.output_token_ids
        mask = None if r.constraint is None else _mask(r.constraint, len(output))
        return SamplingRow(params, r.seed, r.prompt_token_ids, output, self._eos_token_ids, mask)


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


def _padded(tables: Sequence[array[int]], width: int) -> NDArray[np.int32]:
    """Return the first ids of tables as rows, zeros behind those of a shorter one: (B, width) int32."""
    tables = [table if len(table) <= width else table[:width] for table in tables]
    out = np.zeros((len(tables), width), np.int32)
    lens = np.array([len(table) for table in tables])
    out[np.arange(width) < lens[:, None]] = np.frombuffer(b"".join(tables), np.int32)
    return out


def _by_stage(tables: Sequence[BlockTable], width: int) -> list[NDArray[np.int32]]:
    """Return the first ids of tables on each stage: (B, width)."""
    return [_padded(of_stage, width) for of_stage in zip(*[table.ids.values() for table in tables], strict=True)]


class _Numbers(NamedTuple):
    """Arrays of so many requests that decode, the same in each step: nobody writes to them."""

    placeholders: NDArray[np.int32]  # -1, -2 ...
    lens: NDArray[np.int32]  # all 1
    rows: NDArray[np.int64]  # 0, 1 ...


@lru_cache
def _numbers(num_reqs: int) -> _Numbers:
    rows = np.arange(num_reqs, dtype=np.int64)
    return _Numbers((-1 - rows).astype(np.int32), np.ones(num_reqs, np.int32), rows)


class _Arrays(NamedTuple):
    """Arrays of some of a microbatch's requests, as in `StepInputs`."""

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    lens: NDArray[np.int32]
    ends: NDArray[np.int32]
    sampled_rows: NDArray[np.int64]
    sampling: Sequence[SamplingRow]
    tables: Sequence[NDArray[np.int32]]


def _decoding(decoding: Decoding, sampling: _Sampling, kept: KeptRows, block_size: int) -> _Arrays:
    """Return the arrays of those who decode: what was kept of the step before, one token later."""
    ends, same = np.array(decoding.ends, np.int32), _numbers(len(decoding.ends))
    kept.follow(decoding, block_size, partial(sampling.row, is_ahead=decoding.is_ahead))
    tables = kept.tables(ceil_div(max(decoding.ends), block_size))
    return _Arrays(sampling.newest(decoding), ends - 1, same.lens, ends, same.rows, kept.sampling, tables)


def _others(spans: Sequence[Span], sampling: _Sampling, block_size: int) -> _Arrays:
    """Return the arrays of spans, made anew."""
    token_ids, numbers, rows = list[int](), list[int](), list[SamplingRow]()
    for span in spans:
        r, num_before = span.request, len(token_ids)
        for position in scored_positions(span):  # first the prompt's tokens to score, then the next to choose
            numbers.append(num_before + position - span.start)
            rows.append(SamplingRow(r.params, 0, (), (), (), given=r.prompt_token_ids[position + 1]))
        token_ids += r.token_ids[span.start : span.end]
        if span.is_ahead:
            token_ids.append(-1 - sampling.indices[r])
        if span.samples:
            numbers.append(len(token_ids) - 1)
            rows.append(sampling.row(r, is_ahead=span.is_ahead))
    starts, ends = (np.array([span[i] for span in spans], np.int32) for i in (1, 2))
    positions = np.concatenate([np.arange(span.start, span.end, dtype=np.int32) for span in spans])
    tables = _by_stage([span.request.table for span in spans], ceil_div(int(ends.max()), block_size))
    numbered = np.array(numbers, np.int64)
    return _Arrays(np.array(token_ids, np.int32), positions, ends - starts, ends, numbered, rows, tables)


def _both(first: _Arrays, second: _Arrays) -> _Arrays:
    """Return the arrays of all, the second behind the first."""
    width = max(first.tables[0].shape[1], second.tables[0].shape[1])
    tables = [
        np.concatenate([np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in of_stage])
        for of_stage in zip(first.tables, second.tables, strict=True)
    ]
    token_ids, positions, lens, ends = (np.concatenate(pair) for pair in zip(first[:4], second[:4], strict=True))
    numbers = np.concatenate([first.sampled_rows, len(first.token_ids) + second.sampled_rows])
    return _Arrays(token_ids, positions, lens, ends, numbers, [*first.sampling, *second.sampling], tables)


def step_inputs(
    batch: Microbatch,
    block_size: int,
    eos_token_ids: tuple[int, ...],
    oldest: Microbatch | None = None,
    kept: KeptRows | None = None,
) -> StepInputs:
    """Take a snapshot of a microbatch as arrays; of those in flight, `oldest` may yet sample some of its tokens.

    `kept`: what was kept of the group's microbatch before, and is for the next one.
    """
    sampling, parts = _Sampling(oldest, eos_token_ids), list[_Arrays]()
    if batch.decoding.requests:
        parts.append(_decoding(batch.decoding, sampling, kept or KeptRows(), block_size))
    if batch.others:
        parts.append(_others(batch.others, sampling, block_size))
    token_ids, positions, lens, ends, sampled_rows, rows, tables = parts[0] if len(parts) == 1 else _both(*parts)
    is_ahead = batch.decoding.is_ahead or any(span.is_ahead for span in batch.others)
    cu_seqlens = np.zeros(len(ends) + 1, np.int32)
    np.cumsum(lens, out=cu_seqlens[1:])
    near_tables = [span.request.table.near for span in batch.others if span.request.table.near is not None]
    near = _by_stage(near_tables, tables[0].shape[1])
    return StepInputs(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        cu_seqlens_q=torch.from_numpy(cu_seqlens),
        context_lens=torch.from_numpy(ends),
        block_tables=tuple(torch.from_numpy(table.copy()) for table in tables),  # what is kept changes
        sampled_rows=torch.from_numpy(sampled_rows),
        sampling=tuple(rows),
        block_size=block_size,
        near_tables=tuple(map(torch.from_numpy, near)),
        sampled=batch.sampled,
        depends_on=oldest.sampled if is_ahead and oldest is not None else None,
    )
