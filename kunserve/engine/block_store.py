"""Block store: gives tables blocks on all devices of their group, and keeps those that others may find.

A store has one kind of KV. Where there are two kinds, mixed_store.py puts a second store beside it.

A block is in one of four states. It is free. It is in use by the tables that name it. Or it is cached: nobody uses it,
but its KV is complete, and a request that begins with the same tokens takes it over (prefix_cache.py). A cached block
is idle, at rest in its group, or follows: it is on its way to where its group went, after the KV of requests. Idle
blocks count as free everywhere but in the pools. Blocks that follow are given up before anybody lacks a block.

Only the fleet (fleet.py) asks for changes here.
"""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from kunserve.engine.blocks.block_pool import BlockPool
from kunserve.engine.blocks.block_table import Block, BlockTable, Tail, append_to_each
from kunserve.engine.group import Convoy, Follower, Group, Stage
from kunserve.engine.prefix_cache import NumBehind, PrefixCache
from kunserve.engine.request import Request


class BlockStore:
    """Owns the block pools of all devices and the cached blocks of all groups; others may read both."""

    @classmethod
    def of(cls, groups: Sequence[Group], num_behind: NumBehind | None, *, has_prefix_cache: bool) -> BlockStore:
        """Return the store of some groups. `num_behind` as in `PrefixCache`."""
        return cls(groups, PrefixCache(num_behind) if has_prefix_cache else None)

    def __init__(self, groups: Iterable[Group], prefixes: PrefixCache | None) -> None:
        self.pools = {stage.device: self.pool(stage) for group in groups for stage in group.stages}
        self.prefixes = prefixes
        self.num_shared = 0  # blocks that tables would hold more if each had blocks of its own
        self._went: dict[Block, Group] = {}  # shared blocks whose first holder has departed, since the last `regrouped`
        self._twins: dict[tuple[Block, int], Block] = {}  # of those, for holders that depart to another group
        self._fronts: list[tuple[int, list[int]]] = []  # device, blocks that its tail is copied to now
        self._followers: defaultdict[Group, deque[Follower]] = defaultdict(deque)  # of a group; the hottest first
        self._convoys: list[Convoy] = []  # under way

    # --- what groups and requests have of this kind -------------------------------------------------------------

    def pool(self, stage: Stage) -> BlockPool:
        """Return the pool of a stage."""
        return stage.pool

    def idle(self, group: Group) -> OrderedDict[Block, None]:
        """Return the idle blocks of a group, the coldest first."""
        return group.idle

    def table(self, request: Request) -> BlockTable:
        """Return what a request holds."""
        return request.table

    def num_free(self, group: Group) -> int:
        """Return how many blocks of a group are free or idle."""
        return min(self.pool(stage).num_free for stage in group.stages) + len(self.idle(group))

    def of_kind(self, kind: int) -> BlockStore:
        """Return the store of a kind of KV: full, then near if there are two."""
        assert kind == 0
        return self

    @property
    def num_following(self) -> int:
        """Return how many cached blocks are on their way; they keep the ids that they have left until they arrive."""
        on_the_way = (*self._followers.values(), *(convoy.followers for convoy in self._convoys))
        return sum(map(len, on_the_way))

    # --- tables of a group --------------------------------------------------------------------------------------

    def begin_empty(self, table: BlockTable, num_behind: int) -> None:
        """Prepare an empty table whose first `num_behind` places are behind the window: nobody finds blocks there."""
        table.num_indexed = num_behind

    def hold(self, table: BlockTable, group: Group, num_places: int, num_near: int) -> bool:
        """Extend a table to `num_places`, of near blocks to `num_near`; False, and no change, if blocks are lacking."""
        return self.append([table], group, max(0, num_places - table.num_places))

    def begin(self, table: BlockTable, group: Group, keys: Sequence[bytes]) -> int:
        """Begin an empty table with its group's blocks of these keys; returns for how many keys there is KV."""
        assert self.prefixes is not None
        num_places, found = self.prefixes.find(group, keys)
        for block in found:
            if block.num_refs == 0:
                del self.idle(group)[block]
            else:
                self.num_shared += 1
        table.share(found, [stage.device for stage in group.stages], num_places - len(found))
        return num_places

    def append(self, tables: Sequence[BlockTable], group: Group, num_each: int) -> bool:
        """Append so many blocks to each of some tables; False, and no change, if their group has not got them."""
        num_blocks = num_each * len(tables)
        while num_blocks > self.num_free(group):
            if not self.give_up_coldest(group):
                return False
        while self.idle(group) and any(self.pool(stage).num_free < num_blocks for stage in group.stages):
            self.forget_oldest(group)
        append_to_each(tables, {stage.device: self.pool(stage).alloc(num_blocks) or [] for stage in group.stages})
        return True

    def index(self, table: BlockTable, group: Group, keys: Sequence[bytes]) -> list[int]:
        """Let others find the first blocks of a table by their keys; returns the places of those that nobody had."""
        assert self.prefixes is not None
        new = []
        for position in range(max(table.num_indexed, table.num_behind), len(keys)):
            block = table.blocks[position - table.num_behind]
            if block.key is None:
                if not self.prefixes.has(keys[position]):
                    new.append(position)
                parent = keys[position - 1] if position else None
                self.prefixes.add(group, block, keys[position], parent)
        table.num_indexed = max(table.num_indexed, len(keys))
        return new

    def distrust(self, table: BlockTable, group: Group) -> None:
        """Let nobody find the blocks of a table, now or later."""
        if self.prefixes is not None:
            for block in table.blocks:
                self.prefixes.remove(group, block)
        table.num_indexed = table.num_places

    def release(self, table: BlockTable, group: Group, *, is_kept: bool) -> None:
        """Let go of a table's blocks. If `is_kept`, those that can be found become idle, the end of a prefix first."""
        self._let_go(reversed(table.blocks), group, is_kept=is_kept)

    def leave_behind(self, table: BlockTable, group: Group, num_places: int) -> None:
        """Let go of the blocks in a table's first places, behind the window. Those that can be found become idle."""
        self._let_go(table.leave_behind(num_places), group, is_kept=True)

    def _let_go(self, blocks: Iterable[Block], group: Group, *, is_kept: bool) -> None:
        freed = list[Block]()
        for block in blocks:
            block.num_refs -= 1
            if block.num_refs:
                self.num_shared -= 1
            elif is_kept and block.key is not None and self._is_below_limits(block):
                self.idle(group)[block] = None
            else:
                if self.prefixes is not None:
                    self.prefixes.remove(group, block)
                freed.append(block)
        self._free(freed)

    # --- tables on their way to another group -------------------------------------------------------------------

    def depart(self, table: BlockTable, source: Group, destination: Group) -> None:
        """Let a table keep its blocks, but be of another group: nobody finds them until it has arrived there."""
        for position, block in enumerate(table.blocks):
            if self.prefixes is not None:
                self.prefixes.remove(source, block)
            if block.num_refs > 1:
                table.blocks[position] = self._of_group(block, destination)
        table.num_indexed = 0

    def _of_group(self, block: Block, destination: Group) -> Block:
        """Return what a shared block is in a group that one of its holders departs to.

        Holders that go to different groups, after a split, share no logical block any more. But its ids have to stay
        until the last of them has arrived: each group's block names them, and needs the KV that the other one's has.
        """
        if self._went.setdefault(block, destination) is destination:
            return block
        key = block, destination.group_id
        if (twin := self._twins.get(key)) is None:
            twin = self._twins[key] = Block(dict(block.ids), num_refs=0)
            for device, block_id in block.ids.items():
                self.pools[device].share([block_id])
        self.num_shared += (twin.num_refs > 0) - 1
        block.num_refs -= 1
        twin.num_refs += 1
        return twin

    def reserve(self, table: BlockTable, group: Group, *, is_beyond_limit: bool = False) -> bool:
        """Give a table that departed blocks on every device of `group`; False, and nothing taken, if one lacks them.

        `is_beyond_limit`: the last ids, which are not mapped so far.
        """
        taken = self._reserve(table, group, is_beyond_limit=is_beyond_limit, is_reclaiming=not is_beyond_limit)
        return taken is not None

    def _reserve(
        self, table: BlockTable, group: Group, *, is_beyond_limit: bool, is_reclaiming: bool
    ) -> list[tuple[int, list[Block]]] | None:
        """Return what was reserved: see `reserve`, and `_take_back`."""
        taken = list[tuple[int, list[Block]]]()  # by device: who got an id there
        for stage in group.stages:
            lacking, pool = [block for block in table.blocks if stage.device not in block.ids], self.pool(stage)
            while is_reclaiming and len(lacking) > pool.num_free and self._reclaim(group):
                pass
            ids = pool.alloc(len(lacking), is_beyond_limit=is_beyond_limit)
            if ids is None:
                self._take_back(taken)
                return None
            for block, block_id in zip(lacking, ids, strict=True):
                block.ids[stage.device] = block_id
            taken.append((stage.device, lacking))
        return taken

    def _take_back(self, taken: Iterable[tuple[int, list[Block]]]) -> None:
        for device, blocks in taken:
            self.pools[device].free([block.ids.pop(device) for block in blocks])

    def arrive(self, table: BlockTable, group: Group, keys: Sequence[bytes]) -> None:
        """Free what a table holds outside its group; of blocks with one of `keys` it takes those that the group has."""
        self._leave(table.blocks, group)
        for i, key in enumerate(keys[table.num_behind :]):
            block, there = table.blocks[i], self.prefixes and self.prefixes.get(group, key)
            if there and there is not block:
                table.blocks[i] = self._join(block, there, group)
        table.read_ids([stage.device for stage in group.stages])

    def _leave(self, blocks: Iterable[Block], group: Group) -> None:
        """Free the ids of blocks on devices outside their group; the first holder of a shared one does so for all."""
        devices, left = {stage.device for stage in group.stages}, defaultdict[int, list[int]](list)
        for block in blocks:
            for device in block.ids.keys() - devices:
                left[device].append(block.ids.pop(device))
        for device, ids in left.items():
            self.pools[device].free(ids)

    def _join(self, block: Block, there: Block, group: Group) -> Block:
        """Let a holder of a block hold another one with the same content instead."""
        if there.num_refs == 0:
            del self.idle(group)[there]
        else:
            self.num_shared += 1
        there.num_refs += 1
        block.num_refs -= 1
        if block.num_refs:
            self.num_shared -= 1
        else:
            self._free([block])
        return there

    # --- cached blocks that follow ------------------------------------------------------------------------------

    def follow(self, source: Group, destinations: Sequence[tuple[Block, Group]]) -> None:
        """Send idle blocks of a group, the hottest first, to others, or to free ids of their own (`end_following`)."""
        left = tuple(stage.view for stage in source.stages)
        for block, destination in destinations:
            assert self.prefixes is not None and block.key is not None
            self._followers[destination].append(Follower(block, block.key, block.parent, left))
            del self.idle(source)[block]
            self.prefixes.leave(source, block)

    def take_convoy(self, group: Group, most: int) -> Convoy | None:
        """Take the hottest blocks that follow to a group, with blocks on all its devices; None if none is left.

        What finds no room is given up, and everything colder with it.
        """
        waiting = self._followers.get(group)
        if not waiting:
            return None
        same = [f for f in islice(waiting, most) if f.left == waiting[0].left]
        taken = tuple(waiting.popleft() for _ in same)
        table = BlockTable([follower.block for follower in taken])
        convoy = Convoy(group, taken, table)
        if self._reserve(table, group, is_beyond_limit=False, is_reclaiming=False) is None:
            self._lose(taken)
            self.give_up(group)
            return None
        self._convoys.append(convoy)
        return convoy

    def end(self, convoy: Convoy, *, is_lost: bool = False) -> None:
        """End a convoy: its blocks have arrived and are idle in their group; if it `is_lost`, they are freed."""
        self._convoys.remove(convoy)
        if is_lost:
            self._lose(convoy.followers)
        else:
            self._leave(convoy.table.blocks, convoy.group)
            self._rest(convoy.group, convoy.followers)

    def end_following(self, group: Group) -> None:
        """Let blocks be idle again that were to follow to the group in which they are."""
        self._rest(group, self._followers.pop(group, ()))

    def _rest(self, group: Group, followers: Iterable[Follower]) -> None:
        """Make blocks idle, colder than those that are idle already."""
        for block, key, parent, _ in followers:
            assert self.prefixes is not None
            if self.prefixes.add(group, block, key, parent):
                self.idle(group)[block] = None
                self.idle(group).move_to_end(block, last=False)
            else:
                self._free([block])
            self.prefixes.came(key)

    def _lose(self, followers: Iterable[Follower]) -> None:
        for follower in followers:
            assert self.prefixes is not None
            self._free([follower.block])
            self.prefixes.came(follower.key)

    def give_up(self, group: Group) -> bool:
        """Free blocks that follow, from or to devices of a group, and have not set out; False if there were none."""
        has_any = False
        while self.give_up_coldest(group):
            has_any = True
        return has_any

    def give_up_coldest(self, group: Group) -> bool:
        """Free the coldest block that follows and has ids on devices of this group; False if there is none."""
        for followers in self._followers.values():
            if followers and any(stage.device in followers[-1].block.ids for stage in group.stages):
                self._lose([followers.pop()])
                return True
        return False

    # --- idle blocks --------------------------------------------------------------------------------------------

    def forget_idle(self, group: Group) -> None:
        """Free all idle blocks of a group."""
        while self.idle(group):
            self.forget_oldest(group)

    def forget_oldest(self, group: Group) -> None:
        """Free the idle block of a group that was used longest ago."""
        block, _ = self.idle(group).popitem(last=False)
        if self.prefixes is not None:
            self.prefixes.remove(group, block)
        self._free([block])

    def _reclaim(self, group: Group) -> bool:
        """Free one cached block of a group, if there is any: an idle one first."""
        if self.idle(group):
            self.forget_oldest(group)
            return True
        return self.give_up_coldest(group)

    # --- pools --------------------------------------------------------------------------------------------------

    def limit(self, device: int, num_blocks: int, group: Group) -> None:
        """Hand out only ids below `num_blocks` on a device of `group`.

        Of its idle blocks the hottest are kept, as far as there is room; those beyond the limit follow: see `emptying`.
        """
        pool, idle = self.pools[device], self.idle(group)
        pool.set_limit(num_blocks)
        num_others = pool.num_used - len(idle)
        while len(idle) > max(0, num_blocks - num_others):
            self.forget_oldest(group)
        beyond = [block for block in reversed(idle) if block.ids[device] >= num_blocks]
        self.follow(group, [(block, group) for block in beyond])

    @contextlib.contextmanager
    def emptying(self, group: Group, stage: Stage, limit: int) -> Iterator[Tail]:
        """See `Fleet.emptying`."""
        pool, device = self.pool(stage), stage.device
        for _ in range(len(pool.used_beyond(limit)) - pool.num_free):
            self._reclaim(group)  # frees an id below the limit, or empties one beyond: either way one less is lacking
        used = pool.used_beyond(limit)
        front = pool.alloc(min(len(used), pool.num_free)) or []
        entry = (device, front)
        self._fronts.append(entry)
        try:
            yield (tail := Tail(dict(zip(used, front, strict=False)), len(front) == len(used)))
        except BaseException:
            pool.free(front)
            raise
        finally:
            self._fronts.remove(entry)
        kept = set[int]()
        tables = list(map(self.table, group.running))
        for block in {block for table in tables for block in table.blocks}.union(
            follower.block for follower in self._followers.get(group, ())
        ):
            if (new := tail.moved.get(block.ids[device])) is not None:
                block.ids[device] = new
                kept.add(new)
        for table in tables:
            table.read_ids(list(table.ids))
        pool.free(old if new in kept else new for old, new in tail.moved.items())  # new: its request has ended

    def _is_below_limits(self, block: Block) -> bool:
        """Tell whether a block's ids could be handed out again: others are about to be unmapped."""
        return all(block_id < self.pools[device].limit for device, block_id in block.ids.items())

    def _free(self, blocks: Iterable[Block]) -> None:
        freed = defaultdict[int, list[int]](list)
        for block in blocks:
            for device, block_id in block.ids.items():
                freed[device].append(block_id)
        for device, ids in freed.items():
            self.pools[device].free(ids)

    # --- regrouping, checking -----------------------------------------------------------------------------------

    def regrouped(self, old: Iterable[Group]) -> None:
        """Forget how blocks of these groups were shared: the groups are gone."""
        assert not any(self.idle(g) or self._followers.get(g) for g in old), "cached blocks of a group that goes"
        self._went.clear()
        self._twins.clear()

    def check(self, tables: Sequence[BlockTable], groups: Sequence[Group]) -> None:
        """Assert that each block is named by the tables that hold it, cached, or free."""
        num_refs = Counter(block for table in tables for block in table.blocks)
        assert all(block.num_refs == number for block, number in num_refs.items())
        assert self.num_shared == sum(number - 1 for number in num_refs.values())
        idle = [block for group in groups for block in self.idle(group)]
        assert all(block.num_refs == 0 and block.key is not None for block in idle)
        on_the_way = [follower.block for followers in self._followers.values() for follower in followers]
        on_the_way += [block for convoy in self._convoys for block in convoy.table.blocks]
        assert all(block.num_refs == 0 and block.key is None for block in on_the_way)
        named = defaultdict[int, list[int]](list)  # by device
        for block in [*num_refs, *idle, *on_the_way]:
            for device, block_id in block.ids.items():
                named[device].append(block_id)
        for device, front in self._fronts:
            named[device] += front
        for device, pool in self.pools.items():
            pool.check([named[device]])
        if self.prefixes is not None:
            self.prefixes.check(groups, {*num_refs, *idle})
