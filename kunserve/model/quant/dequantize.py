"""The reference for matrices in blocks: what each stands for, in float32. The formats and their decoders are ggml's."""

from __future__ import annotations

import torch
from torch import Tensor

from kunserve.model.quant.blocks import Blocks

_NUMBERS = {"F16": torch.float16, "BF16": torch.bfloat16}


def dequantize(data: Tensor, blocks: Blocks) -> Tensor:
    """Return the numbers that rows of blocks stand for: (R, bytes of a row) uint8 -> (R, K) float32, on its device."""
    if dtype := _NUMBERS.get(blocks.name):
        return data.view(dtype).float()
    import gguf  # slow to import, and needed by few

    values = gguf.quants.dequantize(data.cpu().numpy(), gguf.GGMLQuantizationType[blocks.name])
    return torch.from_numpy(values).to(data.device)
