"""The weights of one device: one range per unit, present or dropped as a whole. Addresses survive drop and restore."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from math import prod

import torch
from torch import Tensor

from kunserve.gpu.chunk_pool import ChunkPool, ChunkUse
from kunserve.gpu.device import Device
from kunserve.gpu.range import Range
from kunserve.model.checkpoint import WeightSource
from kunserve.model.layout import TensorSpec, WeightUnit
from kunserve.model.quant.linear import Linear, StoredRows
from kunserve.model.quant.planes import SCALES, Planes
from kunserve.sizes import ceil_div


class Weights:
    """Ranges for every unit of the model on one device, mapped only where present."""

    def __init__(self, device: Device, pool: ChunkPool, units: Iterable[WeightUnit]) -> None:
        self._units = {unit.name: unit for unit in units}
        self._chunk_bytes = device.chunk_bytes
        self._filled: set[str] = set()  # units that are present and whose content is there
        self._ranges = {name: Range(device, pool, ChunkUse.WEIGHTS, self.num_chunks(name)) for name in self._units}

    def num_chunks(self, unit: str) -> int:
        """Return the chunks that a unit takes when present."""
        return ceil_div(self._units[unit].num_bytes, self._chunk_bytes)

    def specs(self, unit: str) -> Sequence[TensorSpec]:
        """Return what a unit's tensors are, in order."""
        return self._units[unit].tensors

    def num_tensor_bytes(self, unit: str) -> int:
        """Return the bytes of a unit's tensors, without what lies between them."""
        return sum(spec.num_bytes for spec in self.specs(unit))

    @property
    def chunks_of_unit(self) -> dict[str, int]:
        """Return the chunks of every unit of the model, present or not, in the order of a forward pass."""
        return {unit: self.num_chunks(unit) for unit in self._units}

    @property
    def present(self) -> list[str]:
        """Return the names of the units whose chunks are mapped, in the order of a forward pass."""
        return [name for name, range_ in self._ranges.items() if range_.chunks]

    @property
    def unfilled(self) -> list[str]:
        """Return the names of the units that are present and whose content is not, in the order of a forward pass."""
        return [name for name in self.present if name not in self._filled]

    def is_filled(self, unit: str) -> bool:
        """Tell whether a unit is present with its content, so that it may be read and copied."""
        return unit in self._filled

    @property
    def mapped_chunks(self) -> list[int]:
        """Return all chunks that weights own here."""
        return [chunk for range_ in self._ranges.values() for chunk in range_.chunks]

    def tensor(self, unit: str, name: str, num_rows: int | None = None) -> Tensor:
        """View a tensor of a unit, as stored; with `num_rows`, the matrix that begins with it."""
        spec = self._spec(unit, name)
        shape = spec.stored_shape if num_rows is None else (num_rows, *spec.stored_shape[1:])
        dtype: torch.dtype = getattr(torch, spec.dtype)
        num_bytes = prod(shape) * dtype.itemsize
        return self._ranges[unit].tensor[spec.offset : spec.offset + num_bytes].view(dtype).view(shape)

    def linear(self, unit: str, *names: str) -> Linear:
        """View the matrix that tensors of a unit are together, in as few parts as they are stored in."""
        specs = [self._spec(unit, name) for name in names]
        parts = []
        for first, spec in enumerate(specs):
            if first and spec.is_stored_like(specs[first - 1]):
                continue  # it is in the part before
            num_rows = sum(other.shape[0] for other in takewhile(spec.is_stored_like, specs[first:]))
            has_scales = isinstance(spec.blocks, Planes)
            scales = self.tensor(unit, spec.name + SCALES, num_rows) if has_scales else None
            parts.append(StoredRows(self.tensor(unit, spec.name, num_rows), spec.blocks, scales))
        return Linear(tuple(parts))

    def _spec(self, unit: str, name: str) -> TensorSpec:
        return next(spec for spec in self.specs(unit) if spec.name == name)

    def content(self, unit: str) -> Tensor:
        """View all bytes of a unit: flat uint8, the same on every device."""
        return self._ranges[unit].tensor[: self._units[unit].num_bytes]

    def map(self, unit: str) -> None:
        """Give a unit its chunks; their content is whatever was there, until it is filled."""
        self._ranges[unit].resize(self.num_chunks(unit))

    @contextmanager
    def filling(self, unit: str) -> Iterator[None]:
        """Let the content of a mapped unit arrive inside. It counts as filled when all of it is there, not before.

        Whoever leaves with an error leaves it unfilled: nobody may copy from it.
        """
        self._filled.discard(unit)
        yield
        self._filled.add(unit)

    def fill(self, unit: str, source: WeightSource) -> None:
        """Copy the unit's tensors from a source into its mapped chunks. Blocking: run it on a device queue.

        On a GPU they are there when the queue says so, which `filling` waits for.
        """
        for spec in self.specs(unit):
            source.copy_into(spec.name, self.tensor(unit, spec.name))

    def drop(self, unit: str) -> None:
        """Unmap a unit and free its chunks."""
        self._filled.discard(unit)
        self._ranges[unit].resize(0)
