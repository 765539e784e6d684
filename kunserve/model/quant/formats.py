"""In which blocks the matrices of a model are stored, and how its checkpoint is quantized."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kunserve.model.quant.blocks import Blocks
from kunserve.model.quant.planes import planes_of
from kunserve.model.quant.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Formats:
    """The blocks that matrices are stored in, by the tensors' names; all others are numbers of the model's dtype."""

    by_name: dict[str, Blocks] = field(default_factory=dict, hash=False)
    scheme: Scheme | None = None  # of the checkpoint that they are read from, if it is quantized
    quantized: frozenset[str] = frozenset()  # what of it is, by name; some may be kept as numbers

    def of(self, name: str) -> Blocks | None:
        """Return the blocks of a tensor, or None if it is stored as numbers."""
        return self.by_name.get(name)

    def as_numbers(self) -> Formats:
        """Return the same checkpoint, kept as numbers."""
        return replace(self, by_name={})

    def as_planes(self) -> Formats:
        """Return the same checkpoint as GPUs keep it: in planes, and as numbers where there are none. Experts are."""
        group = None if self.scheme is None else self.scheme.group
        matrices = {name: blocks for name, blocks in self.by_name.items() if ".experts." not in name}
        planes = {name: planes_of(blocks, group) for name, blocks in matrices.items()}
        return replace(self, by_name={name: kept for name, kept in planes.items() if kept is not None})


NO_BLOCKS = Formats()
