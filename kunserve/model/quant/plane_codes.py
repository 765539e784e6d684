"""Codes with their scales -> planes, and back; ggml's blocks -> codes with their scales."""

from __future__ import annotations

import torch
from torch import Tensor

from kunserve.errors import ConfigError
from kunserve.model.quant.blocks import Blocks
from kunserve.model.quant.dequantize import affine
from kunserve.model.quant.planes import Planes

Numbers = tuple[Tensor, Tensor, Tensor | None]  # codes (N, K) uint8; scale and offset (N, G) float32


def codes_plane(codes: Tensor, planes: Planes) -> Tensor:
    """Return codes (N, K) uint8 as they are stored: (N, bytes of a row) uint8."""
    if planes.kind != "A4":
        return codes
    halves = codes.view(len(codes), -1, 2, planes.step // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def scales_plane(scale: Tensor, offset: Tensor | None, planes: Planes) -> Tensor:
    """Return scales (N, G) with their offsets behind them as they are stored: (N, G or 2 * G).

    ConfigError if they are beyond what the planes' numbers hold.
    """
    wide = scale if offset is None else torch.stack([scale, offset], dim=-1).flatten(1)
    kept = wide.to(getattr(torch, planes.scale_dtype))
    if not torch.equal(kept.float(), wide):
        raise ConfigError(f"has scales that {planes.scale_dtype} does not hold")
    return kept


def dense(data: Tensor, scales: Tensor, planes: Planes) -> Tensor:
    """Return what rows of planes stand for: (N, bytes), (N, numbers) -> (N, K) float32, on their device."""
    numbers = scales.float()
    if planes.kind == "F8":
        values = data.view(torch.float8_e4m3fn).float()
        return values * _spread(numbers, planes, values.shape[1])
    codes = data
    if planes.kind == "A4":
        halves = data.view(len(data), -1, planes.step // 2)
        codes = torch.stack([halves & 15, halves >> 4], dim=2).flatten(1)
    pairs, K = numbers.view(len(numbers), -1, 2), codes.shape[1]
    return affine(codes, _spread(pairs[..., 0], planes, K), _spread(pairs[..., 1], planes, K))


def _spread(numbers: Tensor, planes: Planes, num_columns: int) -> Tensor:
    """Return a number of each group for each of its columns: (N, G) -> (N, K)."""
    return numbers.repeat_interleave(planes.group or num_columns, dim=1)[:, :num_columns]


def numbers_of(rows: Tensor, blocks: Blocks) -> Numbers:
    """Take rows of ggml's blocks apart: (N, bytes of a row) uint8 -> codes and their scales. See planes.OF_GGML."""
    of_row = rows.view(len(rows), -1, blocks.num_bytes)
    if blocks.name == "Q4_K":
        return _of_super_blocks(of_row)
    num_scales = 2 if blocks.name.endswith("_1") else 1
    scales = of_row[..., : 2 * num_scales].contiguous().view(torch.float16).float()
    scale, rest = scales[..., 0], of_row[..., 2 * num_scales :]
    if blocks.name == "Q8_0":
        return (rest ^ 128).flatten(1), scale, -128 * scale
    codes = torch.cat([rest[..., -16:] & 15, rest[..., -16:] >> 4], dim=-1)
    zero = 8
    if blocks.name.startswith("Q5"):
        shifts = torch.arange(8, dtype=torch.uint8)
        codes = codes | (rest[..., :4, None] >> shifts & 1).flatten(2) << 4
        zero = 16
    return codes.flatten(1), scale, scales[..., 1] if num_scales == 2 else -zero * scale


def _of_super_blocks(of_row: Tensor) -> Numbers:
    """Read the scales of 256 values in eight groups: two of 16 bits, then each group's, of 6 bits, in 12 bytes."""
    both = of_row[..., :4].contiguous().view(torch.float16).float()
    a, b, c = of_row[..., 4:8], of_row[..., 8:12], of_row[..., 12:16]
    scale = torch.cat([a & 63, (c & 15) | (a >> 6) << 4], dim=-1) * both[..., :1]
    offset = torch.cat([b & 63, c >> 4 | (b >> 6) << 4], dim=-1) * -both[..., 1:]
    low = of_row[..., -128:].reshape(*of_row.shape[:2], 4, 1, 32)
    codes = torch.cat([low & 15, low >> 4], dim=-2).flatten(-3, -2)  # (N, blocks, 8, 32)
    return codes.flatten(1), scale.flatten(1), offset.flatten(1)
