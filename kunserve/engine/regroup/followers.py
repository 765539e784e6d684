"""Followers: cached blocks, which no request uses, go where their group went, after the KV of all requests.

They take the lowest priority on the links. Where there is no room for them, the coldest are given up, and all of them
as soon as a request needs what they occupy (engine/block_store.py). Nothing is lost with them but time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from kunserve.engine.blocks.block_table import Block
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Convoy, Group
from kunserve.engine.regroup.transfer import Transfers
from kunserve.engine.request import Request
from kunserve.gpu.links import Priority
from kunserve.gpu.refusal import log_failure
from kunserve.planner.exchange import layer_moves


class Followers:
    """Sends the cached blocks of groups that merge or split after them, and brings them there."""

    def __init__(self, fleet: Fleet, transfers: Transfers) -> None:
        self._fleet, self._transfers = fleet, transfers

    def merge(self, groups: Sequence[Group], new: Group) -> None:
        """Let the cached blocks of some groups follow to the one that they become; of equal ones, only one does.

        The requests of these groups have not departed yet.
        """
        for kind in range(self._fleet.num_kinds):
            store = self._fleet.store(kind)
            there = {block.key for group in groups for r in group.running for block in store.table(r).blocks}
            for group in groups:
                following = []
                for block in reversed(store.idle(group)):
                    if block.key not in there:
                        there.add(block.key)
                        following.append((block, new))
                self._fleet.follow(group, following, kind)
        for group in groups:
            self._fleet.forget_idle(group)

    def split(self, group: Group, destinations: Mapping[Request, Group], parts: Sequence[Group]) -> None:
        """Let each cached block of a group follow to the part where the one before it goes.

        If none is before it, or that went nowhere, it goes where there are fewest. The requests of this group, whose
        `destinations` these are, have not departed yet.
        """
        destination_of = {block.key: to for request, to in destinations.items() for block in request.table.blocks}
        num_blocks = Counter(dict.fromkeys(parts, 0))
        num_blocks.update(to for request, to in destinations.items() for _ in request.table.blocks)
        for kind in range(self._fleet.num_kinds):
            following = list[tuple[Block, Group]]()
            for block in reversed(self._fleet.store(kind).idle(group)):  # a prefix's beginning before its end
                destination = destination_of.get(block.key)  # where the full one of the same tokens goes
                destination = destination or (destination_of.get(block.parent) if block.parent else None)
                destination = destination or min(parts, key=lambda part: num_blocks[part])
                destination_of[block.key] = destination
                num_blocks[destination] += 1
                following.append((block, destination))
            self._fleet.follow(group, following, kind)

    async def bring(self, group: Group) -> int:
        """Copy what follows to a group, a turn's worth at a time; if that fails, the rest is given up.

        Returns how many blocks have arrived.
        """
        num_blocks = 0
        try:
            most = self._transfers.blocks_in_turn(group.stages[0].device)
            for kind in range(self._fleet.num_kinds):
                while (convoy := self._fleet.take_convoy(group, most, kind)) is not None:
                    await self._bring(convoy, kind)
                    num_blocks += len(convoy.followers)
        except Exception as error:
            log_failure("cached blocks are lost", error, group=group.group_id)
        finally:
            self._fleet.give_up_followers(group)
        return num_blocks

    async def _bring(self, convoy: Convoy, kind: int) -> None:
        is_lost = True
        try:
            blocks = convoy.table.blocks
            for move in layer_moves(convoy.left, [stage.view for stage in convoy.group.stages]):
                read = [block.ids[move.source] for block in blocks]
                write = [block.ids[move.destination] for block in blocks]
                layers = self._fleet.layers_of(kind, range(move.first_layer, move.last_layer))
                await self._transfers.between(
                    move.source, move.destination, layers, read, write, lambda: True, Priority.CACHED_KV
                )
            is_lost = False
        finally:
            self._fleet.end_convoy(convoy, is_lost=is_lost, kind=kind)
