"""The decoder's operations on a CUDA device: torch's matrices, Triton for what is small, attention as planned.

A batch must have been planned (kunserve.compute.cuda.attention): it then carries its slots and how to attend, so that
the same operations run eagerly, in a graph, with FlashInfer or with the reference.
"""

from __future__ import annotations

import importlib
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kunserve.compute.cuda.attention import PlannedBatch
from kunserve.compute.ops import PLAIN_SCORES, AttentionBatch, ExpertWeights, Scores
from kunserve.compute.torch_ops import TorchOps
from kunserve.errors import ConfigError
from kunserve.gpu.copies import bits_of
from kunserve.model.quant.linear import Linear, StoredRows

FP8_SINCE = (8, 9)  # compute capability whose tensor cores multiply floats of 8 bits
PDL_SINCE = (9, 0)  # which launches a kernel before the one before has ended
CHECKPOINT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Kernels(Protocol):
    """The small operations."""

    is_capturable: bool  # whether a CUDA graph can hold them: nothing in them waits for the host

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """Divide by the root mean square of the last dimension, times `offset + weight`: (T, H) -> (T, H)."""

    def add_and_norm(
        self, x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Return x + y, rounded, and what `rms_norm` makes of it: (T, H) each."""

    def act_and_mul(self, gate_up: Tensor, activation: str = "silu", limit: float = 0.0) -> Tensor:
        """Compute activation(gate) * up: (T, 2 * I) -> (T, I)."""

    def moe(self, x: Tensor, experts: ExpertWeights) -> Tensor:
        """Do what `Ops.moe` does."""

    def packed_linear(
        self, x: Tensor, weight: StoredRows, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Do what `Ops.linear` does, for rows that are stored in planes. Rows of `residual` may lie apart."""

    def rotate_and_append(
        self,
        qkv: Tensor,
        rope: Tensor,
        kv: Tensor,
        positions: Tensor,
        slots: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        offset: float = 0.0,
    ) -> None:
        """Do what `Ops.rotate_and_append` does. `slots` (T,) int32: block * block_size + offset; below 0: skipped."""


class TorchKernels:
    """The reference, any dtype and device."""

    is_capturable = False

    def __init__(self) -> None:
        self._ops = TorchOps()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """See `Kernels.rms_norm`."""
        return self._ops.rms_norm(x, weight, eps, offset)

    def add_and_norm(
        self, x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """See `Kernels.add_and_norm`."""
        total = x + y
        return total, self._ops.rms_norm(total, weight, eps, offset)

    def act_and_mul(self, gate_up: Tensor, activation: str = "silu", limit: float = 0.0) -> Tensor:
        """See `Kernels.act_and_mul`."""
        return self._ops.act_and_mul(gate_up, activation, limit)

    def moe(self, x: Tensor, experts: ExpertWeights) -> Tensor:
        """See `Kernels.moe`."""
        return self._ops.moe(x, experts)

    def packed_linear(
        self, x: Tensor, weight: StoredRows, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """See `Kernels.packed_linear`."""
        return self._ops.linear(x, Linear((weight,)), bias, residual)

    def rotate_and_append(
        self,
        qkv: Tensor,
        rope: Tensor,
        kv: Tensor,
        positions: Tensor,
        slots: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        offset: float = 0.0,
    ) -> None:
        """See `Kernels.rotate_and_append`: the reference on one sequence of all tokens, whose blocks are scattered."""
        kept = (slots >= 0).nonzero()[:, 0]
        if not len(kept):
            return
        tokens, into = qkv[kept], slots[kept].long()
        order = torch.arange(len(kept), dtype=torch.int32, device=qkv.device)
        ends = torch.tensor([0, len(kept)], dtype=torch.int32, device=qkv.device)
        one_each = torch.empty(len(kept), 2, kv.shape[2], 1, kv.shape[4], dtype=kv.dtype, device=kv.device)
        batch = AttentionBatch(order, ends, ends[1:], order[None], block_size=1)
        angles = rope[positions[kept].long()]
        self._ops.rotate_and_append(tokens, angles, one_each, batch, q_norm, k_norm, eps, offset)
        qkv[kept] = tokens
        bits_of(kv)[into // kv.shape[3], :, :, into % kv.shape[3]] = bits_of(one_each)[:, :, :, 0]


class CudaOps:
    """`Ops` on planned batches. Implements kunserve.compute.ops.Ops."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def embed(self, token_ids: Tensor, weight: Linear) -> Tensor:
        """Take the rows of `weight` (V, H) for `token_ids` (T,) int32 -> (T, H)."""
        return weight.rows(token_ids)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """Divide by the root mean square of the last dimension, times `offset + weight`: (T, H) -> (T, H)."""
        return self._kernels.rms_norm(x, weight, eps, offset)

    def linear(self, x: Tensor, weight: Linear, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Return `residual + x @ weight.T + bias`: (T, K), (N, K), (N,), (T, N) -> (T, N)."""
        parts, first = [], 0
        for part in weight.parts:
            rows = slice(first, first := first + part.num_rows)
            linear = _linear if part.blocks is None else self._kernels.packed_linear
            of_part = (None if bias is None else bias[rows], None if residual is None else residual[:, rows])
            parts.append(linear(x, part, *of_part))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def linear_into(self, x: Tensor, weight: Linear, y: Tensor) -> None:
        """See `Ops.linear_into`."""
        y.copy_(self.linear(x, weight))

    def linear_and_norm(
        self,
        x: Tensor,
        weight: Linear,
        bias: Tensor | None,
        residual: Tensor,
        norm: Tensor,
        eps: float,
        offset: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Return `residual + x @ weight.T + bias` and its norm: the sum is the norm's work, not that of the product."""
        return self._kernels.add_and_norm(residual, self.linear(x, weight, bias), norm, eps, offset)

    def rotate_and_append(
        self,
        qkv: Tensor,
        rope: Tensor,
        kv: Tensor,
        batch: AttentionBatch,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
        offset: float = 0.0,
    ) -> None:
        """Norm and rotate q (in place in `qkv`) and k; write k and v into their slots of `kv`."""
        assert isinstance(batch, PlannedBatch)
        self._kernels.rotate_and_append(qkv, rope, kv, batch.positions, batch.slots, q_norm, k_norm, eps, offset)

    def attention(
        self,
        qkv: Tensor,
        kv: Tensor,
        batch: AttentionBatch,
        num_heads: int,
        scores: Scores = PLAIN_SCORES,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend causally with the q part of `qkv` to the blocks: -> (T, num_heads * head_dim)."""
        assert isinstance(batch, PlannedBatch)
        head_dim = kv.shape[-1]
        q = qkv[:, : num_heads * head_dim].view(len(qkv), num_heads, head_dim)
        return batch.attend(q, kv, scores, sinks).flatten(1)

    def act_and_mul(self, gate_up: Tensor, activation: str = "silu", limit: float = 0.0) -> Tensor:
        """Compute activation(gate) * up: (T, 2 * I) -> (T, I)."""
        return self._kernels.act_and_mul(gate_up, activation, limit)

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """Compute cap * tanh(x / cap), element by element."""
        return torch.tanh(x / cap) * cap

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Ops.add`."""
        return x + y

    def gated(self, x: Tensor, gate: Tensor) -> Tensor:
        """Compute x * sigmoid(gate): (T, H), (T, 1) -> (T, H)."""
        return x * torch.sigmoid(gate)

    def moe(self, x: Tensor, experts: ExpertWeights) -> Tensor:
        """Route each row to its experts, on the device, and sum what they make of it: -> (T, H)."""
        return self._kernels.moe(x, experts)


def _linear(x: Tensor, weight: StoredRows, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Do what `Ops.linear` does, for rows that are stored as numbers."""
    y = F.linear(x, weight.data, bias)
    return y if residual is None else residual + y  # torch's addmm would copy a matrix before it adds to it


def cuda_dtype(name: str, checkpoint: str) -> torch.dtype:
    """Return the dtype of weights and KV for `--dtype`; "auto" is the checkpoint's. ConfigError if not served."""
    wanted = checkpoint if name == "auto" else name
    dtype = CHECKPOINT_DTYPES.get(wanted)
    if dtype is None:
        known = ", ".join(CHECKPOINT_DTYPES)
        raise ConfigError(f"--dtype {name}: {wanted} is not served on CUDA devices; use one of {known}")
    return dtype


def load_kernels(device: torch.device) -> tuple[Kernels, str]:
    """Return Triton's kernels on a GPU if triton is installed, else the reference; and which, for the log."""
    if device.type != "cuda":
        return TorchKernels(), f"torch reference on {device.type}"
    try:
        module = importlib.import_module("kunserve.compute.cuda.kernels")
    except ImportError:
        return TorchKernels(), "torch reference: triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    kernels: Kernels = module.TritonKernels(has_fp8=capability >= FP8_SINCE, has_pdl=capability >= PDL_SINCE)
    return kernels, "Triton kernels"
