"""Matrices as GPUs keep them: the codes of all rows in one tensor, their scales and offsets in another. Without torch.

A kernel reads both with whole, aligned accesses, and torch's product of 8-bit floats takes the codes as they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kunserve.model.quant.blocks import GROUPS, Blocks
from kunserve.sizes import ceil_div

KINDS = ("A4", "A8", "F8")  # codes of 4 bits and of 8, floats of 8
SCALES = ".scales"  # what the name of the other tensor ends with


@dataclass(frozen=True, slots=True)
class Planes(Blocks):
    """Codes of 4 bits, of 8, or floats of 8: `num_values` of a row in `num_bytes`. Scales are elsewhere.

    Of 4 bits, byte j of each `step` columns has the j-th in its low half and the one `step / 2` behind it in the other.
    A value is code * scale + offset; floats have no offset.
    """

    kind: str  # one of KINDS
    step: int  # columns that a kernel takes at a time: a divisor of the group, and of the matrix
    group: int | None  # columns that share a scale; None: all
    scale_dtype: str

    @classmethod
    def of(cls, kind: str, step: int, group: int | None, scale_dtype: str = "float32") -> Planes:
        """Return the planes of codes of a kind."""
        name = f"{kind} planes of {group or 'rows'}"
        return cls(name, 2 if kind == "A4" else 1, 1, kind, step, group, scale_dtype)

    @property
    def numbers_per_group(self) -> int:
        """Return how many numbers a group has beside it: its scale and, but for floats of 8 bits, its offset."""
        return 1 if self.kind == "F8" else 2

    def scales_shape(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Return the shape of the scales of a matrix: (rows, numbers of a row, group by group)."""
        return num_rows, ceil_div(num_columns, self.group or num_columns) * self.numbers_per_group


MIN_STEP_OF_BYTES = 64  # of codes of 8 bits whose scales have 32: with fewer columns at a time sm_100 needs a stack
# Of ggml's formats those that lose nothing and save something. Codes of 5 bits take 8; Q6_K has a scale for every 16.
OF_GGML = {
    **{name: Planes.of("A4", 32, 32, "float16") for name in ("Q4_0", "Q4_1")},
    **{name: Planes.of("A8", 32, 32, "float16") for name in ("Q5_0", "Q5_1", "Q8_0")},
    "Q4_K": Planes.of("A4", 32, 32),
}


def every_planes() -> Iterator[Planes]:
    """Yield all planes that a matrix may be kept in, but for how many columns of a step share a scale."""
    yield from dict.fromkeys(OF_GGML.values())
    for kind in KINDS:
        for size in GROUPS:
            if _is_kept(kind, size):
                yield Planes.of(kind, size, size)
                yield Planes.of(kind, size, None)


def planes_of(blocks: Blocks, group: int | None) -> Planes | None:
    """Return the planes that hold what blocks do; None if there are none. group: of a checkpoint that is ours to pack.

    Columns that share a scale may be more than those of a block; None: all columns.
    """
    kind, _, size = blocks.name.partition("_")
    if kind in KINDS and size.isdigit() and int(size) in GROUPS:
        return Planes.of(kind, int(size), group) if _is_kept(kind, int(size)) else None
    return OF_GGML.get(blocks.name)


def _is_kept(kind: str, size: int) -> bool:
    return kind == "A4" or size >= MIN_STEP_OF_BYTES
