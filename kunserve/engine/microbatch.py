"""A microbatch: which tokens of which requests pass through a chain together, and the arrays a stage reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kunserve.engine.request import Request
from kunserve.engine.sampler import SamplingRow
from kunserve.model.ops import AttentionBatch


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `[start, end)` of one request. `samples`: they reach its last, so the last stage samples the next."""

    request: Request
    start: int
    end: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Spans of distinct requests, scheduled together. Everything a stage needs is a snapshot: requests may change."""

    group_id: int
    epoch: int
    spans: tuple[Span, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens in all spans."""
        return sum(span.end - span.start for span in self.spans)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What all stages of a microbatch share; made on the event loop when it is scheduled."""

    token_ids: Tensor  # (T,) int32
    positions: Tensor  # (T,) int32
    cu_seqlens_q: Tensor  # (B + 1,) int32
    context_lens: Tensor  # (B,) int32
    block_tables: tuple[Tensor, ...]  # per stage: (B, W) int32
    sampled_rows: Tensor  # (R,) int64: rows of T whose logits are needed
    sampling: tuple[SamplingRow, ...]  # one per sampled row
    block_size: int

    def attention(self, stage: int) -> AttentionBatch:
        """The view of one stage."""
        return AttentionBatch(
            self.positions, self.cu_seqlens_q, self.context_lens, self.block_tables[stage], self.block_size
        )


def scored_positions(span: Span) -> range:
    """Positions of a span whose logits say how likely the prompt's next token was; empty unless asked for."""
    request = span.request
    if request.params.num_prompt_logprobs is None:
        return range(0)
    return range(span.start, min(span.end, request.num_prompt_tokens - 1))


def _sampled(batch: Microbatch, eos_token_ids: tuple[int, ...]) -> Iterator[tuple[int, SamplingRow]]:
    """Rows whose logits are needed, span by span: the prompt's tokens to score, then the next to choose."""
    first_row = 0
    for span in batch.spans:
        r = span.request
        for position in scored_positions(span):
            given = r.prompt_token_ids[position + 1]
            yield first_row + position - span.start, SamplingRow(r.params, 0, (), (), (), given=given)
        first_row += span.end - span.start
        if span.samples:
            mask = None if r.constraint is None else r.constraint.mask()
            output = tuple(r.output_token_ids)
            yield first_row - 1, SamplingRow(r.params, r.seed, r.prompt_token_ids, output, eos_token_ids, mask)


def _padded(tables: list[list[int]], width: int) -> Tensor:
    out = np.zeros((len(tables), width), np.int32)
    for row, table in zip(out, tables, strict=True):
        row[: min(len(table), width)] = table[:width]
    return torch.from_numpy(out)


def step_inputs(batch: Microbatch, block_size: int, eos_token_ids: tuple[int, ...]) -> StepInputs:
    """Snapshot the arrays of a microbatch from its requests."""
    spans = batch.spans
    lens = np.array([span.end - span.start for span in spans], np.int32)
    starts = np.array([span.start for span in spans], np.int32)
    cu_seqlens = np.zeros(len(spans) + 1, np.int32)
    np.cumsum(lens, out=cu_seqlens[1:])
    token_ids = np.concatenate([np.array(s.request.token_ids[s.start : s.end], np.int32) for s in spans])
    positions = np.arange(cu_seqlens[-1], dtype=np.int32) + np.repeat(starts - cu_seqlens[:-1], lens)
    width = -(-int((starts + lens).max()) // block_size)
    num_stages = len(spans[0].request.block_tables)
    sampled = list(_sampled(batch, eos_token_ids))
    return StepInputs(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        cu_seqlens_q=torch.from_numpy(cu_seqlens),
        context_lens=torch.from_numpy(starts + lens),
        block_tables=tuple(_padded([s.request.block_tables[i] for s in spans], width) for i in range(num_stages)),
        sampled_rows=torch.tensor([row for row, _ in sampled], dtype=torch.int64),
        sampling=tuple(row for _, row in sampled),
        block_size=block_size,
    )
