"""Logical blocks: where the KV of some tokens is, on every device that holds a part of it.

A logical block is the KV of `block_size` tokens in all layers of one kind. Where there are two kinds, full and near, a
request has a table of near blocks beside that of full ones, and a device a pool of each. Only the fleet
(engine/fleet.py) writes what is here.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

ID = "i"  # the type of ids in arrays: int32, as kernels read them


@dataclass(slots=True, eq=False)
class Block:
    """One logical block: its id on each device that holds layers of it. The id is the same in all these layers."""

    ids: dict[int, int]  # device -> id
    num_refs: int = 1  # tables that hold it; with none it is cached
    key: bytes | None = None  # of its content (prefix_cache.py), once all of it is computed and others may find it
    parent: bytes | None = None  # the key of the block before it then, if there is one


@dataclass(slots=True, eq=False)
class BlockTable:
    """The logical blocks of one request, in the order of its tokens. A place is where a block is, or was.

    `ids` says the same by device, in the order of the chain, with an id for each place: these are only appended to
    while they stay, and who has copied them looks at what is new. Where others come in their place, `ids` is another
    mapping. The first `num_behind` places are
    behind the window of all layers: their blocks are let go, and some id that is mapped stands there, which nobody
    reads.
    """

    blocks: list[Block] = field(default_factory=list)
    ids: dict[int, array[int]] = field(default_factory=dict)
    num_indexed: int = 0  # of the first places: others may find their blocks
    num_behind: int = 0
    near: BlockTable | None = None  # of the same tokens in the layers with a window, if their KV is a kind of its own

    @property
    def num_places(self) -> int:
        """Return how many blocks it holds or has let go."""
        return self.num_behind + len(self.blocks)

    def append(self, ids: Mapping[int, Sequence[int]]) -> None:
        """Add new logical blocks, as many as each device of the chain has ids for."""
        for device, new in ids.items():
            if not self.ids.get(device):
                self.ids[device] = array(ID, new[:1]) * self.num_behind
            self.ids[device].extend(new)
        self.blocks += [Block(dict(zip(ids, row, strict=True))) for row in zip(*ids.values(), strict=True)]

    def begin_behind(self, num_places: int) -> None:
        """Let so many first places be behind the window: no KV comes for them; the table is empty."""
        self.num_behind = self.num_indexed = num_places

    def leave_behind(self, num_places: int) -> list[Block]:
        """Let the first places be behind the window; returns their blocks. One block stays at least."""
        num_left = min(num_places - self.num_behind, len(self.blocks) - 1)
        if num_left <= 0:
            return []
        left, self.blocks = self.blocks[:num_left], self.blocks[num_left:]
        self.num_behind += num_left
        self.read_ids(list(self.ids))  # all of them: what stood there may be unmapped one day
        return left

    def share(self, blocks: Sequence[Block], devices: Iterable[int], num_behind: int = 0) -> None:
        """Begin with blocks that are there already, after so many places behind the window; the table is empty."""
        for block in blocks:
            block.num_refs += 1
        self.blocks, self.num_behind = list(blocks), num_behind
        self.read_ids(devices)
        self.num_indexed = self.num_places

    def read_ids(self, devices: Iterable[int]) -> None:
        """Say by device what the blocks say now."""
        places = [*self.blocks[:1] * self.num_behind, *self.blocks]
        self.ids = {device: array(ID, [block.ids[device] for block in places]) for device in devices}

    def check(self) -> None:
        """Assert that blocks and lists say the same."""
        for device, ids in self.ids.items():
            assert list(ids[self.num_behind :]) == [block.ids[device] for block in self.blocks]
            assert set(ids[: self.num_behind]) <= {ids[self.num_behind]} if self.num_behind else True
        assert all(block.num_refs > 0 for block in self.blocks)
        if self.near is not None:
            self.near.check()


def append_to_each(tables: Sequence[BlockTable], ids: Mapping[int, Sequence[int]]) -> None:
    """Add new logical blocks to tables, to all as many: those to the first come first in the ids of each device."""
    num_each = len(next(iter(ids.values()))) // max(1, len(tables))
    for i, table in enumerate(tables):
        table.append({device: new[i * num_each : (i + 1) * num_each] for device, new in ids.items()})


class Tail(NamedTuple):
    """Blocks of one stage that go from beyond a limit to free ones before it."""

    moved: dict[int, int]  # id -> id
    is_whole: bool  # there was a free one for each
