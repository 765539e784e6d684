"""FlashInfer's attention on a CUDA device, planned on the host: how a batch is cut into thread blocks.

Prior art: vLLM's and mini-sglang's FlashInfer backends. From the latter: a plan writes into one pinned buffer, so that
the next one first waits until that has been copied.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kunserve.compute.cuda.arrays import KvBuffers, StepArrays, StepBuffers
from kunserve.compute.cuda.attention import Attend, PagedAttention, ReferenceAttention
from kunserve.compute.cuda.splits import captured_tiles, rows_per_tile, split_blocks, tiles_at_once
from kunserve.compute.ops import Scores
from kunserve.errors import ConfigError
from kunserve.gpu.kv_memory import E4M3, KVShape
from kunserve.model.config import ModelConfig

MIN_FLOAT_WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends
INT_WORKSPACE_BYTES = 8 << 20
HEAD_PIECE = 64  # numbers of a head that its kernels take at once


def float_workspace_bytes(config: ModelConfig, max_bucket: int, num_sms: int) -> int:
    """Return what FlashInfer's fa2 plans need for partial results of split contexts; else it refuses to plan.

    From PrefillPlan in its scheduler.cuh (0.6.18): per tile of queries, float32 output and sum of every row and head.
    A bucket that is captured is planned for as many tiles as its rows could ever make; a mixed batch is only split
    into as many as run at once, two on each multiprocessor.
    """
    shape = config.num_heads, config.num_kv_heads, config.head_dim
    rows = rows_per_tile(config.num_heads // config.num_kv_heads, config.head_dim)
    captured = captured_tiles(max_bucket, *shape, num_sms) * rows
    mixed = tiles_at_once(config.num_kv_heads, num_sms) * 128
    per_row = config.num_heads * (config.head_dim + 1) * 4
    return max(MIN_FLOAT_WORKSPACE_BYTES, max(captured, mixed) * per_row + 64)


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

    Both use the same tensor-core kernels (fa2), so that only one module is compiled per dtypes and head_dim. Layers
    that differ in what becomes of scores (windows) are planned one after the other, each with their own wrappers.
    KV of 8 bits becomes numbers of q's dtype in the kernel, without loss and on any GPU (vec_cast in vec_dtypes.cuh,
    0.6.18: float16 by an instruction from compute capability 9.0 on, else by shifts and a product). Its scales are 1,
    which is what `run` takes for them if it is told none.
    """

    is_capturable = True

    def __init__(
        self, config: ModelConfig, kv_shape: KVShape, dtype: torch.dtype, buffers: StepBuffers, max_bucket: int
    ) -> None:
        self.flashinfer = importlib.import_module("flashinfer")
        self.decode = importlib.import_module("flashinfer.decode")
        self.shape = (config.num_heads, config.num_kv_heads, config.head_dim, kv_shape.block_size)
        self.dtypes, self.buffers = {"q_data_type": dtype, "kv_data_type": kv_shape.dtype}, buffers
        device = buffers.driver.torch_device
        float_bytes = float_workspace_bytes(config, max_bucket, buffers.driver.num_multiprocessors)
        self.floats = torch.zeros(float_bytes, dtype=torch.uint8, device=device)
        near = frozenset(config.near_layers) if len(buffers.kv) > 1 else ()
        kind_of = {Scores.of(config, i): int(i in near) for i in range(config.num_layers)}
        self.planners = [LayersPlanner(self, scores, kind) for scores, kind in kind_of.items()]

    def plan(self, arrays: StepArrays, bucket: int | None) -> tuple[Attend, ...]:
        """See `PagedAttention.plan`."""
        runs = {planner.scores: planner.plan(arrays, bucket) for planner in self.planners}

        def attend(q: Tensor, kv: Tensor, scores: Scores, sinks: Tensor | None) -> Tensor:
            return _attend_with_sinks(runs[scores], q, kv, sinks)

        return (attend,) * len(arrays.kv)


class LayersPlanner:
    """Plans for layers with the same scores. What a plan says is kept in `ints` until all layers of a step have run."""

    def __init__(self, attention: FlashInferAttention, scores: Scores, kind: int) -> None:
        """Plan for layers whose KV is of a `kind`: 0 full, 1 near."""
        self.scores, self._attention, self._kind, self._options = scores, attention, kind, _plan_options(scores)
        self.ints = torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, device=attention.buffers.driver.torch_device)
        floats, flashinfer = attention.floats, attention.flashinfer
        self.mixed = flashinfer.BatchPrefillWithPagedKVCacheWrapper(floats, "HND", backend="fa2")
        self.mixed.reset_workspace_buffer(floats, self.ints)
        self._has_mixed_module = False
        self.buckets: dict[int, Any] = {}

    @property
    def _staged(self) -> KvBuffers:
        return self._attention.buffers.kv[self._kind]

    def plan(self, arrays: StepArrays, bucket: int | None) -> Callable[..., Any]:
        """Plan a step for these layers; returns what runs it."""
        if bucket is not None:
            return self._plan_bucket(arrays, bucket)
        if self._has_mixed_module:
            self.plan_mixed_again(arrays)
        else:
            self.plan_mixed(arrays)
            self._has_mixed_module = True
        run: Callable[..., Any] = self.mixed.run
        return run

    def plan_mixed(self, arrays: StepArrays) -> None:
        """Plan as FlashInfer documents it: it finds the module for these dtypes and options, too."""
        attention, staged = self._attention, self._staged
        seqs, blocks = len(arrays.cu_seqlens_q) - 1, len(arrays.kv[self._kind].kv_indices)
        self.mixed.plan(
            attention.buffers.cu_seqlens_q.host[: seqs + 1],
            staged.kv_indptr.host[: seqs + 1],
            staged.kv_indices.device[:blocks],
            staged.last_block_len.host[:seqs],
            *attention.shape,
            causal=True,
            **attention.dtypes,
            **self._options,
        )

    def plan_mixed_again(self, arrays: StepArrays) -> None:
        """Do the part of the wrapper's `plan` that differs from step to step, and nothing else.

        That takes 0.5 to 1.9 ms, for loops over tensors and for copies of arrays that are on the device already; this
        is what FlashInfer's own fast_decode_plan does for decoding. Arguments of plan: prefill.py of 0.6.18.
        """
        wrapper, attention, staged = self.mixed, self._attention, self._staged
        num_heads, num_kv_heads, head_dim, block_size = attention.shape
        of_kind, seqs, rows = arrays.kv[self._kind], len(arrays.cu_seqlens_q) - 1, int(arrays.cu_seqlens_q[-1])
        wrapper._plan_info = wrapper._cached_module.plan(
            attention.floats,
            self.ints,
            wrapper._pin_memory_int_workspace_buffer,
            attention.buffers.cu_seqlens_q.host[: seqs + 1],
            staged.kv_indptr.host[: seqs + 1],
            torch.from_numpy(of_kind.lens(block_size)),
            rows,
            seqs,
            num_heads,
            num_kv_heads,
            block_size,
            False,  # no graph holds it
            head_dim,
            head_dim,
            True,  # causal
            self._options.get("window_left", -1),
            -1,  # no split of fixed size
            False,  # splits are allowed
            0,  # thread blocks of others
            0,  # sequences differ in length
        )
        wrapper._qo_indptr_buf = attention.buffers.cu_seqlens_q.device[: seqs + 1]
        wrapper._paged_kv_indptr_buf = staged.kv_indptr.device[: seqs + 1]
        wrapper._paged_kv_indices_buf = staged.kv_indices.device[: len(of_kind.kv_indices)]
        wrapper._paged_kv_last_page_len_buf = staged.last_block_len.device[:seqs]
        wrapper._qo_indptr_last, wrapper._batch_size = rows, seqs

    def _plan_bucket(self, arrays: StepArrays, bucket: int) -> Callable[..., Any]:
        staged, attention = self._staged, self._attention
        host = (
            staged.kv_indptr.host[: bucket + 1],
            staged.kv_indices.device[: len(arrays.kv[self._kind].kv_indices)],
            staged.last_block_len.host[:bucket],
        )
        options = attention.dtypes | self._options
        wrapper = self.buckets.get(bucket)
        if wrapper is None:
            wrapper = self.buckets[bucket] = attention.flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                attention.floats,
                "HND",
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=staged.kv_indptr.device[: bucket + 1],
                paged_kv_indices_buffer=staged.kv_indices.device,
                paged_kv_last_page_len_buffer=staged.last_block_len.device[:bucket],
                backend="fa2",
            )
            wrapper.reset_workspace_buffer(attention.floats, self.ints)  # one for all: steps of a stream take turns
            wrapper.plan(*host, *attention.shape, **options)
        else:  # the arrays are on the device already: plan() would copy them once more, and wait
            split = self._split_blocks(arrays, bucket)
            attention.decode.fast_decode_plan(
                wrapper, *host, *attention.shape, **options, fixed_split_size=split, global_override_indptr_cpu=host[0]
            )
        run: Callable[..., Any] = wrapper.run
        return run

    def _split_blocks(self, arrays: StepArrays, bucket: int) -> int | None:
        """See `splits.split_blocks`. A window bounds contexts, and FlashInfer counts only what is in it."""
        if self.scores.window is not None:
            return None
        num_heads, num_kv_heads, head_dim, block_size = self._attention.shape
        num_sms = self._attention.buffers.driver.num_multiprocessors
        tiles = captured_tiles(bucket, num_heads, num_kv_heads, head_dim, num_sms)
        num_blocks = np.diff(arrays.kv[self._kind].kv_indptr)
        return split_blocks(num_blocks, tiles, tiles_at_once(num_kv_heads, num_sms), block_size)


def load_attention(
    config: ModelConfig, kv_shape: KVShape, dtype: torch.dtype, buffers: StepBuffers, max_bucket: int
) -> tuple[PagedAttention, str]:
    """Return FlashInfer where it has kernels, elsewhere the reference, which is slow; and which, for the log.

    max_bucket: the largest number of sequences in a step that is captured. ConfigError if FlashInfer is missing.
    """
    if (lacking := _lacks_kernels_for(config.head_dim, dtype)) is not None:
        reference = ReferenceAttention(kv_shape.block_size, buffers)
        return reference, f"torch reference, which is slow: FlashInfer has no kernels for {lacking}"
    _find_build_tools()
    try:
        note = "FlashInfer, on KV of 8 bits" if kv_shape.dtype == E4M3 else "FlashInfer"
        return FlashInferAttention(config, kv_shape, dtype, buffers, max_bucket), note
    except ImportError as error:
        raise ConfigError(f"--devices cuda needs flashinfer-python: pip install 'kunserve[cuda]' ({error})") from None


def _lacks_kernels_for(head_dim: int, dtype: torch.dtype) -> str | None:
    """Return what FlashInfer has no kernels for; None if it has some.

    Its fa2 kernels take a head in pieces of 64 numbers. Those of a head_dim of 96, say, read 64 of them and write
    where they must not (flashinfer-ai/flashinfer, issue 4299); nothing refuses that (0.6.18).
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return str(dtype)
    return f"heads of {head_dim}" if head_dim % HEAD_PIECE else None


def _find_build_tools() -> None:
    """Let FlashInfer find the `ninja` of this environment, which is not in PATH where nobody has activated it."""
    folder, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if folder not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, (path, folder)))
