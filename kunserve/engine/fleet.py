"""The fleet: all groups, the block pools of their devices, and where the KV of every request is.

It is the only writer of these: of `Group.running`, `is_admitting` and `num_pauses`, of `Request.group_id`, `table` and
`is_moving`, of the sizes of block pools, of the list of groups and its epoch. Everybody else reads, and asks the fleet.
Nothing here waits or copies: whoever moves KV (engine/regroup/: exchange.py, migrate.py, swap.py) reserves room here,
has it copied, and then says how it ended.

A block is free, in use by the tables that name it, or idle: nobody uses it, but its KV is complete, and a request that
begins with the same tokens takes it over (prefix_cache.py). Idle blocks count as free everywhere but in the pools.

A request is in one of four states. It waits: it belongs to no group and holds nothing. It runs. It is suspended: it
belongs to its group and holds its blocks, but is not scheduled, because a copy reads or writes them. Or it has
departed: it belongs to another group than its KV is in, until it arrives.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from kunserve.engine.block_pool import BlockPool
from kunserve.engine.block_table import Block, BlockTable, Tail
from kunserve.engine.group import Group, Stage
from kunserve.engine.prefix_cache import PrefixCache, extend_keys
from kunserve.engine.request import Request
from kunserve.planner.snapshot import Origin, StageView


class Fleet:
    """Owns the groups and all residence of KV. `groups` and `pools` are for reading.

    `has_prefix_cache`: blocks are kept, and shared, for requests that begin alike.
    """

    def __init__(self, groups: Sequence[Group], *, has_prefix_cache: bool = False) -> None:
        self.groups = list(groups)
        self.pools: dict[int, BlockPool] = {stage.device: stage.pool for group in groups for stage in group.stages}
        self._epoch = 0
        self._by_id: dict[int, Group] = {}  # filled as asked
        self._by_device: dict[int, Group] = {}  # likewise
        self._next_group_id = 1 + max((group.group_id for group in groups), default=-1)
        self.prefixes = PrefixCache() if has_prefix_cache else None
        self.num_shared = 0  # blocks that requests would hold more if each had blocks of its own
        # What `prefix_lengths` was asked for last, and the cache's version then: all groups ask for one head.
        self._lengths: tuple[tuple[Request, int] | None, dict[int, int]] = None, {}
        self._departed: dict[Request, BlockTable] = {}
        self._went: dict[Block, Group] = {}  # shared blocks whose first holder has departed, since the last `regroup`
        self._twins: dict[tuple[Block, int], Block] = {}  # of those, for holders that depart to another group
        self._expected: list[tuple[Group, BlockTable]] = []  # tables that requests of other groups are to get
        self._fronts: list[tuple[int, list[int]]] = []  # device, blocks that its tail is copied to now

    # --- groups -------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Return how often the grouping has changed: a plan is for one epoch only."""
        return self._epoch

    @property
    def num_running(self) -> int:
        """Return how many requests are bound to a group."""
        return sum(len(group.running) for group in self.groups)

    def group(self, group_id: int) -> Group:
        """Return the group of that id."""
        if group_id not in self._by_id:  # the grouping is new
            self._by_id = {group.group_id: group for group in self.groups}
        return self._by_id[group_id]

    def make_group(self, stages: Sequence[StageView], block_size: int, origin: Origin | None) -> Group:
        """Return a new group, with an id of its own, on devices that there are. It joins the others by `regroup`."""
        chain = tuple(Stage(s.device, s.first_layer, s.last_layer, self.pools[s.device]) for s in stages)
        group = Group(self._next_group_id, chain, block_size, origin=origin)
        self._next_group_id += 1
        return group

    def regroup(self, old: Sequence[Group], new: Sequence[Group]) -> None:
        """Put `new` in the place of `old`, and begin a new epoch."""
        gone = set(old)
        assert not any(group.idle for group in old), "cached blocks of a group that goes"
        self._epoch += 1
        self._by_device.clear()
        self._went.clear()
        self._twins.clear()
        self.groups[:] = [group for group in self.groups if group not in gone] + list(new)

    @contextlib.contextmanager
    def pause(self, groups: Sequence[Group]) -> Iterator[None]:
        """Let nothing be scheduled for these groups inside; a group goes on when the last who paused it has left."""
        for group in groups:
            group.num_pauses += 1
        try:
            yield
        finally:
            for group in groups:
                group.num_pauses -= 1

    def set_admitting(self, group: Group, is_admitting: bool) -> None:
        """Let a group take requests from the queue, or keep its blocks for KV that is on its way."""
        group.is_admitting = is_admitting

    # --- requests in their group --------------------------------------------------------------------------------

    def admit(self, request: Request, group: Group, *, finds_prefix: bool = False) -> None:
        """Bind a request that waits to a group that has blocks for all its tokens.

        `finds_prefix`: it has no KV yet, and takes what is there of its tokens: all but the last, which has to be
        computed.
        """
        request.group_id = group.group_id
        group.running.append(request)
        if finds_prefix and self.prefixes is not None:
            self._take_prefix(request, group, self.prefixes)
        is_allocated = self.allocate(request, group, request.num_tokens)
        assert is_allocated, "admitted what does not fit"

    def allocate(self, request: Request, group: Group, num_tokens: int) -> bool:
        """Let a request of `group` hold blocks for its first `num_tokens`; False, and no change, if it cannot."""
        table = request.table
        if num_tokens <= len(table.blocks) * group.block_size:
            return True
        return self._append(table, group, group.missing_blocks(request, num_tokens))

    def release(self, request: Request) -> None:
        """Take a request out of its group. Its blocks are idle or free then, unless others use them."""
        assert request.group_id is not None
        group = self.group(request.group_id)
        group.running.remove(request)
        self._free(request.table, group, is_kept=True)
        request.table, request.group_id = BlockTable(), None

    def computed(self, request: Request, group: Group) -> None:
        """Let others find the blocks that a running request has filled: a step has computed more of its tokens."""
        num_tokens = min(request.num_computed_tokens, len(request.token_ids))
        if self.prefixes is None or num_tokens < (request.table.num_indexed + 1) * group.block_size:
            return
        keys, table, num_full = extend_keys(request, group.block_size), request.table, num_tokens // group.block_size
        for block, key in zip(table.blocks[table.num_indexed : num_full], keys[table.num_indexed :], strict=False):
            if block.key is None:
                self.prefixes.add(group, block, key)
        table.num_indexed = num_full

    def distrust(self, request: Request, group: Group) -> None:
        """Let nobody find the blocks of a running request: what was computed for it was wrong."""
        if self.prefixes is not None:
            for block in request.table.blocks:
                self.prefixes.remove(group, block)
        request.table.num_indexed = len(request.table.blocks)

    def prefix_lengths(self, request: Request) -> dict[int, int]:
        """Return how many blocks of a waiting request's tokens groups have, by group id; without those with none."""
        if self.prefixes is None:
            return {}
        asked = request, self.prefixes.version
        if self._lengths[0] != asked:
            keys = extend_keys(request, self.groups[0].block_size)[: self._most_found(request)]
            self._lengths = asked, self.prefixes.lengths(keys)
        return self._lengths[1]

    def _most_found(self, request: Request) -> int:
        """Blocks that it may find: its last token has to be computed, or all of them if their logits are asked for."""
        if request.params.num_prompt_logprobs is not None:
            return 0
        return (request.num_tokens - 1) // self.groups[0].block_size

    def suspend(self, request: Request) -> None:
        """Keep a request from being scheduled: its blocks are about to be copied."""
        request.is_moving = True

    def resume(self, request: Request) -> None:
        """Let a suspended request be scheduled again."""
        request.is_moving = False

    # --- requests on their way to another group -----------------------------------------------------------------

    def depart(self, request: Request, source: Group, destination: Group) -> BlockTable:
        """Bind a running request to another group, where it is not scheduled until it arrives.

        Returns its table. It keeps its blocks, and gets those that it lacks by `reserve`.
        """
        source.running.remove(request)
        destination.running.append(request)
        table = self._departed[request] = request.table
        for position, block in enumerate(table.blocks):
            if self.prefixes is not None:
                self.prefixes.remove(source, block)
            if block.num_refs > 1:
                table.blocks[position] = self._of_group(block, destination)
        table.num_indexed = 0
        request.table, request.group_id, request.is_moving = BlockTable(), destination.group_id, True
        return table

    def _of_group(self, block: Block, destination: Group) -> Block:
        """Return what a shared block is in a group that one of its holders departs to.

        Holders that go to different groups, after a split, share no logical block any more. But its ids have to stay
        until the last of them has arrived: each group's block names them, and needs the KV that the other one's has.
        """
        if self._went.setdefault(block, destination) is destination:
            return block
        place = block, destination.group_id
        if (twin := self._twins.get(place)) is None:
            twin = self._twins[place] = Block(dict(block.ids), num_refs=0)
            for device, block_id in block.ids.items():
                self.pools[device].share([block_id])
        self.num_shared += (twin.num_refs > 0) - 1
        block.num_refs -= 1
        twin.num_refs += 1
        return twin

    def reserve(self, request: Request, group: Group, *, is_beyond_limit: bool = False) -> bool:
        """Give a request that departed blocks on every device of `group`; False, and nothing taken, if one lacks them.

        `is_beyond_limit`: the last ids, which are not mapped so far.
        """
        table = self._departed[request]
        taken: list[tuple[int, list[Block], list[int]]] = []
        for stage in group.stages:
            lacking = [block for block in table.blocks if stage.device not in block.ids]
            while not is_beyond_limit and len(lacking) > stage.pool.num_free and group.idle:
                self._forget_oldest(group)
            ids = stage.pool.alloc(len(lacking), is_beyond_limit=is_beyond_limit)
            if ids is None:
                for device, _, their_ids in taken:
                    self.pools[device].free(their_ids)
                return False
            taken.append((stage.device, lacking, ids))
        for device, lacking, ids in taken:
            for block, block_id in zip(lacking, ids, strict=True):
                block.ids[device] = block_id
        return True

    def arrive(self, request: Request, group: Group) -> None:
        """Let a request that departed, and whose KV is all there, run on in `group`; free what it has elsewhere."""
        table = self._departed.pop(request)
        devices = [stage.device for stage in group.stages]
        left = {device for block in table.blocks for device in block.ids}.difference(devices)
        for device in left:  # of a shared block, who arrives first leaves the old place for all
            self.pools[device].free(block.ids.pop(device) for block in table.blocks if device in block.ids)
        table.read_ids(devices)
        request.table, request.is_moving = table, False
        self.computed(request, group)

    def lose(self, request: Request) -> None:
        """Take a request that departed out of its group: its KV did not arrive, or nobody wants it any more."""
        assert request.group_id is not None
        group = self.group(request.group_id)
        group.running.remove(request)
        self._free(self._departed.pop(request), group, is_kept=False)
        request.group_id, request.is_moving = None, False

    def expect(self, group: Group) -> BlockTable:
        """Return an empty table of `group`, for a request that runs elsewhere meanwhile: see `extend`, `hand_over`."""
        table = BlockTable()
        self._expected.append((group, table))
        return table

    def extend(self, table: BlockTable, group: Group, num_blocks: int) -> bool:
        """Let an expected table have so many blocks in all; False, and no change, if `group` has not got them."""
        return self._append(table, group, num_blocks - len(table.blocks))

    def hand_over(self, request: Request, destination: Group, table: BlockTable) -> None:
        """Bind a settled request to another group, where its KV is in an expected table by now."""
        self.release(request)
        self._expected.remove((destination, table))
        request.group_id, request.table = destination.group_id, table
        destination.running.append(request)
        self.computed(request, destination)

    def expect_no_more(self, group: Group, table: BlockTable) -> None:
        """Free an expected table: its request does not come."""
        self._expected.remove((group, table))
        self._free(table, group, is_kept=False)

    # --- block pools --------------------------------------------------------------------------------------------

    def grow(self, device: int, num_blocks: int) -> None:
        """Hand out ids below `num_blocks` on a device: they are mapped now. Lifts any limit."""
        self.pools[device].grow(num_blocks)

    def limit(self, device: int, num_blocks: int) -> None:
        """Hand out only ids below `num_blocks` on a device from now on. Idle blocks beyond are forgotten."""
        self.pools[device].set_limit(num_blocks)
        group = self._group_on(device)
        for block in [block for block in group.idle if block.ids[device] >= num_blocks]:
            self._forget(group, block)

    def shrink(self, device: int, num_blocks: int) -> None:
        """Forget ids from `num_blocks` on, which nobody uses: they are about to be unmapped."""
        self.pools[device].shrink(num_blocks)

    def num_used(self, device: int) -> int:
        """Return how many blocks requests use on a device."""
        return self.pools[device].num_used - len(self._group_on(device).idle)

    def _group_on(self, device: int) -> Group:
        if not self._by_device:  # the grouping is new
            self._by_device = {stage.device: group for group in self.groups for stage in group.stages}
        return self._by_device[device]

    def forget_idle(self, group: Group) -> None:
        """Free all cached blocks of a group that nobody uses."""
        while group.idle:
            self._forget_oldest(group)

    @contextlib.contextmanager
    def emptying(self, group: Group, stage: Stage, limit: int) -> Iterator[Tail]:
        """Move blocks of a stage from beyond `limit` to free ones before it: the caller copies their KV inside.

        On leaving, requests hold the new ones, and the old are free; after an error it is the other way round. The
        group is paused, but requests may end meanwhile.
        """
        pool, device = stage.pool, stage.device
        used = pool.used_beyond(limit)
        while len(used) > pool.num_free and group.idle:
            self._forget_oldest(group)
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
        for block in {block for request in group.running for block in request.table.blocks}:
            if (new := tail.moved.get(block.ids[device])) is not None:
                block.ids[device] = new
                kept.add(new)
        for request in group.running:
            request.table.read_ids(list(request.table.ids))
        pool.free(old if new in kept else new for old, new in tail.moved.items())  # new: its request has ended

    # --- checks -------------------------------------------------------------------------------------------------

    def check(self, num_layers: int) -> None:
        """Assert that groups are complete, and that each block is named by the tables that hold it, idle, or free."""
        tables = [request.table for group in self.groups for request in group.running]
        tables += [*(table for _, table in self._expected), *self._departed.values()]
        num_refs = Counter(block for table in tables for block in table.blocks)
        idle = [block for group in self.groups for block in group.idle]
        assert all(block.num_refs == number for block, number in num_refs.items())
        assert self.num_shared == sum(number - 1 for number in num_refs.values())
        assert all(block.num_refs == 0 and block.key is not None for block in idle)
        named = defaultdict[int, list[list[int]]](list)  # by device
        for block in [*num_refs, *idle]:
            for device, block_id in block.ids.items():
                named[device].append([block_id])
        for device, front in self._fronts:
            named[device].append(front)
        for device, pool in self.pools.items():
            pool.check(named[device])
        for request in self._departed:
            assert request.is_moving and not request.table.blocks
        for table in tables[: -len(self._departed) or None]:
            table.check()
        for group in self.groups:
            group.check(num_layers)
        if self.prefixes is not None:
            self.prefixes.check(self.groups)

    # --- blocks -------------------------------------------------------------------------------------------------

    def _take_prefix(self, request: Request, group: Group, prefixes: PrefixCache) -> None:
        """Let a request begin with the blocks that its group has of its tokens."""
        most = self._most_found(request)
        found = prefixes.find(group, extend_keys(request, group.block_size)[:most])
        for block in found:
            if block.num_refs == 0:
                del group.idle[block]
            else:
                self.num_shared += 1
        request.table.share(found, [stage.device for stage in group.stages])
        num_tokens = len(found) * group.block_size
        request.num_computed_tokens = request.num_scheduled_tokens = num_tokens
        if request.num_preemptions == 0:
            request.num_cached_tokens = num_tokens

    def _append(self, table: BlockTable, group: Group, num_blocks: int) -> bool:
        if num_blocks > group.num_free:
            return False
        while group.idle and any(stage.pool.num_free < num_blocks for stage in group.stages):
            self._forget_oldest(group)
        table.append({stage.device: stage.pool.alloc(num_blocks) or [] for stage in group.stages})
        return True

    def _free(self, table: BlockTable, group: Group, *, is_kept: bool) -> None:
        """Let go of a table's blocks. If `is_kept`, those that can be found are idle then, a prefix's end first."""
        freed = defaultdict[int, list[int]](list)
        for block in reversed(table.blocks):
            block.num_refs -= 1
            if block.num_refs:
                self.num_shared -= 1
            elif is_kept and block.key is not None and self._is_below_limits(block):
                group.idle[block] = None
            else:
                if self.prefixes is not None:
                    self.prefixes.remove(group, block)
                for device, block_id in block.ids.items():
                    freed[device].append(block_id)
        for device, ids in freed.items():
            self.pools[device].free(ids)

    def _is_below_limits(self, block: Block) -> bool:
        """Whether its ids could be handed out again: others are about to be unmapped."""
        return all(block_id < self.pools[device].limit for device, block_id in block.ids.items())

    def _forget_oldest(self, group: Group) -> None:
        self._forget(group, next(iter(group.idle)))

    def _forget(self, group: Group, block: Block) -> None:
        del group.idle[block]
        if self.prefixes is not None:
            self.prefixes.remove(group, block)
        for device, block_id in block.ids.items():
            self.pools[device].free([block_id])
