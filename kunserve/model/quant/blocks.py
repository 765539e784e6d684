"""How a matrix is stored: as numbers of a dtype, or in blocks, each of so many values of a row in so many bytes."""

from __future__ import annotations

from dataclasses import dataclass

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int32": 4}  # of a number


@dataclass(frozen=True, slots=True)
class Blocks:
    """A format of blocks, which follow each other along a row; a block's scales lie in it, so that rows can be cut."""

    name: str
    num_values: int
    num_bytes: int


# ggml's formats, by its names: (values, bytes) of a block. All are codes with scale and offset per 16 or 32 values,
# but for MXFP4: its 16 codes are floats, which lie unevenly: no scale and offset make them of whole numbers below 16.
GGML_BLOCKS = {
    name: Blocks(name, num_values, num_bytes)
    for name, num_values, num_bytes in [
        *[("F16", 32, 64), ("BF16", 32, 64)],  # numbers: in "blocks", so that they are widened on the way
        *[("Q8_0", 32, 34), ("Q4_0", 32, 18), ("Q4_1", 32, 20), ("Q5_0", 32, 22), ("Q5_1", 32, 24)],
        *[("Q4_K", 256, 144), ("Q5_K", 256, 176), ("Q6_K", 256, 210)],
        ("MXFP4", 32, 17),
    ]
}


GROUPS = (128, 64, 32)  # values of a block of ours: as many as a checkpoint's groups allow, so that scales take little
# Ours, for what other checkpoints hold. Before the codes of a block stand its scale and, but for F8, its offset, both
# float32: A4 and A8 have unsigned codes of 4 bits (as in Q4_0: the first 16 of 32 are the low halves) and 8; F8's are
# floats of 8 bits (e4m3).
OUR_BLOCKS = {
    f"{kind}_{size}": Blocks(f"{kind}_{size}", size, header + size * bits // 8)
    for kind, header, bits in [("A4", 8, 4), ("A8", 8, 8), ("F8", 4, 8)]
    for size in GROUPS
}
BLOCKS = GGML_BLOCKS | OUR_BLOCKS
