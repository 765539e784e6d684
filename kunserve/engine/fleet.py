"""The fleet: all groups, the block pools of their devices, and where the KV of every request is.

It is the only writer of these: of `Group.running`, `is_admitting` and `num_pauses`, of `Request.group_id`, `table` and
`is_moving`, of the sizes of block pools, of the list of groups and its epoch. Everybody else reads, and asks the fleet.
Nothing here waits or copies: whoever moves KV (regroup/: exchange.py, migrate.py, swap.py) reserves room here, has it
copied, and then says how it ended.

A request is in one of four states. It waits: it belongs to no group and holds nothing. It runs. It is suspended: it
belongs to its group and holds its blocks, but is not scheduled, because a copy reads or writes them. Or it has
departed: it belongs to another group than its KV is in, until it arrives.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kunserve.engine.block_pool import BlockPool
from kunserve.engine.block_table import BlockTable
from kunserve.engine.group import Group, Stage
from kunserve.engine.request import Request
from kunserve.planner.snapshot import Origin, StageView


class Tail(NamedTuple):
    """Blocks of one stage that go from beyond a limit to free ones before it."""

    moved: dict[int, int]  # id -> id
    is_whole: bool  # there was a free one for each


class Fleet:
    """Owns the groups and all residence of KV. `groups` and `pools` are for reading."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = list(groups)
        self.pools: dict[int, BlockPool] = {stage.device: stage.pool for group in groups for stage in group.stages}
        self._epoch = 0
        self._by_id: dict[int, Group] = {}  # filled as asked
        self._next_group_id = 1 + max((group.group_id for group in groups), default=-1)
        self._departed: dict[Request, BlockTable] = {}
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
        self._epoch += 1
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

    def admit(self, request: Request, group: Group) -> None:
        """Bind a request that waits to a group that has blocks for all its tokens."""
        request.group_id = group.group_id
        group.running.append(request)
        is_allocated = self.allocate(request, group, request.num_tokens)
        assert is_allocated, "admitted what does not fit"

    def allocate(self, request: Request, group: Group, num_tokens: int) -> bool:
        """Let a request of `group` hold blocks for its first `num_tokens`; False, and no change, if it cannot."""
        table = request.table
        if num_tokens <= len(table.blocks) * group.block_size:
            return True
        return self._append(table, group, group.missing_blocks(request, num_tokens))

    def release(self, request: Request) -> None:
        """Take a request out of its group, and free its blocks."""
        assert request.group_id is not None
        self.group(request.group_id).running.remove(request)
        self._free(request.table)
        request.table, request.group_id = BlockTable(), None

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
        request.table, request.group_id, request.is_moving = BlockTable(), destination.group_id, True
        return table

    def reserve(self, request: Request, group: Group, *, is_beyond_limit: bool = False) -> bool:
        """Give a request that departed blocks on every device of `group`; False, and nothing taken, if one lacks them.

        `is_beyond_limit`: the last ids, which are not mapped so far.
        """
        table, taken = self._departed[request], dict[int, list[int]]()
        for stage in group.stages:
            if stage.device in table.ids:
                continue
            ids = stage.pool.alloc(len(table.blocks), is_beyond_limit=is_beyond_limit)
            if ids is None:
                self._free(BlockTable(ids=taken))
                return False
            taken[stage.device] = ids
        for device, ids in taken.items():
            table.spread(device, ids)
        return True

    def arrive(self, request: Request, group: Group) -> list[int]:
        """Let a request that departed run on in `group`; returns the devices that it has left, and freed blocks on.

        One that did not arrive whole has to be released next.
        """
        table = self._departed.pop(request)
        devices = [stage.device for stage in group.stages]
        left = [device for device in table.ids if device not in devices]
        for device in left:
            self.pools[device].free(table.leave(device))
        table.ids = {device: table.ids[device] for device in devices if device in table.ids}
        request.table, request.is_moving = table, False
        return left

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

    def expect_no_more(self, group: Group, table: BlockTable) -> None:
        """Free an expected table: its request does not come."""
        self._expected.remove((group, table))
        self._free(table)

    # --- block pools --------------------------------------------------------------------------------------------

    def grow(self, device: int, num_blocks: int) -> None:
        """Hand out ids below `num_blocks` on a device: they are mapped now. Lifts any limit."""
        self.pools[device].grow(num_blocks)

    def limit(self, device: int, num_blocks: int) -> None:
        """Hand out only ids below `num_blocks` on a device from now on."""
        self.pools[device].set_limit(num_blocks)

    def shrink(self, device: int, num_blocks: int) -> None:
        """Forget ids from `num_blocks` on, which nobody uses: they are about to be unmapped."""
        self.pools[device].shrink(num_blocks)

    @contextlib.contextmanager
    def emptying(self, group: Group, stage: Stage, limit: int) -> Iterator[Tail]:
        """Move blocks of a stage from beyond `limit` to free ones before it: the caller copies their KV inside.

        On leaving, requests hold the new ones, and the old are free; after an error it is the other way round. The
        group is paused, but requests may end meanwhile.
        """
        pool = stage.pool
        used = pool.used_beyond(limit)
        front = pool.alloc(min(len(used), pool.num_free)) or []
        entry = (stage.device, front)
        self._fronts.append(entry)
        try:
            yield (tail := Tail(dict(zip(used, front, strict=False)), len(front) == len(used)))
        except BaseException:
            pool.free(front)
            raise
        finally:
            self._fronts.remove(entry)
        kept = {new for request in group.running for new in request.table.rename(stage.device, tail.moved)}
        pool.free(old if new in kept else new for old, new in tail.moved.items())  # new: its request has ended

    # --- checks -------------------------------------------------------------------------------------------------

    def check(self, num_layers: int) -> None:
        """Assert that groups are complete, and that each block is held by exactly one table, or free."""
        held = defaultdict[int, list[list[int]]](list)  # by device
        tables = [request.table for group in self.groups for request in group.running]
        tables += [*self._departed.values(), *(table for _, table in self._expected)]
        for table in tables:
            table.check()
            for device, ids in table.ids.items():
                held[device].append(ids)
        for device, front in self._fronts:
            held[device].append(front)
        for device, pool in self.pools.items():
            pool.check(held[device])
        for group in self.groups:
            group.check(num_layers)
        for request in self._departed:
            assert request.is_moving and not request.table.blocks

    # --- blocks -------------------------------------------------------------------------------------------------

    @staticmethod
    def _append(table: BlockTable, group: Group, num_blocks: int) -> bool:
        if num_blocks > group.num_free:
            return False
        table.append({stage.device: stage.pool.alloc(num_blocks) or [] for stage in group.stages})
        return True

    def _free(self, table: BlockTable) -> None:
        for device, ids in table.ids.items():
            self.pools[device].free(ids)
