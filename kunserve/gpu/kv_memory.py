"""KV memory of one device: one range per layer, so that kernels see one static tensor per layer whatever is mapped."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from math import prod

import torch
from torch import Tensor

from kunserve.gpu.chunk_pool import ChunkPool, ChunkUse
from kunserve.gpu.device import Device
from kunserve.gpu.range import Range
from kunserve.model.config import ModelConfig
from kunserve.sizes import ceil_div

RESERVED_BYTES = 8 << 40  # of addresses for one device's KV: a process has 128 TiB of them
E4M3 = torch.float8_e4m3fn  # of KV of 8 bits: 4 bits of exponent, 3 of mantissa, no infinity
MAX_E4M3 = 448.0


@dataclass(frozen=True, slots=True)
class KVShape:
    """One block of one layer: (2, num_kv_heads, block_size, head_dim) elements of `dtype`."""

    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: ModelConfig, block_size: int, dtype: torch.dtype) -> KVShape:
        """Return the shape that a model's blocks have."""
        return cls(config.num_kv_heads, block_size, config.head_dim, dtype)

    @property
    def block_shape(self) -> tuple[int, int, int, int]:
        """Return the dimensions of one block: (2 for keys and values, KV heads, slots, head_dim)."""
        return (2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Return the number of bytes of one block of one layer."""
        return prod(self.block_shape) * self.dtype.itemsize


def max_layer_chunks(num_layers: int, chunk_bytes: int) -> int:
    """Return the most KV chunks of a layer: what is reserved for all layers must leave addresses to other devices."""
    return max(1, RESERVED_BYTES // (num_layers * chunk_bytes))


class KVMemory:
    """KV ranges of all layers on one device; a layer that is not served here has nothing mapped."""

    def __init__(self, device: Device, pool: ChunkPool, num_layers: int, shape: KVShape) -> None:
        self.shape = shape
        self._chunk_bytes = device.chunk_bytes
        max_chunks = min(device.num_chunks, max_layer_chunks(num_layers, device.chunk_bytes))
        self._ranges = [Range(device, pool, ChunkUse.KV, max_chunks) for _ in range(num_layers)]
        blocks = self._ranges[0].num_bytes // shape.block_bytes
        self.layers: list[Tensor] = [  # (blocks that the range could hold, 2, num_kv_heads, block_size, head_dim)
            r.tensor[: blocks * shape.block_bytes].view(shape.dtype).view(blocks, *shape.block_shape)
            for r in self._ranges
        ]

    def num_chunks(self, layer: int) -> int:
        """Return the number of chunks mapped for a layer."""
        return len(self._ranges[layer].chunks)

    def num_blocks(self, layer: int) -> int:
        """Return the number of whole blocks that a layer's mapped chunks hold."""
        return self._ranges[layer].num_mapped_bytes // self.shape.block_bytes

    def blocks_in(self, num_chunks: int) -> int:
        """Return the number of whole blocks that a layer of `num_chunks` holds."""
        return num_chunks * self._chunk_bytes // self.shape.block_bytes

    def chunks_for(self, num_blocks: int) -> int:
        """Return the chunks that a layer needs for `num_blocks`."""
        return ceil_div(num_blocks * self.shape.block_bytes, self._chunk_bytes)

    @property
    def mapped_chunks(self) -> list[int]:
        """Return all chunks that KV owns here."""
        return [chunk for range_ in self._ranges for chunk in range_.chunks]

    @property
    def chunks_by_turn(self) -> list[list[int]]:
        """Return all chunks in the order in which blocks get to them, lowest ids first: one of each layer a turn."""
        turns = zip_longest(*(range_.chunks for range_ in self._ranges))  # a layer with fewer has None
        return [[chunk for chunk in turn if chunk is not None] for turn in turns]

    def resize(self, layer: int, num_chunks: int) -> None:
        """Grow or shrink a layer's range at its tail. Content of what stays is untouched."""
        self._ranges[layer].resize(num_chunks)
