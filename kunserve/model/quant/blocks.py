"""How a matrix is stored: as numbers of a dtype, or in blocks, each of so many values of a row in so many bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int32": 4}  # of a number


@dataclass(frozen=True, slots=True)
class Blocks:
    """A format of blocks, which follow each other along a row; a block's scales lie in it, so that rows can be cut."""

    name: str
    num_values: int
    num_bytes: int


BLOCKS: dict[str, Blocks] = {}


@dataclass(frozen=True, slots=True)
class Formats:
    """In which blocks matrices are stored, by the tensors' names; all others are numbers of the model's dtype."""

    by_name: dict[str, Blocks] = field(default_factory=dict, hash=False)

    def of(self, name: str) -> Blocks | None:
        """Return the blocks of a tensor, or None if it is stored as numbers."""
        return self.by_name.get(name)


NO_BLOCKS = Formats()
