"""Copies of KV blocks: what is copied, for the `copy` of devices, and how where both ends can be reached directly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kunserve.errors import DeviceError


def bits_of(kv: Tensor) -> Tensor:
    """Return KV of 8 bits as bytes in the same memory, other KV as it is: few kernels know floats of 8 bits."""
    return kv.view(torch.uint8) if kv.dtype.itemsize == 1 else kv


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Blocks of one layer: `destination[destination_ids] = source[source_ids]`; no block is in both.

    source, destination: (num_blocks, ...) of the same block shape and dtype, on a device or in host memory.
    """

    source: Tensor
    source_ids: Sequence[int]
    destination: Tensor
    destination_ids: Sequence[int]

    def gather(self) -> Tensor:
        """Return the blocks one after the other: (B, ...) where the source is, as `bits_of` sees them.

        Where they are all of the source, that is it: pinned host memory stays what a GPU copies from.
        """
        source, ids = bits_of(self.source), self.source_ids
        return source if _are_all(ids, source) else source.index_select(0, torch.tensor(ids, device=source.device))

    def scatter(self, blocks: Tensor) -> None:
        """Put blocks (B, ...), as gathered, where they belong. Only named blocks are touched."""
        destination, ids = bits_of(self.destination), self.destination_ids
        if _are_all(ids, destination):
            destination.copy_(blocks)
        else:
            on_device = torch.tensor(ids, device=destination.device)
            destination.index_copy_(0, on_device, blocks.to(destination.device))


def _are_all(ids: Sequence[int], blocks: Tensor) -> bool:
    """Return whether ids name all blocks in their order, as those of what is made for a copy do."""
    return isinstance(ids, range) and ids == range(len(blocks))


def copy_blocks(copies: Iterable[BlockCopy]) -> None:
    """Copy from wherever to wherever this thread can reach. Blocking; run it on a copy queue."""
    for copy in copies:
        copy.scatter(copy.gather())


def layer_copies(
    source: Sequence[Tensor], read: Sequence[int], target: Sequence[Tensor], write: Sequence[int], layers: Iterable[int]
) -> list[BlockCopy]:
    """Copy the same blocks of several layers; source and target: KV of all layers of a device."""
    return [BlockCopy(source[layer], read, target[layer], write) for layer in layers]


def host_blocks(num_blocks: int, kv: Tensor) -> Tensor:
    """Make room in host memory for blocks of `kv` (N, ...): (num_blocks, ...), pinned if a GPU will copy them.

    DeviceError if the system has none: torch says RuntimeError, as for so much else.
    """
    try:
        return torch.empty(num_blocks, *kv.shape[1:], dtype=kv.dtype, pin_memory=kv.is_cuda)
    except RuntimeError as error:
        raise DeviceError(f"no host memory for {num_blocks} blocks of KV: {error}") from error
