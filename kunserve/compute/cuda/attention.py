"""Planning a step on a CUDA device: a microbatch's arrays, once per stage, from pinned memory to stable addresses.

FlashInfer plans on the host how a batch is cut into thread blocks; all layers of a stage share the plan. Prior art:
vLLM's and mini-sglang's FlashInfer backends. From the latter: a plan writes into one pinned buffer, so that the next
one first waits until that has been copied.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kunserve.compute.ops import AttentionBatch, Scores
from kunserve.compute.torch_ops import TorchOps
from kunserve.errors import ConfigError
from kunserve.gpu.cuda.driver import Driver, Event
from kunserve.model.config import ModelConfig
from kunserve.sizes import ceil_div

Ints = npt.NDArray[np.int32]
# q (T, num_heads, head_dim), kv of a layer, its scores and sinks -> (T, num_heads, head_dim)
Attend = Callable[[Tensor, Tensor, Scores, Tensor | None], Tensor]

MIN_FLOAT_WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends
INT_WORKSPACE_BYTES = 8 << 20
ALIGNED_INTS = 32  # kernels are compiled for addresses that are multiples of 16 bytes


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest microbatch that buffers are made for."""

    max_num_tokens: int
    max_num_seqs: int
    max_num_blocks: int  # of all sequences of a microbatch together, on one stage


@dataclass(frozen=True, slots=True)
class StepArrays:
    """One stage's view of a microbatch, on the host: blocks as in a compressed sparse row matrix. R rows of tokens."""

    positions: Ints  # (R,)
    slots: Ints  # (R,) block * block_size + offset; -1 for rows that are padding
    cu_seqlens_q: Ints  # (B + 1,)
    kv_indptr: Ints  # (B + 1,): blocks of sequence b are kv_indices[kv_indptr[b]:kv_indptr[b + 1]]
    kv_indices: Ints
    last_block_len: Ints  # (B,) tokens in the last block


def step_arrays(batch: AttentionBatch, num_rows: int | None = None) -> StepArrays:
    """Flatten a host batch; if `num_rows` is given, all sequences have one token and are padded to so many.

    A row of padding writes nothing and reads one token of a block that the first sequence reads anyway.
    """
    positions, ends, contexts = (t.numpy() for t in (batch.positions, batch.cu_seqlens_q, batch.context_lens))
    tables, block_size = batch.block_tables.numpy(), batch.block_size
    num_blocks = ceil_div(contexts, block_size)
    sequences = np.repeat(np.arange(len(contexts)), np.diff(ends))
    slots = tables[sequences, positions // block_size] * block_size + positions % block_size
    indices = tables[np.arange(tables.shape[1]) < num_blocks[:, None]]
    last = contexts - (num_blocks - 1) * block_size
    if num_rows is not None:
        padding = num_rows - len(contexts)
        positions, slots = _extend(positions, 0, padding), _extend(slots, -1, padding)
        indices, last = _extend(indices, int(tables[0, 0]), padding), _extend(last, 1, padding)
        num_blocks = _extend(num_blocks, 1, padding)
        ends = np.arange(num_rows + 1)
    indptr = np.concatenate([[0], np.cumsum(num_blocks)])
    return StepArrays(*(np.ascontiguousarray(a, np.int32) for a in (positions, slots, ends, indptr, indices, last)))


def padding_arrays(bucket: int) -> StepArrays:
    """Return the arrays of a decode step without sequences: all rows are padding, which reads a token of block 0."""
    zeros, ones, count = np.zeros(bucket, np.int32), np.ones(bucket, np.int32), np.arange(bucket + 1, dtype=np.int32)
    return StepArrays(zeros, zeros - 1, count, count, zeros, ones)


def _extend(values: npt.NDArray[Any], value: int, count: int) -> npt.NDArray[Any]:
    return np.concatenate([values, np.full(count, value, values.dtype)])


@dataclass(frozen=True, slots=True)
class Staged:
    """Integers that change every step, at one address in pinned memory and one on the device."""

    host: Tensor
    device: Tensor

    def put(self, values: Ints) -> Tensor:
        """Write (N,) on the host; returns where the first N are on the device once they have been sent."""
        self.host[: len(values)].numpy()[:] = values
        return self.device[: len(values)]


class StepBuffers:
    """All staged arrays of one device, side by side, so that one copy sends a whole step. Written once per step."""

    def __init__(self, limits: StepLimits, driver: Driver) -> None:
        rows, seqs = max(limits.max_num_tokens, limits.max_num_seqs), limits.max_num_seqs
        # Block ids come last: the other arrays are copied whole, these only as far as they are used.
        sizes = [rows, rows, rows, rows, seqs + 1, seqs + 1, seqs, limits.max_num_blocks + seqs]
        ends = np.cumsum([ceil_div(size, ALIGNED_INTS) * ALIGNED_INTS for size in sizes])
        self.driver = driver
        self._copied: Event | None = None
        self._host = driver.pinned(int(ends[-1]) * 4).view(torch.int32)
        self._device = torch.zeros(len(self._host), dtype=torch.int32, device=driver.torch_device)
        starts = [0, *ends[:-1].tolist()]
        slices = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        staged = [Staged(self._host[part], self._device[part]) for part in slices]
        self.token_ids, self.sampled_rows, self.positions, self.slots = staged[:4]
        self.cu_seqlens_q, self.kv_indptr, self.last_block_len, self.kv_indices = staged[4:]
        self._num_fixed = starts[-1]

    def wait_writable(self) -> None:
        """Block until the last step's arrays have left the host's side."""
        if self._copied is not None:
            self.driver.synchronize_event(self._copied)

    def send(self, num_blocks: int) -> None:
        """Copy what was put to the device, and of block ids the first `num_blocks`, on the current stream."""
        num = self._num_fixed + num_blocks
        self._device[:num].copy_(self._host[:num], non_blocking=True)
        self._copied = self.driver.record(self.driver.current_stream())


@dataclass(frozen=True, slots=True)
class PlannedBatch(AttentionBatch):
    """A batch on the device, ready for every layer of a stage."""

    slots: Tensor  # (R,) int32
    attend: Attend


class PagedAttention(Protocol):
    """Attention over blocks."""

    is_capturable: bool  # whether a CUDA graph can hold it

    def plan(self, arrays: StepArrays, bucket: int | None) -> Attend:
        """Plan one step. With a `bucket`, a graph can capture the result, and stays valid after later plans."""


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

    def upload(self, arrays: StepArrays, bucket: int | None, sampled_rows: Ints, token_ids: Ints) -> PlannedStep:
        """Send a step's arrays in one copy and plan attention; with a `bucket`, they are padded to it."""
        buffers = self._buffers
        buffers.wait_writable()
        indptr = buffers.kv_indptr.put(arrays.kv_indptr)
        buffers.kv_indices.put(arrays.kv_indices)
        buffers.last_block_len.put(arrays.last_block_len)
        positions, slots = buffers.positions.put(arrays.positions), buffers.slots.put(arrays.slots)
        ends = buffers.cu_seqlens_q.put(arrays.cu_seqlens_q)
        rows, ids = buffers.sampled_rows.put(sampled_rows), buffers.token_ids.put(token_ids)
        buffers.send(len(arrays.kv_indices))
        batch = PlannedBatch(
            positions=positions,
            slots=slots,
            cu_seqlens_q=ends,
            context_lens=indptr[1:],  # nobody reads it: attention is planned
            block_tables=indptr,
            block_size=0,
            attend=self._attention.plan(arrays, bucket),
        )
        return PlannedStep(batch, rows, ids)


def float_workspace_bytes(config: ModelConfig, max_bucket: int, num_sms: int) -> int:
    """Return what FlashInfer's fa2 plans need for partial results of split contexts; else it refuses to plan.

    From PrefillPlan in its scheduler.cuh (0.6.18): per tile of queries, float32 output and sum of every row and head.
    A bucket that is captured is planned for as many tiles as its rows could ever make; a mixed batch is only split
    into as many as run at once, two on each multiprocessor.
    """
    group, per_row = config.num_heads // config.num_kv_heads, config.num_heads * (config.head_dim + 1) * 4
    at_once = 2 * num_sms // config.num_kv_heads
    rows_per_tile = 16 if group <= 16 else 64 if group <= 64 or config.head_dim >= 256 else 128
    captured = max(at_once, ceil_div(max_bucket * group, rows_per_tile) + max_bucket - 1) * rows_per_tile
    return max(MIN_FLOAT_WORKSPACE_BYTES, max(captured, at_once * 128) * per_row + 64)


def _plan_options(scores: Scores) -> dict[str, float]:
    """Return the options of a plan for layers with these scores, where they differ from FlashInfer's defaults."""
    window = (
        None if scores.window is None else scores.window - 1
    )  # FlashInfer's window does not count the query's own token
    options = {"sm_scale": scores.scale, "window_left": window, "logits_soft_cap": scores.softcap}
    return {name: value for name, value in options.items() if value is not None}


def _attend_with_sinks(run: Callable[..., Any], q: Tensor, kv: Tensor, sinks: Tensor | None) -> Tensor:
    """Run a planned wrapper. A sink takes its share of softmax's sum, which is 2 ** lse, and gives nothing for it."""
    if sinks is None:
        out: Tensor = run(q, kv)
        return out
    out, lse = run(q, kv, return_lse=True)
    return (out * torch.sigmoid(lse * math.log(2) - sinks.float())[..., None]).to(q.dtype)


class FlashInferAttention:
    """FlashInfer's paged kernels: one wrapper for mixed batches, and one per bucket of captured decode steps.

    Both use the same tensor-core kernels (fa2), so that only one module is compiled per dtype and head_dim. Layers
    that differ in what becomes of scores (windows) are planned one kind after the other, each with its own wrappers.
    """

    is_capturable = True

    def __init__(
        self, config: ModelConfig, block_size: int, dtype: torch.dtype, buffers: StepBuffers, max_bucket: int
    ) -> None:
        self.flashinfer = importlib.import_module("flashinfer")
        self.decode = importlib.import_module("flashinfer.decode")
        self.shape = (config.num_heads, config.num_kv_heads, config.head_dim, block_size)
        self.dtypes, self.buffers = {"q_data_type": dtype, "kv_data_type": dtype}, buffers
        device = buffers.driver.torch_device
        float_bytes = float_workspace_bytes(config, max_bucket, buffers.driver.num_multiprocessors)
        self.floats = torch.zeros(float_bytes, dtype=torch.uint8, device=device)
        self.kinds = [
            _Kind(self, scores) for scores in dict.fromkeys(Scores.of(config, i) for i in range(config.num_layers))
        ]

    def plan(self, arrays: StepArrays, bucket: int | None) -> Attend:
        """See `PagedAttention.plan`."""
        runs = {kind.scores: kind.plan(arrays, bucket) for kind in self.kinds}

        def attend(q: Tensor, kv: Tensor, scores: Scores, sinks: Tensor | None) -> Tensor:
            return _attend_with_sinks(runs[scores], q, kv, sinks)

        return attend


class _Kind:
    """The wrappers of one kind of layers. What a plan says is kept in `ints` until all layers of a step have run."""

    def __init__(self, attention: FlashInferAttention, scores: Scores) -> None:
        self.scores, self._attention, self._options = scores, attention, _plan_options(scores)
        self.ints = torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, device=attention.buffers.driver.torch_device)
        floats, flashinfer = attention.floats, attention.flashinfer
        self._mixed = flashinfer.BatchPrefillWithPagedKVCacheWrapper(floats, "HND", backend="fa2")
        self._mixed.reset_workspace_buffer(floats, self.ints)
        self.buckets: dict[int, Any] = {}

    def plan(self, arrays: StepArrays, bucket: int | None) -> Callable[..., Any]:
        """Plan a step for these layers; returns what runs it."""
        if bucket is not None:
            return self._plan_bucket(arrays, bucket)
        buffers, attention = self._attention.buffers, self._attention
        seqs, blocks = len(arrays.last_block_len), len(arrays.kv_indices)
        self._mixed.plan(
            buffers.cu_seqlens_q.host[: seqs + 1],
            buffers.kv_indptr.host[: seqs + 1],
            buffers.kv_indices.device[:blocks],
            buffers.last_block_len.host[:seqs],
            *attention.shape,
            causal=True,
            **attention.dtypes,
            **self._options,
        )
        run: Callable[..., Any] = self._mixed.run
        return run

    def _plan_bucket(self, arrays: StepArrays, bucket: int) -> Callable[..., Any]:
        buffers, attention = self._attention.buffers, self._attention
        host = (
            buffers.kv_indptr.host[: bucket + 1],
            buffers.kv_indices.device[: len(arrays.kv_indices)],
            buffers.last_block_len.host[:bucket],
        )
        options = attention.dtypes | self._options
        wrapper = self.buckets.get(bucket)
        if wrapper is None:
            wrapper = self.buckets[bucket] = attention.flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                attention.floats,
                "HND",
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=buffers.kv_indptr.device[: bucket + 1],
                paged_kv_indices_buffer=buffers.kv_indices.device,
                paged_kv_last_page_len_buffer=buffers.last_block_len.device[:bucket],
                backend="fa2",
            )
            wrapper.reset_workspace_buffer(attention.floats, self.ints)  # one for all: steps of a stream take turns
            wrapper.plan(*host, *attention.shape, **options)
        else:  # the arrays are on the device already: plan() would copy them once more, and wait
            attention.decode.fast_decode_plan(
                wrapper, *host, *attention.shape, **options, global_override_indptr_cpu=host[0]
            )
        run: Callable[..., Any] = wrapper.run
        return run


class ReferenceAttention:
    """TorchOps' attention behind the same interface: any dtype, reads lengths on the host, cannot be captured."""

    is_capturable = False

    def __init__(self, block_size: int, buffers: StepBuffers) -> None:
        self._block_size, self._buffers, self._ops = block_size, buffers, TorchOps()

    def plan(self, arrays: StepArrays, bucket: int | None) -> Attend:
        """See `PagedAttention.plan`. Reads the step's arrays when it attends, as captured kernels do."""
        seqs = len(arrays.last_block_len)

        def attend(q: Tensor, kv: Tensor, scores: Scores, sinks: Tensor | None) -> Tensor:
            batch = self._batch(seqs, q.device)
            return self._ops.attention(q.flatten(1), kv, batch, q.shape[1], scores, sinks).view(q.shape)

        return attend

    def _batch(self, seqs: int, device: torch.device) -> AttentionBatch:
        buffers = self._buffers
        indptr = buffers.kv_indptr.host[: seqs + 1].long()
        counts = indptr.diff()
        contexts = (counts - 1) * self._block_size + buffers.last_block_len.host[:seqs]
        tables = torch.zeros(seqs, int(counts.max()), dtype=torch.int32)
        tables[torch.arange(tables.shape[1]) < counts[:, None]] = buffers.kv_indices.host[: indptr[-1]]
        ends = buffers.cu_seqlens_q.host[: seqs + 1]
        positions = buffers.positions.device[: int(ends[-1])]
        return AttentionBatch(positions, ends, contexts.int(), tables.to(device), self._block_size)


def load_attention(
    config: ModelConfig, block_size: int, dtype: torch.dtype, buffers: StepBuffers, max_bucket: int
) -> tuple[PagedAttention, str]:
    """Return FlashInfer for half types, the reference for float32; and which, for the log. ConfigError if missing.

    max_bucket: the largest number of sequences in a step that is captured.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return ReferenceAttention(block_size, buffers), f"torch reference: FlashInfer has no kernels for {dtype}"
    try:
        return FlashInferAttention(config, block_size, dtype, buffers, max_bucket), "FlashInfer"
    except ImportError as error:
        raise ConfigError(f"--devices cuda needs flashinfer-python: pip install 'kunserve[cuda]' ({error})") from None
