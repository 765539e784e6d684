"""What a GPU computes with, on GPUs that are not there: kernels that wait in their stream, and read when they run.

Each launch is one piece of work, which a graph can hold; the arithmetic is the reference's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from fake_gpu_tensors import launch
from torch import Tensor

from kunserve.compute.cuda.attention import Attend, StepArrays, StepBuffers
from kunserve.compute.cuda.ops import TorchKernels
from kunserve.compute.ops import AttentionBatch, Scores
from kunserve.compute.torch_ops import TorchOps
from kunserve.model.quant.linear import StoredRows


class LaunchedKernels:
    """Implements kunserve.compute.cuda.ops.Kernels."""

    is_capturable = True

    def __init__(self) -> None:
        self._reference = TorchKernels()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        out = torch.empty_like(x)
        launch(lambda x, w, out: out.copy_(self._reference.rms_norm(x, w, eps, offset)), [x, weight], [out])
        return out

    def act_and_mul(self, gate_up: Tensor, activation: str = "silu", limit: float = 0.0) -> Tensor:
        out = torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)
        launch(lambda x, out: out.copy_(self._reference.act_and_mul(x, activation, limit)), [gate_up], [out])
        return out

    def packed_linear(
        self, x: Tensor, weight: StoredRows, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        assert weight.scales is not None
        out = torch.empty(len(x), weight.num_rows, dtype=x.dtype, device=x.device)
        more = [tensor for tensor in (bias, residual) if tensor is not None]

        def work(x: Tensor, data: Tensor, scales: Tensor, *rest: Tensor) -> None:
            *given, out = rest
            added = [given.pop(0) if tensor is not None else None for tensor in (bias, residual)]
            out.copy_(self._reference.packed_linear(x, StoredRows(data, weight.blocks, scales), *added))

        launch(work, [x, weight.data, weight.scales, *more], [out])
        return out

    def rotate_and_append(
        self, qkv: Tensor, rope: Tensor, kv: Tensor, positions: Tensor, slots: Tensor,
        q_norm: Tensor | None, k_norm: Tensor | None, eps: float, offset: float = 0.0,
    ) -> None:  # fmt: skip
        norms = [norm for norm in (q_norm, k_norm) if norm is not None]

        def work(rope: Tensor, positions: Tensor, slots: Tensor, *rest: Any) -> None:
            *given, qkv, kv = rest
            q, k = given or (None, None)
            self._reference.rotate_and_append(qkv, rope, kv, positions, slots, q, k, eps, offset)

        launch(work, [rope, positions, slots, *norms], [qkv], [kv])


class LaunchedAttention:
    """Paged attention that reads its arrays on the device, as a captured kernel does. Implements PagedAttention."""

    is_capturable = True

    def __init__(self, block_size: int, buffers: StepBuffers) -> None:
        self._block_size, self._buffers = block_size, buffers

    def plan(self, arrays: StepArrays, bucket: int | None) -> Attend:
        seqs, buffers = len(arrays.last_block_len), self._buffers
        staged = [buffers.cu_seqlens_q, buffers.kv_indptr, buffers.kv_indices, buffers.last_block_len]
        sizes = [seqs + 1, seqs + 1, len(buffers.kv_indices.device), seqs]
        read = [s.device[:size] for s, size in zip(staged, sizes, strict=True)]

        def attend(q: Tensor, kv: Tensor, scores: Scores, sinks: Tensor | None) -> Tensor:
            assert sinks is None
            out = torch.empty_like(q)
            launch(partial(self._attend, scores), [q, *read], [out], [kv])
            return out

        return attend

    def _attend(
        self,
        scores: Scores,
        q: Tensor,
        ends: Tensor,
        indptr: Tensor,
        indices: Tensor,
        last: Tensor,
        out: Tensor,
        kv: Tensor,
    ) -> None:
        counts = indptr.long().diff()
        contexts = (counts - 1) * self._block_size + last
        tables = torch.zeros(len(last), int(counts.max()), dtype=torch.int32)
        tables[torch.arange(tables.shape[1]) < counts[:, None]] = indices[: int(indptr[-1])]
        lens = ends.diff()
        positions = [torch.arange(int(c - n), int(c)) for c, n in zip(contexts, lens, strict=True)]
        batch = AttentionBatch(torch.cat(positions).int(), ends, contexts.int(), tables, self._block_size)
        out.copy_(TorchOps().attention(q.flatten(1), kv, batch, q.shape[1], scores).view(q.shape))
