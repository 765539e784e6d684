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
Find = Callable[[str], Tensor | None]  # a tensor of the matrix by its ending ("qweight"); None: there is none
Dtypes = tuple[torch.dtype, ...]
WORDS, BYTES, FLOATS8 = (torch.int32,), (torch.int8,), (torch.float8_e4m3fn,)
SCALES = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e8m0fnu)
OTHER = "fetch the model again, or take another checkpoint of it"  # what to do about tensors that are not right
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
    """Quantize a matrix (N, K) of float32 to e4m3, with a scale for each row that makes its largest number 448.

    ConfigError if it holds an infinity or what is no number: kernels would take its code for 480.
    """
    scale = numbers.abs().amax(dim=1, keepdim=True) / HIGHEST_E4M3
    if not scale.isfinite().all():
        raise ConfigError(f"holds NaN or infinity, which cannot be quantized: {OTHER}")
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


def take(scheme: Scheme, find: Find, shape: tuple[int, ...]) -> Packed:
    """Read one matrix (N, K), or those of all experts (E, N, K), whose rows stand as in the checkpoint.

    ConfigError, which names what, if a tensor of it is missing, has another shape or dtype than it must have, or holds
    what stands for no number.
    """
    return LAYOUTS[scheme.layout](scheme, find, *shape)


def _awq(scheme: Scheme, find: Find, N: int, K: int) -> Codes:
    group, columns = scheme.group or K, _words("qweight", N, 8)
    G = ceil_div(K, group)
    codes = _unpacked(_shaped(find, "qweight", (K, columns), WORDS), 4).view(K, -1, 8)[..., AWQ_ORDER].reshape(K, N)
    zeros = _unpacked(_shaped(find, "qzeros", (G, columns), WORDS), 4).view(G, -1, 8)[..., AWQ_ORDER].reshape(G, N)
    return _with_zeros(group, codes.T, _finite("scales", _shaped(find, "scales", (G, N), SCALES)).T, zeros.T)


def _gptq(scheme: Scheme, find: Find, N: int, K: int) -> Codes:
    bits = int(scheme.kind[1:])
    per, group = 32 // bits, scheme.group or K
    G = ceil_div(K, group)
    packed = _shaped(find, "qweight", (_words("qweight", K, per), N), WORDS)
    codes = _unpacked(packed.T.contiguous(), bits)
    zeros = _unpacked(_shaped(find, "qzeros", (G, _words("qzeros", N, per)), WORDS), bits) + scheme.zero_shift
    scale = _finite("scales", _shaped(find, "scales", (G, N), SCALES))
    return _with_zeros(group, codes, scale.T, zeros.T, _group_of(scheme, find, K, group))


def _group_of(scheme: Scheme, find: Find, K: int, group: int, name: str = "g_idx") -> Tensor | None:
    """Return the group of each column (GPTQ's act-order); None where they are in order.

    A config may not say that they are in another, but whether a matrix can be kept in blocks was judged by it.
    """
    if scheme.is_ordered and find(name) is None:
        return None
    found, G = _shaped(find, name, (K,), (torch.int32, torch.int64)), ceil_div(K, group)
    if bad := found[(found < 0) | (found >= G)].tolist():
        raise ConfigError(f"{name} holds {bad[0]}, which is none of the {G} groups: {OTHER}")
    if not scheme.is_ordered:
        return found
    if not torch.equal(found.long(), torch.arange(K) // group):
        field = "desc_act" if name == "g_idx" else "actorder"
        way = "say so in the quantization_config of config.json"
        raise ConfigError(f"{name} has the columns in another order (act-order), which {field} does not say: {way}")
    return None


def _pack_quantized(scheme: Scheme, find: Find, N: int, K: int) -> Codes:
    bits, group = int(scheme.kind[1:]), scheme.group or K
    per, G = 32 // bits, ceil_div(K, group)
    codes = _unpacked(_shaped(find, "weight_packed", (N, ceil_div(K, per)), WORDS), bits)[:, :K]
    scale = _scales(find, "weight_scale", N, G)
    zeros = torch.full_like(scale, 1 << (bits - 1))
    if scheme.has_zeros:
        packed = _shaped(find, "weight_zero_point", (ceil_div(N, per), G), WORDS)
        zeros = _unpacked(packed.T.contiguous(), bits)[:, :N].T
    return _with_zeros(group, codes, scale, zeros, _group_of(scheme, find, K, group, "weight_g_idx"))


def _int_quantized(scheme: Scheme, find: Find, N: int, K: int) -> Codes:
    group = scheme.group or K
    codes = _shaped(find, "weight", (N, K), BYTES).to(torch.int16) + 128
    scale = _scales(find, "weight_scale", N, G := ceil_div(K, group))
    zeros = torch.full_like(scale, 128)
    if scheme.has_zeros:
        zeros = _shaped(find, "weight_zero_point", (N, G), BYTES).to(torch.int16) + 128
    return _with_zeros(group, codes, scale, zeros, _group_of(scheme, find, K, group, "weight_g_idx"))


def _float_quantized(scheme: Scheme, find: Find, N: int, K: int) -> Codes:
    group = scheme.group or K
    scale = _scales(find, "weight_scale", ceil_div(N, scheme.scale_rows), ceil_div(K, group))
    return Codes(group, _floats8(find, N, K), _of_rows(scheme, scale, N), None)


def _fp8(scheme: Scheme, find: Find, N: int, K: int) -> Codes:
    if scheme.group is None:
        return Codes(K, _floats8(find, N, K), _scales(find, "weight_scale", N, 1).contiguous(), None)
    size, name = scheme.group, "weight_scale_inv"
    scale = _finite(name, _shaped(find, name, (ceil_div(N, size), ceil_div(K, size)), SCALES))
    return Codes(size, _floats8(find, N, K), _of_rows(scheme, scale, N), None)


def _of_rows(scheme: Scheme, scale: Tensor, N: int) -> Tensor:
    """Return the scales of each of N rows."""
    return scale.repeat_interleave(scheme.scale_rows, dim=0)[:N].contiguous()


def _mxfp4(scheme: Scheme, find: Find, *shape: int) -> Mxfp4:
    *rows, K = shape
    if K % 32:
        raise ConfigError(f"_blocks has {K} columns, which are no whole groups of 32: {OTHER}")
    pairs = _shaped(find, "_blocks", (*rows, K // 32, 16), (torch.uint8,))
    scales = _shaped(find, "_scales", (*rows, K // 32), (torch.uint8,))
    if scales.numel() and scales.max() == 255:
        raise ConfigError(f"_scales holds 255, which stands for no number: {OTHER}")
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


def _floats8(find: Find, N: int, K: int) -> Tensor:
    codes = _shaped(find, "weight", (N, K), FLOATS8).view(torch.uint8)
    if codes.numel() and (codes & 0x7F).amax() == 0x7F:
        raise ConfigError(f"weight holds NaN, which stands for no number: {OTHER}")
    return codes


def _scales(find: Find, name: str, N: int, G: int) -> Tensor:
    """Return a scale per row and group, in float32, from one for each, one per row, or one for all."""
    scale = _finite(name, _of_dtype(name, _present(find, name), SCALES))
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(N, G)
    if tuple(scale.shape) != (N, G) and (G > 1 or tuple(scale.shape) != (N,)):
        raise ConfigError(f"{name} has shape {list(scale.shape)}, not {[N, G]}: {OTHER}")
    return scale.reshape(N, G)


def _finite(name: str, scale: Tensor) -> Tensor:
    """Return scales in float32. ConfigError if one of them is no number."""
    wide = scale.float()
    if not wide.isfinite().all():
        raise ConfigError(f"{name} holds NaN or infinity: {OTHER}")
    return wide


def _words(name: str, num_codes: int, per: int) -> int:
    """Return how many integers hold so many codes. ConfigError if they are no whole ones."""
    if num_codes % per:
        raise ConfigError(f"{name} has {per} codes in each integer, and {num_codes} are no whole integers: {OTHER}")
    return num_codes // per


def _shaped(find: Find, name: str, shape: tuple[int, ...], dtypes: Dtypes) -> Tensor:
    tensor = _present(find, name)
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"{name} has shape {list(tensor.shape)}, not {list(shape)}: {OTHER}")
    return _of_dtype(name, tensor, dtypes)


def _of_dtype(name: str, tensor: Tensor, dtypes: Dtypes) -> Tensor:
    if tensor.dtype not in dtypes:
        found, *known = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *dtypes))
        raise ConfigError(f"{name} is {found}, not {' or '.join(known)}: {OTHER}")
    return tensor


def _present(find: Find, name: str) -> Tensor:
    if (tensor := find(name)) is None:
        raise ConfigError(f"{name} is missing: {OTHER}")
    return tensor
