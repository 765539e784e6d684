"""The reference for matrices in blocks: what each stands for, in float32. The formats and their decoders are ggml's."""

from __future__ import annotations

import torch
from torch import Tensor

from kunserve.model.quant.blocks import OUR_BLOCKS, Blocks

_NUMBERS = {"F16": torch.float16, "BF16": torch.bfloat16}


def dequantize(data: Tensor, blocks: Blocks) -> Tensor:
    """Return the numbers that rows of blocks stand for: (R, bytes of a row) uint8 -> (R, K) float32, on its device."""
    if dtype := _NUMBERS.get(blocks.name):
        return data.view(dtype).float()
    if blocks.name in OUR_BLOCKS:
        return _dequantize_ours(data, blocks)
    import gguf  # slow to import, and needed by few

    values = gguf.quants.dequantize(data.cpu().numpy(), gguf.GGMLQuantizationType[blocks.name])
    return torch.from_numpy(values).to(data.device)


def _dequantize_ours(data: Tensor, blocks: Blocks) -> Tensor:
    of_row = data.view(len(data), -1, blocks.num_bytes)
    kind = blocks.name.partition("_")[0]
    header = 4 if kind == "F8" else 8
    numbers = of_row[..., :header].contiguous().view(torch.float32)
    scale, offset = numbers[..., :1], numbers[..., 1:]
    codes = of_row[..., header:].contiguous()
    values: Tensor
    match kind:
        case "F8":
            values = codes.view(torch.float8_e4m3fn).float() * scale
        case "A8":
            values = affine(codes, scale, offset)
        case _:
            halves = codes.view(*codes.shape[:2], -1, 16)
            values = affine(torch.cat([halves & 15, halves >> 4], dim=-1).flatten(2), scale, offset)
    return values.flatten(1)


def affine(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return code * scale + offset, rounded once: the product of a byte and a float32 is exact in float64."""
    return (codes.double() * scale.double() + offset.double()).float()
