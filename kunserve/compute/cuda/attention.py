"""Planned attention on a CUDA device: a microbatch's arrays are sent, and all layers of a stage share what is planned.

Layers whose KV is of one kind share where it is; what plans for them is in `flash_infer.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kunserve.compute.cuda.arrays import Ints, StepArrays, StepBuffers
from kunserve.compute.ops import AttentionBatch, Scores
from kunserve.compute.torch_ops import TorchOps

# q (T, num_heads, head_dim), kv of a layer, its scores and sinks -> (T, num_heads, head_dim)
Attend = Callable[[Tensor, Tensor, Scores, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class PlannedBatch(AttentionBatch):
    """A batch on the device, ready for every layer of a stage whose KV is of one kind."""

    slots: Tensor  # (R,) int32
    attend: Attend


class PagedAttention(Protocol):
    """Attention over blocks."""

    is_capturable: bool  # whether a CUDA graph can hold it

    def plan(self, arrays: StepArrays, bucket: int | None) -> tuple[Attend, ...]:
        """Plan one step, for layers of each kind of KV; its arrays are staged, and on their way to the device.

        With a `bucket`, a graph can capture the results, and stays valid after later plans.
        """


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A planned batch, and what else of the step is on the device then."""

    batch: PlannedBatch
    sampled_rows: Tensor  # (R,) int32
    token_ids: Tensor  # (T,) int32; as far as they were given


class StepUploader:
    """Sends the arrays of a step to its device, and plans attention for them."""

    def __init__(self, buffers: StepBuffers, attention: PagedAttention) -> None:
        self._buffers, self._attention = buffers, attention

    @property
    def num_kinds(self) -> int:
        """Return how many kinds of KV a step has."""
        return len(self._buffers.kv)

    def upload(self, arrays: StepArrays, bucket: int | None, sampled_rows: Ints, token_ids: Ints) -> PlannedStep:
        """Send a step's arrays in one copy and plan attention; with a `bucket`, they are padded to it."""
        buffers = self._buffers
        buffers.wait_writable()
        kv = [staged.put(of_kind) for staged, of_kind in zip(buffers.kv, arrays.kv, strict=True)]
        positions, ends = buffers.positions.put(arrays.positions), buffers.cu_seqlens_q.put(arrays.cu_seqlens_q)
        rows, ids = buffers.sampled_rows.put(sampled_rows), buffers.token_ids.put(token_ids)
        buffers.send(len(arrays.kv[0].kv_indices))
        attends = self._attention.plan(arrays, bucket)
        buffers.all_sent()  # a plan sends something, too
        batch: PlannedBatch | None = None
        for (slots, indptr, *_), attend in reversed(list(zip(kv, attends, strict=True))):
            batch = PlannedBatch(
                positions=positions,
                slots=slots,
                cu_seqlens_q=ends,
                context_lens=indptr[1:],  # nobody reads it: attention is planned
                block_tables=indptr,
                block_size=0,
                near=batch,
                attend=attend,
            )
        assert batch is not None
        return PlannedStep(batch, rows, ids)


class ReferenceAttention:
    """TorchOps' attention behind the same interface: any dtype, reads lengths on the host, cannot be captured."""

    is_capturable = False

    def __init__(self, block_size: int, buffers: StepBuffers) -> None:
        self._block_size, self._buffers, self._ops = block_size, buffers, TorchOps()

    def plan(self, arrays: StepArrays, bucket: int | None) -> tuple[Attend, ...]:
        """See `PagedAttention.plan`. Reads the step's arrays when it attends, as captured kernels do."""
        return tuple(self._planned(kind, len(of_kind.last_block_len)) for kind, of_kind in enumerate(arrays.kv))

    def _planned(self, kind: int, seqs: int) -> Attend:
        def attend(q: Tensor, kv: Tensor, scores: Scores, sinks: Tensor | None) -> Tensor:
            batch = self._batch(kind, seqs, q.device)
            return self._ops.attention(q.flatten(1), kv, batch, q.shape[1], scores, sinks).view(q.shape)

        return attend

    def _batch(self, kind: int, seqs: int, device: torch.device) -> AttentionBatch:
        """Return the batch as if each sequence began with the first of its blocks that are named."""
        buffers, staged = self._buffers, self._buffers.kv[kind]
        indptr = staged.kv_indptr.host[: seqs + 1].long()
        counts = indptr.diff()
        contexts = (counts - 1) * self._block_size + staged.last_block_len.host[:seqs]
        tables = torch.zeros(seqs, int(counts.max()), dtype=torch.int32)
        tables[torch.arange(tables.shape[1]) < counts[:, None]] = staged.kv_indices.host[: indptr[-1]]
        ends = buffers.cu_seqlens_q.host[: seqs + 1]
        return AttentionBatch(
            last_positions(ends, contexts).to(device), ends, contexts.int(), tables.to(device), self._block_size
        )


def last_positions(ends: Tensor, contexts: Tensor) -> Tensor:
    """Return where tokens stand (T,) that are the last of sequences with so many tokens (B,); `ends`: (B + 1,)."""
    lens = ends.long().diff()
    within = torch.arange(int(ends[-1])) - ends[:-1].long().repeat_interleave(lens)
    return ((contexts.long() - lens).repeat_interleave(lens) + within).int()
