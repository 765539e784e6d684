"""What a GPU computes with, on GPUs that are not there: kernels that wait in their stream, and read when they run.

Each launch is one piece of work, which a graph can hold; the arithmetic is the reference's.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from fake_gpu_tensors import launch
from torch import Tensor

from kunserve.compute.cuda.arrays import StepArrays, StepBuffers
from kunserve.compute.cuda.attention import Attend, last_positions
from kunserve.compute.cuda.ops import TorchKernels
from kunserve.compute.ops import AttentionBatch, ExpertWeights, Scores
from kunserve.compute.torch_ops import TorchOps
from kunserve.model.quant.linear import Linear, StoredRows


class LaunchedKernels:
    """Implements kunserve.compute.cuda.ops.Kernels."""

    is_capturable = True

    def __init__(self) -> None:
        self._reference = TorchKernels()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        out = torch.empty_like(x)
        launch(lambda x, w, out: out.copy_(self._reference.rms_norm(x, w, eps, offset)), [x, weight], [out])
        return out

    def add_and_norm(
        self, x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        total, out = torch.empty_like(x), torch.empty_like(x)

        def work(x: Tensor, y: Tensor, weight: Tensor, total: Tensor, out: Tensor) -> None:
            for to, value in zip((total, out), self._reference.add_and_norm(x, y, weight, eps, offset), strict=True):
                to.copy_(value)

        launch(work, [x, y, weight], [total, out])
        return total, out

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

    def moe(self, x: Tensor, experts: ExpertWeights) -> Tensor:
        out = torch.empty_like(x)
        [router] = experts.router.parts
        fields = ("router_bias", "gate_up", "gate_up_bias", "down", "down_bias")
        given = {name: getattr(experts, name) for name in fields if getattr(experts, name) is not None}

        def work(x: Tensor, router_data: Tensor, *rest: Tensor) -> None:
            *tensors, out = rest
            weights: dict[str, Any] = dict(zip(given, tensors, strict=True))
            linear = Linear((StoredRows(router_data, router.blocks),))
            out.copy_(self._reference.moe(x, replace(experts, router=linear, **weights)))

        launch(work, [x, router.data, *given.values()], [out])
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
    """Paged attention that reads its arrays on the device, as a captured kernel does. Implements PagedAttention.

    What it plans is written into one pinned buffer, and sent, as FlashInfer's is.
    """

    is_capturable = True

    def __init__(self, block_size: int, buffers: StepBuffers) -> None:
        self._block_size, self._buffers = block_size, buffers
        self._plan = buffers.driver.pinned(8).view(torch.int64)
        self._sent_plan = torch.zeros(1, dtype=torch.int64, device=buffers.driver.torch_device)

    def plan(self, arrays: StepArrays, bucket: int | None) -> tuple[Attend, ...]:
        self._plan[0] += 1
        self._sent_plan.copy_(self._plan, non_blocking=True)
        return tuple(self._planned(kind, len(of_kind.last_block_len)) for kind, of_kind in enumerate(arrays.kv))

    def _planned(self, kind: int, seqs: int) -> Attend:
        staged = self._buffers.kv[kind]
        ends, indptr, last = self._buffers.cu_seqlens_q.device, staged.kv_indptr.device, staged.last_block_len.device
        read = [ends[: seqs + 1], indptr[: seqs + 1], last[:seqs]]

        def attend(q: Tensor, kv: Tensor, scores: Scores, sinks: Tensor | None) -> Tensor:
            out = torch.empty_like(q)
            given = [] if sinks is None else [sinks]
            launch(partial(self._attend, scores), [q, *read, staged.kv_indices.device, *given], [out], [kv])
            return out

        return attend

    def _attend(
        self,
        scores: Scores,
        q: Tensor,
        ends: Tensor,
        indptr: Tensor,
        last: Tensor,
        indices: Tensor,
        *rest: Tensor,
    ) -> None:
        *sinks, out, kv = rest
        counts = indptr.long().diff()
        contexts = (counts - 1) * self._block_size + last
        tables = torch.zeros(len(last), int(counts.max()), dtype=torch.int32)
        tables[torch.arange(tables.shape[1]) < counts[:, None]] = indices[: int(indptr[-1])]
        positions = last_positions(ends, contexts)
        batch = AttentionBatch(positions, ends, contexts.int(), tables, self._block_size)
        out.copy_(TorchOps().attention(q.flatten(1), kv, batch, q.shape[1], scores, *sinks).view(q.shape))
