"""The decoder's small operations as Triton kernels: one launch each, sums in float32. Needs triton to be imported.

Rounding follows TorchOps: whatever that rounds to the tensors' dtype is rounded here, and products are taken in float32
and rounded, as torch does. Implements kunserve.compute.cuda.ops.Kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kunserve.compute.cuda.experts import moe
from kunserve.compute.cuda.packed import can_scale, packed_linear, scaled_linear
from kunserve.compute.ops import ExpertWeights
from kunserve.gpu.copies import bits_of
from kunserve.gpu.kv_memory import E4M3
from kunserve.model.config import ACTIVATIONS, SWIGLU_ALPHA
from kunserve.model.quant.linear import StoredRows

COLUMNS = 1024  # of one program in `act_and_mul`


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _weighted(x, scale, norm, offset, OFFSET: tl.constexpr):  # type: ignore[no-untyped-def]
    """Do a norm's last step, rounded as TorchOps rounds it."""
    wide, weight = x.to(tl.float32) * scale, norm.to(tl.float32)
    if OFFSET:
        weight += offset
    else:
        wide = wide.to(x.dtype).to(tl.float32)
    return (wide * weight).to(x.dtype)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _begin(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for the kernel before, and let the next one be launched, which waits in turn: see `TritonKernels`."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rms_norm(  # type: ignore[no-untyped-def]
    x, added, weight, total, out, eps, offset, H,
    ADDED: tl.constexpr, OFFSET: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norm a row of x; where `ADDED`, of total = x + added, which is written, too."""
    row = tl.program_id(0).to(tl.int64) * H
    i = tl.arange(0, BLOCK)
    mask = i < H
    norm = tl.load(weight + i, mask, other=0.0)  # no kernel writes it
    _begin(PDL)
    values = tl.load(x + row + i, mask, other=0.0)
    if ADDED:
        more = tl.load(added + row + i, mask, other=0.0)
        values = (values.to(tl.float32) + more.to(tl.float32)).to(values.dtype)
        tl.store(total + row + i, values, mask)
    wide = values.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / H + eps)
    tl.store(out + row + i, _weighted(values, scale, norm, offset, OFFSET), mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _activated(gate, up, limit, alpha, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute activation(gate) * up in float32, the activation rounded to gate's dtype; KIND: index in ACTIVATIONS."""
    wide, up = gate.to(tl.float32), up.to(tl.float32)
    if KIND == 2:
        wide, up = tl.minimum(wide, limit), tl.minimum(tl.maximum(up, -limit), limit)
        return (up + 1.0) * (wide / (1.0 + tl.exp(-wide * alpha)))
    if KIND == 1:  # 1 + tanh(x) is 2 / (1 + e ** -2x)
        inner = 0.7978845608028654 * (wide + 0.044715 * wide * wide * wide)
        return (wide / (1.0 + tl.exp(-2.0 * inner))).to(gate.dtype).to(tl.float32) * up
    return (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32) * up


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _act_and_mul(  # type: ignore[no-untyped-def]
    gate_up, out, width, limit, alpha, KIND: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr
):
    _begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < width
    gate = tl.load(gate_up + row * 2 * width + i, mask, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + i, mask, other=0.0)
    tl.store(out + row * width + i, _activated(gate, up, limit, alpha, KIND).to(gate.dtype), mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _as_e4m3(x):  # type: ignore[no-untyped-def]
    """Return numbers as bytes of e4m3, rounded as `torch_ops.as_kv` does.

    By whole numbers: Triton converts to this dtype only for GPUs that have an instruction for it.
    """
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + ((size >> 20) & 1) + 0x7FFFF - (120 << 23)) >> 20  # half to even; exponents begin 120 lower
    tiny = tl.minimum(size, 0x3C800000).to(tl.float32, bitcast=True) + 16384.0  # up to 2 ** -6, in steps of 2 ** -9
    kept = tl.where(size < 0x3C800000, tiny.to(tl.int32, bitcast=True) - 0x46800000, tl.minimum(normal, 0x7E))
    return (tl.where(size > 0x7F800000, 0x7F, kept) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _keep(target, x, mask, E4M3: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store numbers in KV of their own dtype, or where `E4M3` of 8 bits."""
    if E4M3:
        tl.store(target, _as_e4m3(x), mask)
    else:
        tl.store(target, x, mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rotate_and_append(  # type: ignore[no-untyped-def]
    qkv, rope, kv, positions, slots, q_norm, k_norm, eps, offset, width, block_size,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
    REST_BLOCK: tl.constexpr, NORMED: tl.constexpr, OFFSET: tl.constexpr, E4M3: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Run one program for a head of a token: rotate q in place, k into its slot, and copy v into it.

    A head is two halves that are rotated and a rest that is not. A thread has both of a pair: none is read after it
    was written.
    """
    _begin(PDL)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, j = tl.arange(0, BLOCK), tl.arange(0, REST_BLOCK)
    mask, rest_mask = i < HALF, j < REST
    source = qkv + token * width + head * (2 * HALF + REST)
    a, b = tl.load(source + i, mask, other=0.0), tl.load(source + HALF + i, mask, other=0.0)
    c = tl.load(source + 2 * HALF + j, rest_mask, other=0.0)
    slot = tl.load(slots + token).to(tl.int64)
    if head < HEADS + KV_HEADS:
        if NORMED:
            wide_a, wide_b, wide_c = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32)
            square = tl.sum(wide_a * wide_a, 0) + tl.sum(wide_b * wide_b, 0) + tl.sum(wide_c * wide_c, 0)
            scale = 1.0 / tl.sqrt(square / (2 * HALF + REST) + eps)
            norm = q_norm if head < HEADS else k_norm
            a = _weighted(a, scale, tl.load(norm + i, mask, other=0.0), offset, OFFSET)
            b = _weighted(b, scale, tl.load(norm + HALF + i, mask, other=0.0), offset, OFFSET)
            c = _weighted(c, scale, tl.load(norm + 2 * HALF + j, rest_mask, other=0.0), offset, OFFSET)
        angles = rope + tl.load(positions + token).to(tl.int64) * (2 * HALF)
        cos = tl.load(angles + i, mask, other=0.0).to(tl.float32)
        sin = tl.load(angles + HALF + i, mask, other=0.0).to(tl.float32)
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        a, b = (wide_a * cos - wide_b * sin).to(a.dtype), (wide_b * cos + wide_a * sin).to(b.dtype)
    if head < HEADS:
        tl.store(source + i, a, mask)
        tl.store(source + HALF + i, b, mask)
        tl.store(source + 2 * HALF + j, c, rest_mask)
    elif slot >= 0:
        is_value = (head - HEADS) // KV_HEADS
        row = ((slot // block_size * 2 + is_value) * KV_HEADS + (head - HEADS) % KV_HEADS) * block_size
        target = kv + (row + slot % block_size) * (2 * HALF + REST)
        _keep(target + i, a, mask, E4M3)
        _keep(target + HALF + i, b, mask, E4M3)
        _keep(target + 2 * HALF + j, c, rest_mask, E4M3)


class TritonKernels:
    """Launches on torch's current stream.

    With programmatic dependent launch a kernel of the dense path is launched while the one before still runs, and
    waits for its end before it touches what others write. Each does, so that all that were before have ended, too.
    """

    is_capturable = True

    def __init__(self, *, has_fp8: bool = False, has_pdl: bool = False) -> None:
        """Make the kernels. `has_fp8`: whether the GPU multiplies floats of 8 bits; `has_pdl`: dependent launches."""
        self._has_fp8, self._has_pdl = has_fp8, has_pdl
        self._launch = {"launch_pdl": True} if has_pdl else {}

    def packed_linear(
        self, x: Tensor, weight: StoredRows, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """See `Kernels.packed_linear`: floats with a scale for each row by torch, where that can be, else by ours."""
        if self._has_fp8 and can_scale(x, weight):
            return scaled_linear(x, weight, bias, residual)
        return packed_linear(x, weight, bias, residual)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """Divide by the root mean square of the last dimension, times `offset + weight`: (T, H) -> (T, H)."""
        return self._norm(x, None, x, weight, eps, offset)

    def add_and_norm(
        self, x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """See `Kernels.add_and_norm`."""
        total = torch.empty_like(x)
        return total, self._norm(x, y, total, weight, eps, offset)

    def _norm(self, x: Tensor, y: Tensor | None, total: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        """Norm x, or where there is `y`, `total`, which becomes x + y."""
        T, H = x.shape
        out, block = torch.empty_like(x), triton.next_power_of_2(H)
        num_warps = min(
            max(block // 512, 4), 16
        )  # with four, a thread would hold 64 numbers of each array of a long row
        _rms_norm[(T,)](
            x, x if y is None else y, weight, total, out, eps, offset, H,
            ADDED=y is not None, OFFSET=offset != 0, PDL=self._has_pdl, BLOCK=block,
            num_warps=num_warps, **self._launch,
        )  # fmt: skip
        return out

    def act_and_mul(self, gate_up: Tensor, activation: str = "silu", limit: float = 0.0) -> Tensor:
        """Compute activation(gate) * up: (T, 2 * I) -> (T, I)."""
        T, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(T, width, dtype=gate_up.dtype, device=gate_up.device)
        kind = ACTIVATIONS.index(activation)
        grid = (T, triton.cdiv(width, COLUMNS))
        _act_and_mul[grid](
            gate_up, out, width, limit, SWIGLU_ALPHA, KIND=kind, PDL=self._has_pdl, BLOCK=COLUMNS, **self._launch
        )
        return out

    def moe(self, x: Tensor, experts: ExpertWeights) -> Tensor:
        """See `Kernels.moe`."""
        return moe(x, experts, self.act_and_mul)

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
        """See `Kernels.rotate_and_append`."""
        T, width = qkv.shape
        _, _, num_kv_heads, block_size, head_dim = kv.shape
        num_all_heads = width // head_dim
        num_heads, half = num_all_heads - 2 * num_kv_heads, rope.shape[1] // 2
        rest = head_dim - 2 * half
        if q_norm is not None and k_norm is not None and q_norm.numel() != head_dim:
            q, k = qkv[:, : num_heads * head_dim], qkv[:, num_heads * head_dim : -num_kv_heads * head_dim]
            q.copy_(self.rms_norm(q.contiguous(), q_norm, eps, offset))
            k.copy_(self.rms_norm(k.contiguous(), k_norm, eps, offset))
            q_norm = k_norm = None
        _rotate_and_append[(T, num_all_heads)](
            qkv, rope, bits_of(kv), positions, slots,
            qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, eps, offset,
            width, block_size,
            HEADS=num_heads, KV_HEADS=num_kv_heads,
            HALF=half, BLOCK=triton.next_power_of_2(max(half, 1)),
            REST=rest, REST_BLOCK=triton.next_power_of_2(max(rest, 1)),
            NORMED=q_norm is not None, OFFSET=offset != 0, E4M3=kv.dtype == E4M3, PDL=self._has_pdl, **self._launch,
        )  # fmt: skip
