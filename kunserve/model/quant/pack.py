"""Matrices of quantized checkpoints, as published, -> blocks: codes, and a scale and an offset per group, or MXFP4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kunserve.errors import ConfigError
from kunserve.model.quant.blocks import Blocks
from kunserve.model.quant.dequantize import affine
from kunserve.model.quant.scheme import Scheme
from kunserve.sizes import ceil_div

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # of the eight codes in 32 bits, where each column's is
Read = Callable[[str], Tensor]  # a tensor of the matrix by its ending: "qweight"
PAIRS_OF_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # and their negatives: both codes of each byte
PAIRS_OF_E2M1 = torch.cat([PAIRS_OF_E2M1, -PAIRS_OF_E2M1])[torch.arange(256)[:, None] >> torch.tensor([0, 4]) & 15]


class Packed(Protocol):
    """A matrix (..., N, K) as a checkpoint has it."""

    def blocks(self, blocks: Blocks) -> Tensor:
        """Return rows of blocks: (..., N, bytes of a row) uint8."""

    def numbers(self) -> Tensor:
        """Return what it stands for: (..., N, K) float32."""


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


HIGHEST_E4M3 = 448.0


def fp8_of(numbers: Tensor) -> Codes:
    """Quantize a matrix (N, K) of float32 to e4m3, with a scale for each row that makes its largest number 448."""
    scale = numbers.abs().amax(dim=1, keepdim=True) / HIGHEST_E4M3
    scale = torch.where(scale > 0, scale, 1.0)
    codes = (numbers / scale).clamp(-HIGHEST_E4M3, HIGHEST_E4M3).to(torch.float8_e4m3fn)
    return Codes(numbers.shape[1], codes.view(torch.uint8), scale, None)


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """Matrices (..., N, K) of floats of 4 bits (e2m1), of which 32 columns share a power of two (e8m0)."""

    pairs: Tensor  # (..., N, K / 32, 16) uint8: of two columns that follow each other, the first in the low half
    scales: Tensor  # (..., N, K / 32) uint8: exponents, from 127

    def blocks(self, blocks: Blocks) -> Tensor:
        """Return rows of ggml's blocks, in which the first 16 columns of 32 are the low halves."""
        first, second = self.pairs[..., :8], self.pairs[..., 8:]
        columns = torch.stack([first & 15 | second << 4, first >> 4 | second & 0xF0], dim=-1)
        return torch.cat([self.scales[..., None], columns.flatten(-2)], dim=-1).flatten(-2)

    def numbers(self) -> Tensor:
        """Return what they stand for."""
        exponents = self.scales.to(torch.int32)
        scale = torch.where(exponents > 0, exponents << 23, 1 << 22).view(torch.float32)  # the least is subnormal
        return (PAIRS_OF_E2M1[self.pairs.to(torch.int32)].flatten(-2) * scale[..., None]).flatten(-2)


def take(scheme: Scheme, read: Read, shape: tuple[int, ...]) -> Packed:
    """Read one matrix (N, K), or those of all experts (E, N, K), whose rows stand as in the checkpoint.

    ConfigError, which names what, if a tensor of it has another shape or dtype than it must have.
    """
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


def _mxfp4(scheme: Scheme, read: Read, *shape: int) -> Mxfp4:
    *rows, K = shape
    if K % 32:
        raise ConfigError(f"_blocks has {K} columns, which are no whole groups of 32")
    pairs, scales = _shaped(read, "_blocks", (*rows, K // 32, 16)), _shaped(read, "_scales", (*rows, K // 32))
    for ending, tensor in (("_blocks", pairs), ("_scales", scales)):
        if tensor.dtype is not torch.uint8:
            raise ConfigError(f"{ending} is {str(tensor.dtype).removeprefix('torch.')}, not uint8")
    if scales.numel() and scales.max() == 255:
        raise ConfigError("_scales holds 255, which stands for no number: the file is damaged")
    return Mxfp4(pairs, scales)


LAYOUTS: Mapping[str, Callable[..., Packed]] = {
    "awq": _awq,
    "gptq": _gptq,
    "pack-quantized": _pack_quantized,
    "int-quantized": _int_quantized,
    "float-quantized": _float_quantized,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
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
