"""Random matrices in blocks of every format."""

from __future__ import annotations

import torch
from op_layers import randn

from kunserve.model.quant.blocks import BLOCKS, OUR_BLOCKS
from kunserve.model.quant.linear import StoredRows


def random_part(name: str, N: int, K: int, seed: int = 0) -> StoredRows:
    """Rows whose codes are any bits, and whose scales are small numbers."""
    blocks = BLOCKS[name]
    count = K // blocks.num_values
    made = torch.randint(256, (N, count, blocks.num_bytes), generator=torch.Generator().manual_seed(seed)).byte()
    scales = (randn(N, count, 2, seed=seed + 1) * 0.02).half().view(torch.uint8).view(N, count, 4)
    match name:
        case _ if name in OUR_BLOCKS:
            numbers = (randn(N, count, 2, seed=seed + 1) * 0.02).view(torch.uint8)
            header = 4 if name.startswith("F8") else 8
            made[..., header:][made[..., header:] & 127 == 127] -= 1  # NaN of e4m3
            made[..., :header] = numbers[..., :header]
        case "F16":
            return StoredRows(randn(N, K, seed=seed).half().view(torch.uint8), blocks)
        case "BF16":
            return StoredRows(randn(N, K, seed=seed).bfloat16().view(torch.uint8), blocks)
        case "MXFP4":
            made[..., 0] = made[..., 0] % 8 + 116
        case "Q6_K":
            made[..., 208:] = scales[..., :2]
        case "Q4_0" | "Q5_0" | "Q8_0":
            made[..., :2] = scales[..., :2]
        case _:
            made[..., :4] = scales
    return StoredRows(made.view(N, -1), blocks)
