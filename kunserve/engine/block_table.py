"""Logical blocks: where the KV of some tokens is, on every device that holds a part of it.

A logical block is the KV of `block_size` tokens in all layers of one KV kind. Full attention is the only kind so far;
of each further one, a request would have one more table, and a device one more pool. Only the fleet (engine/fleet.py)
writes what is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Block:
    """One logical block: its id on each device that holds layers of it. The id is the same in all these layers."""

    ids: dict[int, int]  # device -> id


@dataclass(slots=True, eq=False)
class BlockTable:
    """The logical blocks of one request, in the order of its tokens.

    `ids` says the same by device, in the order of the chain: these lists are only appended to while the request runs,
    and each step reads them as they are.
    """

    blocks: list[Block] = field(default_factory=list)
    ids: dict[int, list[int]] = field(default_factory=dict)

    def append(self, ids: dict[int, Sequence[int]]) -> None:
        """Add as many logical blocks as each device of the chain has ids for."""
        for device, new in ids.items():
            self.ids.setdefault(device, []).extend(new)
        self.blocks += [Block(dict(zip(ids, row, strict=True))) for row in zip(*ids.values(), strict=True)]

    def spread(self, device: int, ids: Sequence[int]) -> None:
        """Give every block an id on one more device."""
        self.ids[device] = list(ids)
        for block, block_id in zip(self.blocks, ids, strict=True):
            block.ids[device] = block_id

    def leave(self, device: int) -> list[int]:
        """Forget the ids on a device; returns them."""
        for block in self.blocks:
            del block.ids[device]
        return self.ids.pop(device)

    def rename(self, device: int, renamed: dict[int, int]) -> set[int]:
        """Replace some ids on a device, old to new; returns the new ones that are in use now."""
        ids, used = self.ids[device], set[int]()
        for position, block_id in enumerate(ids):
            if (new := renamed.get(block_id)) is not None:
                ids[position] = self.blocks[position].ids[device] = new
                used.add(new)
        return used

    def check(self) -> None:
        """Assert that blocks and lists say the same."""
        for device, ids in self.ids.items():
            assert ids == [block.ids[device] for block in self.blocks]
        assert all(block.ids.keys() == self.ids.keys() for block in self.blocks)
