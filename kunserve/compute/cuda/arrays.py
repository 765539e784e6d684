"""The arrays of a step on a CUDA device: made on the host for one stage, and sent to stable addresses in one copy.

What says where KV is there is once for each kind of KV.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kunserve.compute.ops import AttentionBatch
from kunserve.gpu.cuda.driver import Driver, Event
from kunserve.sizes import ceil_div

Ints = npt.NDArray[np.int32]

ALIGNED_INTS = 32  # kernels are compiled for addresses that are multiples of 16 bytes


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest microbatch that buffers are made for."""

    max_num_tokens: int
    max_num_seqs: int
    max_num_blocks: int  # of all sequences of a microbatch together, on one stage
    max_num_near_blocks: int | None = None  # None: KV is of one kind

    def with_near(self, window: int, block_size: int) -> StepLimits:
        """Return the limits where KV of layers with a window is a kind of its own: they read nothing behind it."""
        most = ceil_div(self.max_num_tokens, block_size) + self.max_num_seqs * (ceil_div(window, block_size) + 2)
        return replace(self, max_num_near_blocks=min(most, self.max_num_blocks))

    @property
    def max_blocks_by_kind(self) -> tuple[int, ...]:
        """Return the most blocks of each kind: full, then near if there are two."""
        near = self.max_num_near_blocks
        return (self.max_num_blocks,) if near is None else (self.max_num_blocks, near)


class KvArrays(NamedTuple):
    """Where a microbatch has its KV of one kind: blocks as in a compressed sparse row matrix. R rows of tokens."""

    slots: Ints  # (R,) block * block_size + offset; -1 for rows that are padding
    kv_indptr: Ints  # (B + 1,): blocks of sequence b are kv_indices[kv_indptr[b]:kv_indptr[b + 1]]
    last_block_len: Ints  # (B,) tokens in the last block
    kv_indices: Ints

    def lens(self, block_size: int) -> Ints:
        """Return how many tokens of each sequence are seen (B,)."""
        return (np.diff(self.kv_indptr) - 1) * np.int32(block_size) + self.last_block_len


@dataclass(frozen=True, slots=True)
class StepArrays:
    """One stage's view of a microbatch, on the host."""

    positions: Ints  # (R,)
    cu_seqlens_q: Ints  # (B + 1,)
    kv: tuple[KvArrays, ...]  # full, then near if there are two kinds


def step_arrays(batch: AttentionBatch, num_rows: int | None = None, window: int | None = None) -> StepArrays:
    """Flatten a host batch; if `num_rows` is given, all sequences have one token and are padded to so many.

    A row of padding writes nothing and reads one token of a block that the first sequence reads anyway. `window`: of
    the layers whose KV is a kind of its own; they are not told of blocks that no token of the batch sees.
    """
    positions, ends, contexts = (t.numpy() for t in (batch.positions, batch.cu_seqlens_q, batch.context_lens))
    lens = np.diff(ends)
    sequences, num_padding = np.repeat(np.arange(len(lens)), lens), 0
    if num_rows is not None:
        num_padding, ends = num_rows - len(lens), np.arange(num_rows + 1)
    kv = [_kv_arrays(batch, sequences, np.zeros_like(contexts), num_padding)]
    if batch.near is not None:
        assert window is not None
        num_behind = np.maximum(contexts - lens + 1 - window, 0) // batch.block_size
        kv.append(_kv_arrays(batch.near, sequences, num_behind, num_padding))
    return StepArrays(_ints(_extend(positions, 0, num_padding)), _ints(ends), tuple(kv))


def _kv_arrays(
    batch: AttentionBatch, sequences: npt.NDArray[np.int64], num_behind: npt.NDArray[Any], num_padding: int
) -> KvArrays:
    """Return where KV of one kind is: of each sequence from behind the first `num_behind` (B,) blocks."""
    tables, block_size, contexts = batch.block_tables.numpy(), batch.block_size, batch.context_lens.numpy()
    positions, num_places = batch.positions.numpy(), ceil_div(contexts, batch.block_size)
    slots = tables[sequences, positions // block_size] * block_size + positions % block_size
    places = np.arange(tables.shape[1])
    indices = tables[(places >= num_behind[:, None]) & (places < num_places[:, None])]
    last, num_blocks = contexts - (num_places - 1) * block_size, num_places - num_behind
    if num_padding:
        slots, indices = _extend(slots, -1, num_padding), _extend(indices, int(indices[0]), num_padding)
        last, num_blocks = _extend(last, 1, num_padding), _extend(num_blocks, 1, num_padding)
    indptr = np.concatenate([[0], np.cumsum(num_blocks)])
    return KvArrays(_ints(slots), _ints(indptr), _ints(last), _ints(indices))


def padding_arrays(bucket: int, num_kinds: int = 1) -> StepArrays:
    """Return the arrays of a decode step without sequences: all rows are padding, which reads a token of block 0."""
    zeros, ones, count = np.zeros(bucket, np.int32), np.ones(bucket, np.int32), np.arange(bucket + 1, dtype=np.int32)
    return StepArrays(zeros, count, (KvArrays(zeros - 1, count, ones, zeros),) * num_kinds)


def _ints(values: npt.NDArray[Any]) -> Ints:
    return np.ascontiguousarray(values, np.int32)


def _extend(values: npt.NDArray[Any], value: int, count: int) -> npt.NDArray[Any]:
    return np.concatenate([values, np.full(count, value, values.dtype)]) if count else values


@dataclass(frozen=True, slots=True)
class Staged:
    """Integers that change every step, at one address in pinned memory and one on the device."""

    host: Tensor
    device: Tensor

    def put(self, values: Ints) -> Tensor:
        """Write (N,) on the host; returns where the first N are on the device once they have been sent."""
        self.host[: len(values)].numpy()[:] = values
        return self.device[: len(values)]


class KvBuffers(NamedTuple):
    """Staged arrays of one kind of KV: `KvArrays` of every step."""

    slots: Staged
    kv_indptr: Staged
    last_block_len: Staged
    kv_indices: Staged

    def put(self, arrays: KvArrays) -> tuple[Tensor, ...]:
        """Write all; returns where they are on the device once they have been sent."""
        return tuple(staged.put(values) for staged, values in zip(self, arrays, strict=True))


class StepBuffers:
    """All staged arrays of one device, side by side, so that one copy sends a whole step. Written once per step."""

    def __init__(self, limits: StepLimits, driver: Driver) -> None:
        rows, seqs = max(limits.max_num_tokens, limits.max_num_seqs), limits.max_num_seqs
        full, *near = (most + seqs for most in limits.max_blocks_by_kind)
        # Full blocks come last: the other arrays are copied whole, these only as far as they are used.
        per_kind = [rows, seqs + 1, seqs] * (1 + len(near))
        sizes = [rows, rows, rows, seqs + 1, *per_kind, *near, full]
        ends = np.cumsum([ceil_div(size, ALIGNED_INTS) * ALIGNED_INTS for size in sizes])
        self.driver = driver
        self._sent: Event | None = None
        self._host = driver.pinned(int(ends[-1]) * 4).view(torch.int32)
        self._device = torch.zeros(len(self._host), dtype=torch.int32, device=driver.torch_device)
        starts = [0, *ends[:-1].tolist()]
        slices = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        staged = [Staged(self._host[part], self._device[part]) for part in slices]
        self.token_ids, self.sampled_rows, self.positions, self.cu_seqlens_q = staged[:4]
        self.kv = tuple(
            KvBuffers(*[*staged[4 + 3 * kind : 7 + 3 * kind], staged[-1 - kind]]) for kind in range(1 + len(near))
        )
        self._num_fixed = starts[-1]

    def wait_writable(self) -> None:
        """Block until what the last step sent has left the host's side."""
        if self._sent is not None:
            self.driver.synchronize_event(self._sent)

    def send(self, num_blocks: int) -> None:
        """Copy what was put to the device, and of full blocks' ids the first `num_blocks`, on the current stream."""
        num = self._num_fixed + num_blocks
        self._device[:num].copy_(self._host[:num], non_blocking=True)

    def all_sent(self) -> None:
        """Note that nothing more of this step is copied from the host's side."""
        self._sent = self.driver.record(self.driver.current_stream())
