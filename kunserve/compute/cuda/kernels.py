"""The decoder's small operations as Triton kernels: one launch each, sums in float32. Needs triton to be imported.

Rounding follows TorchOps: whatever that rounds to the tensors' dtype is rounded here, and products are taken in float32
and rounded, as torch does. Implements kunserve.compute.cuda.ops.Kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # of one program in `silu_and_mul`


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rms_norm(x, weight, out, eps, H, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * H
    i = tl.arange(0, BLOCK)
    mask = i < H
    values = tl.load(x + row + i, mask, other=0.0)
    wide = values.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / H + eps)
    normed = (wide * scale).to(values.dtype).to(tl.float32)
    tl.store(out + row + i, (normed * tl.load(weight + i, mask, other=0.0).to(tl.float32)).to(values.dtype), mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _silu_and_mul(gate_up, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < width
    gate = tl.load(gate_up + row * 2 * width + i, mask, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + i, mask, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * width + i, (silu * up.to(tl.float32)).to(gate.dtype), mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rotate_and_append(  # type: ignore[no-untyped-def]
    qkv, rope, kv, positions, slots, q_norm, k_norm, eps, width, block_size,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """One program for a head of a token: q is rotated in place, k is rotated into its slot, v copied into it."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    mask = i < HALF
    source = qkv + token * width + head * (2 * HALF)
    a, b = tl.load(source + i, mask, other=0.0), tl.load(source + HALF + i, mask, other=0.0)
    slot = tl.load(slots + token).to(tl.int64)
    if head < HEADS + KV_HEADS:
        if NORMED:
            wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
            square = tl.sum(wide_a * wide_a, 0) + tl.sum(wide_b * wide_b, 0)
            scale = 1.0 / tl.sqrt(square / (2 * HALF) + eps)
            norm = q_norm if head < HEADS else k_norm
            norm_a = tl.load(norm + i, mask, other=0.0).to(tl.float32)
            norm_b = tl.load(norm + HALF + i, mask, other=0.0).to(tl.float32)
            a = ((wide_a * scale).to(a.dtype).to(tl.float32) * norm_a).to(a.dtype)
            b = ((wide_b * scale).to(b.dtype).to(tl.float32) * norm_b).to(b.dtype)
        angles = rope + tl.load(positions + token).to(tl.int64) * (2 * HALF)
        cos = tl.load(angles + i, mask, other=0.0).to(tl.float32)
        sin = tl.load(angles + HALF + i, mask, other=0.0).to(tl.float32)
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        a, b = (wide_a * cos - wide_b * sin).to(a.dtype), (wide_b * cos + wide_a * sin).to(b.dtype)
    if head < HEADS:
        tl.store(source + i, a, mask)
        tl.store(source + HALF + i, b, mask)
    elif slot >= 0:
        is_value = (head - HEADS) // KV_HEADS
        row = ((slot // block_size * 2 + is_value) * KV_HEADS + (head - HEADS) % KV_HEADS) * block_size
        target = kv + (row + slot % block_size) * (2 * HALF)
        tl.store(target + i, a, mask)
        tl.store(target + HALF + i, b, mask)


class TritonKernels:
    """Launches on torch's current stream."""

    is_capturable = True

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square norm over the last dimension: (T, H) -> (T, H)."""
        T, H = x.shape
        out = torch.empty_like(x)
        _rms_norm[(T,)](x, weight, out, eps, H, BLOCK=triton.next_power_of_2(H))
        return out

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up: (T, 2 * I) -> (T, I)."""
        T, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(T, width, dtype=gate_up.dtype, device=gate_up.device)
        _silu_and_mul[(T, triton.cdiv(width, COLUMNS))](gate_up, out, width, BLOCK=COLUMNS)
        return out

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
    ) -> None:
        """See `Kernels.rotate_and_append`."""
        T, width = qkv.shape
        _, _, num_kv_heads, block_size, head_dim = kv.shape
        num_all_heads, half = width // head_dim, head_dim // 2
        _rotate_and_append[(T, num_all_heads)](
            qkv, rope, kv, positions, slots,
            qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, eps, width, block_size,
            HEADS=num_all_heads - 2 * num_kv_heads, KV_HEADS=num_kv_heads, HALF=half,
            BLOCK=triton.next_power_of_2(half), NORMED=q_norm is not None,
        )  # fmt: skip
