"""The blocks of two kinds of KV: a store of full blocks, with one of near blocks beside it.

What is asked of a table is done to both of its kinds, or to none. A request may begin with the blocks of a prefix only
if its group has all full ones of it, and of near ones those that are in the window of what follows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kunserve.engine.block_store import BlockStore
from kunserve.engine.blocks.block_pool import BlockPool
from kunserve.engine.blocks.block_table import Block, BlockTable
from kunserve.engine.group import Group, Stage
from kunserve.engine.kinds.mixed_group import MixedGroup, near_pool
from kunserve.engine.prefix_cache import NumBehind, PrefixCache
from kunserve.engine.request import Request


class MixedPrefixCache(PrefixCache):
    """Finds full blocks, and says with how many of some keys a request can begin that needs near blocks as well.

    `near`: the cache of near blocks.
    """

    def __init__(self, near: PrefixCache) -> None:
        super().__init__()
        self.near = near

    @property
    def version(self) -> int:
        """See `PrefixCache.version`."""
        return self._version + self.near.version

    def lengths(self, keys: Sequence[bytes]) -> dict[int, int]:
        """See `PrefixCache.lengths`."""
        lengths = dict[int, int]()
        for group_id, number in super().lengths(keys).items():
            if found := self.near.lengths(keys[:number]).get(group_id, 0):
                lengths[group_id] = found
        return lengths


class NearStore(BlockStore):
    """Does what `BlockStore` does, with near blocks."""

    def pool(self, stage: Stage) -> BlockPool:
        """See `BlockStore.pool`."""
        return near_pool(stage)

    def idle(self, group: Group) -> OrderedDict[Block, None]:
        """See `BlockStore.idle`."""
        assert isinstance(group, MixedGroup)
        return group.near_idle

    def table(self, request: Request) -> BlockTable:
        """See `BlockStore.table`. One that has departed has an empty one."""
        return request.table.near or BlockTable()


class MixedStore(BlockStore):
    """Does what `BlockStore` does, with blocks of both kinds."""

    @classmethod
    def of(cls, groups: Sequence[Group], num_behind: NumBehind | None, *, has_prefix_cache: bool) -> MixedStore:
        """See `BlockStore.of`."""
        return cls(groups, MixedPrefixCache(PrefixCache(num_behind)) if has_prefix_cache else None)

    def __init__(self, groups: Sequence[Group], prefixes: MixedPrefixCache | None) -> None:
        super().__init__(groups, prefixes)
        self._near = NearStore(groups, None if prefixes is None else prefixes.near)

    def of_kind(self, kind: int) -> BlockStore:
        """See `BlockStore.of_kind`."""
        return (self, self._near)[kind]

    @property
    def num_following(self) -> int:
        """See `BlockStore.num_following`."""
        return super().num_following + self._near.num_following

    # --- tables of a group --------------------------------------------------------------------------------------

    def begin_empty(self, table: BlockTable, num_behind: int) -> None:
        """See `BlockStore.begin_empty`: nothing of full blocks is behind the window."""
        table.near = BlockTable()
        table.near.begin_behind(num_behind)

    def begin(self, table: BlockTable, group: Group, keys: Sequence[bytes]) -> int:
        """See `BlockStore.begin`."""
        num_places = super().begin(table, group, keys)
        num_near = self._near.begin(near_of(table), group, keys[:num_places])
        assert num_near == num_places
        return num_places

    def hold(self, table: BlockTable, group: Group, num_places: int, num_near: int) -> bool:
        """Let a table have so many places of each kind; False, and no change, if its group has not got the blocks."""
        near = near_of(table)
        missing = max(0, num_near - near.num_places)
        while missing > self._near.num_free(group):
            if not self._near.give_up_coldest(group):
                return False
        if num_places > table.num_places and not self.append([table], group, num_places - table.num_places):
            return False
        has_appended = self._near.append([near], group, missing)
        assert has_appended
        return True

    def index(self, table: BlockTable, group: Group, keys: Sequence[bytes]) -> list[int]:
        """See `BlockStore.index`: places of full blocks."""
        self._near.index(near_of(table), group, keys)
        return super().index(table, group, keys)

    def distrust(self, table: BlockTable, group: Group) -> None:
        """See `BlockStore.distrust`."""
        super().distrust(table, group)
        self._near.distrust(near_of(table), group)

    def release(self, table: BlockTable, group: Group, *, is_kept: bool) -> None:
        """See `BlockStore.release`."""
        super().release(table, group, is_kept=is_kept)
        self._near.release(near_of(table), group, is_kept=is_kept)

    def leave_behind(self, table: BlockTable, group: Group, num_places: int) -> None:
        """See `BlockStore.leave_behind`: near blocks only."""
        self._near.leave_behind(near_of(table), group, num_places)

    # --- tables on their way to another group -------------------------------------------------------------------

    def depart(self, table: BlockTable, source: Group, destination: Group) -> None:
        """See `BlockStore.depart`."""
        super().depart(table, source, destination)
        self._near.depart(near_of(table), source, destination)

    def reserve(self, table: BlockTable, group: Group, *, is_beyond_limit: bool = False) -> bool:
        """See `BlockStore.reserve`."""
        taken = self._reserve(table, group, is_beyond_limit=is_beyond_limit, is_reclaiming=not is_beyond_limit)
        if taken is None:
            return False
        if self._near.reserve(near_of(table), group, is_beyond_limit=is_beyond_limit):
            return True
        self._take_back(taken)
        return False

    def arrive(self, table: BlockTable, group: Group, keys: Sequence[bytes]) -> None:
        """See `BlockStore.arrive`."""
        super().arrive(table, group, keys)
        self._near.arrive(near_of(table), group, keys)

    # --- cached blocks ------------------------------------------------------------------------------------------

    def end_following(self, group: Group) -> None:
        """See `BlockStore.end_following`."""
        super().end_following(group)
        self._near.end_following(group)

    def give_up(self, group: Group) -> bool:
        """See `BlockStore.give_up`."""
        has_any = super().give_up(group)
        return self._near.give_up(group) or has_any

    def forget_idle(self, group: Group) -> None:
        """See `BlockStore.forget_idle`."""
        super().forget_idle(group)
        self._near.forget_idle(group)

    # --- both ---------------------------------------------------------------------------------------------------

    def regrouped(self, old: Iterable[Group]) -> None:
        """See `BlockStore.regrouped`."""
        super().regrouped(old)
        self._near.regrouped(old)

    def check(self, tables: Sequence[BlockTable], groups: Sequence[Group]) -> None:
        """See `BlockStore.check`."""
        super().check(tables, groups)
        self._near.check([near_of(table) for table in tables if table.near is not None], groups)
        assert all(table.near is not None or not table.blocks for table in tables)


def near_of(table: BlockTable) -> BlockTable:
    """Return the near blocks of a table that a request has been given."""
    assert table.near is not None
    return table.near
