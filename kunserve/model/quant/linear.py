"""The matrix of a linear layer as a value: parts of rows, each stored in a format of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kunserve.model.quant.blocks import Blocks
from kunserve.model.quant.dequantize import dequantize
from kunserve.model.quant.plane_codes import dense
from kunserve.model.quant.planes import Planes


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows of a matrix that are stored alike. R rows, K columns."""

    data: Tensor  # (R, K) numbers; of blocks (R, bytes of a row) uint8
    blocks: Blocks | None = None
    scales: Tensor | None = None  # (R, numbers of a row) of planes

    @property
    def num_rows(self) -> int:
        """Return R, the number of its rows."""
        return self.data.shape[0]

    @property
    def num_columns(self) -> int:
        """Return K, the numbers in a row."""
        width = self.data.shape[1]
        return width if self.blocks is None else width // self.blocks.num_bytes * self.blocks.num_values

    def dense(self) -> Tensor:
        """Return the rows as numbers: (R, K); a view where that is what is stored, else float32."""
        if isinstance(self.blocks, Planes):
            assert self.scales is not None
            return dense(self.data, self.scales, self.blocks)
        return self.data if self.blocks is None else dequantize(self.data, self.blocks)

    def rows(self, indices: Tensor) -> StoredRows:
        """Return a copy of some rows."""
        scales = None if self.scales is None else self.scales.index_select(0, indices)
        return StoredRows(self.data.index_select(0, indices), self.blocks, scales)


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix (N, K): what `Ops.linear` multiplies with and `Ops.embed` takes rows of."""

    parts: tuple[StoredRows, ...]  # their rows one after the other: N together
    shape: tuple[int, int] = field(init=False, compare=False)  # (N, K); kept, as each product asks for it

    def __post_init__(self) -> None:
        """Add up the parts."""
        shape = sum(part.num_rows for part in self.parts), self.parts[0].num_columns
        object.__setattr__(self, "shape", shape)

    @classmethod
    def of(cls, weight: Tensor) -> Linear:
        """Return the matrix that a tensor (N, K) of numbers is."""
        return cls((StoredRows(weight),))

    def part(self, first: int, last: int) -> Linear:
        """Return its rows `[first, last)`, at least one: views of what is stored."""
        parts, begin = [], 0
        for part in self.parts:
            rows = slice(max(first - begin, 0), min(last - begin, part.num_rows))
            if rows.start < rows.stop:
                scales = None if part.scales is None else part.scales[rows]
                parts.append(StoredRows(part.data[rows], part.blocks, scales))
            begin += part.num_rows
        return Linear(tuple(parts))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix as numbers: (N, K); a view where that is what is stored."""
        rows = [part.dense().to(dtype) for part in self.parts]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def rows(self, indices: Tensor) -> Tensor:
        """Return some rows as numbers: (R,) -> (R, K); of blocks float32. The matrix must be in one part."""
        (part,) = self.parts
        return part.rows(indices).dense()
