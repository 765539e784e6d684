"""Matrices of quantized checkpoints, as published, -> blocks of ours: codes, and a scale and an offset per group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kunserve.errors import ConfigError
from kunserve.model.quant.blocks import Blocks
from kunserve.model.quant.dequantize import affine
from kunserve.model.quant.scheme import Scheme
from kunserve.sizes import ceil_div

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # of the eight codes in 32 bits, where each column's is
Read = Callable[[str], Tensor]  # a tensor of the matrix by its ending: "qweight"


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix (N, K) as codes; of group g of a row, value = code * scale + offset. G groups."""

    group: int  # columns that share a scale
    codes: Tensor  # (N, K) uint8
    scale: Tensor  # (N, G) float32
    offset: Tensor | None  # (N, G) float32; None: codes are e4m3
    group_of: Tensor | None = None  # (K,) group of each column, where they are not in order

    def blocks(self, blocks: Blocks) -> Tensor:
        """Return rows of blocks: (N, bytes of a row) uint8."""
        N, K = self.codes.shape
        count = K // blocks.num_values
        header = [self.scale] if self.offset is None else [self.scale, self.offset]
        of = torch.arange(count) * blocks.num_values // self.group
        spread = [values[:, of] for values in header]
        codes = self.codes.view(N, count, blocks.num_values)
        if blocks.name.startswith("A4"):
            halves = codes.view(N, count, -1, 2, 16)
            codes = (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).flatten(2)
        numbers = torch.stack(spread, dim=-1).contiguous().view(torch.uint8)
        return torch.cat([numbers, codes], dim=-1).flatten(1)

    def numbers(self) -> Tensor:
        """Return what they stand for: (N, K) float32."""
        of = torch.arange(self.codes.shape[1]) // self.group if self.group_of is None else self.group_of.long()
        if self.offset is None:
            return self.codes.view(torch.float8_e4m3fn).float() * self.scale[:, of]
        return affine(self.codes, self.scale[:, of], self.offset[:, of])


def take(scheme: Scheme, read: Read, shape: tuple[int, int]) -> Codes:
    """Read one matrix (N, K). ConfigError, which names what, if a tensor of it has another shape than it must have."""
    return LAYOUTS[scheme.layout](scheme, read, *shape)


def _awq(scheme: Scheme, read: Read, N: int, K: int) -> Codes:
    group = scheme.group or K
    G = K // group
    codes = _unpacked(_shaped(read, "qweight", (K, N // 8)), 4).view(K, -1, 8)[..., AWQ_ORDER].reshape(K, N)
    zeros = _unpacked(_shaped(read, "qzeros", (G, N // 8)), 4).view(G, -1, 8)[..., AWQ_ORDER].reshape(G, N)
    return _with_zeros(group, codes.T, _shaped(read, "scales", (G, N)).T, zeros.T)


def _gptq(scheme: Scheme, read: Read, N: int, K: int) -> Codes:
    bits = int(scheme.kind[1:])
    per, group = 32 // bits, scheme.group or K
    G = K // group
    packed = _shaped(read, "qweight", (K // per, N))
    codes = _unpacked(packed.T.contiguous(), bits)
    zeros = _unpacked(_shaped(read, "qzeros", (G, N // per)), bits) + scheme.zero_shift
    of = _shaped(read, "g_idx", (K,)) if not scheme.is_ordered else None
    return _with_zeros(group, codes, _shaped(read, "scales", (G, N)).T, zeros.T, of)


def _pack_quantized(scheme: Scheme, read: Read, N: int, K: int) -> Codes:
    bits, group = int(scheme.kind[1:]), scheme.group or K
    codes = _unpacked(_shaped(read, "weight_packed", (N, K // (32 // bits))), bits)
    scale = _scales(read, "weight_scale", N, K // group)
    return _with_zeros(group, codes, scale, torch.full_like(scale, 1 << (bits - 1)))


def _int_quantized(scheme: Scheme, read: Read, N: int, K: int) -> Codes:
    group = scheme.group or K
    codes = _shaped(read, "weight", (N, K)).to(torch.int16) + 128
    scale = _scales(read, "weight_scale", N, K // group)
    return _with_zeros(group, codes, scale, torch.full_like(scale, 128))


def _float_quantized(scheme: Scheme, read: Read, N: int, K: int) -> Codes:
    group = scheme.group or K
    scale = _scales(read, "weight_scale", N, K // group)
    return Codes(group, _floats8(read, N, K), scale.float().contiguous(), None)


def _fp8(scheme: Scheme, read: Read, N: int, K: int) -> Codes:
    if scheme.group is None:
        return Codes(K, _floats8(read, N, K), _scales(read, "weight_scale", N, 1).float().contiguous(), None)
    size = scheme.group
    scale = _shaped(read, "weight_scale_inv", (ceil_div(N, size), ceil_div(K, size))).float()
    return Codes(size, _floats8(read, N, K), scale.repeat_interleave(size, dim=0)[:N].contiguous(), None)


LAYOUTS: Mapping[str, Callable[[Scheme, Read, int, int], Codes]] = {
    "awq": _awq,
    "gptq": _gptq,
    "pack-quantized": _pack_quantized,
    "int-quantized": _int_quantized,
    "float-quantized": _float_quantized,
    "fp8": _fp8,
}


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Return the codes in integers of 32 bits, lowest first: (..., n) -> (..., n * 32 / bits) int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (packed.to(torch.int32)[..., None] >> shifts & ((1 << bits) - 1)).flatten(-2)


def _with_zeros(group: int, codes: Tensor, scale: Tensor, zero: Tensor, group_of: Tensor | None = None) -> Codes:
    """Return codes with offsets for zero points: (code - zero) * scale. Exact for scales of 16 bits."""
    wide = scale.double()
    offset = (-zero.double() * wide).float()
    return Codes(group, codes.to(torch.uint8).contiguous(), scale.float().contiguous(), offset.contiguous(), group_of)


def _floats8(read: Read, N: int, K: int) -> Tensor:
    weight = _shaped(read, "weight", (N, K))
    if weight.dtype is not torch.float8_e4m3fn:
        raise ConfigError(f"weight is {str(weight.dtype).removeprefix('torch.')}, not float8_e4m3fn")
    return weight.view(torch.uint8)


def _scales(read: Read, name: str, N: int, G: int) -> Tensor:
    """Return a scale per row and group from one for each, one per row, or one for all."""
    scale = read(name)
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(N, G)
    if scale.numel() != N * G:
        raise ConfigError(f"{name} has shape {list(scale.shape)}, not {[N, G]}")
    return scale.reshape(N, G)


def _shaped(read: Read, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = read(name)
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"{name} has shape {list(tensor.shape)}, not {list(shape)}")
    return tensor
