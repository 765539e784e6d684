"""The fleet: all groups, the block pools of their devices, and where the KV of every request is.

It is the only writer of these: of `Group.running`, `is_admitting` and `num_pauses`, of `Request.group_id`, `table` and
`is_moving`, of the sizes of block pools, of the list of groups and its epoch. Everybody else reads, and asks the fleet.
Nothing here waits or copies: whoever moves KV (engine/regroup/: exchange.py, migrate.py, swap.py) reserves room here,
has it copied, and then says how it ended.

The block store (block_store.py), which nobody else uses, has the blocks that they hold, and those that are cached.

A request is in one of four states. It waits: it belongs to no group and holds nothing. It runs. It is suspended: it
belongs to its group and holds its blocks, but is not scheduled, because a copy reads or writes them. Or it has
departed: it belongs to another group than its KV is in, until it arrives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

from kunserve.engine.batch import Decoding
from kunserve.engine.block_store import BlockStore
from kunserve.engine.blocks.block_table import Block, BlockTable, Tail
from kunserve.engine.group import Convoy, Group, Stage
from kunserve.engine.kinds.mixed_group import NearLayers, layers_of_kind, new_group
from kunserve.engine.kinds.mixed_store import MixedStore
from kunserve.engine.prefix_cache import extend_keys, full_keys, is_being_computed, most_found, num_full
from kunserve.engine.request import Request
from kunserve.planner.snapshot import Lineage, StageView
from kunserve.sizes import ceil_div


class Fleet:
    """Owns the groups and all residence of KV. `groups`, `pools` and a kind's `store` are for reading.

    `has_prefix_cache`: blocks are kept, and shared, for requests that begin alike. `window`: how many tokens one sees
    in each layer, itself among them; blocks behind the windows of all that is to come are let go. None: in some layer
    a token sees all. `near`: the layers that have one, where their KV is a kind of its own.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        has_prefix_cache: bool = False,
        window: int | None = None,
        near: NearLayers | None = None,
    ) -> None:
        self._window, self.near = window if near is None else near.window, near
        self.groups = list(groups)
        self.block_size = groups[0].block_size if groups else 1
        num_behind = None if self._window is None else self._behind_prefix
        make_store = BlockStore.of if near is None else MixedStore.of
        self._blocks = make_store(groups, num_behind, has_prefix_cache=has_prefix_cache)
        self.num_kinds, self.layers_of = 1 if near is None else 2, partial(layers_of_kind, near)
        self.prefixes, self.pools, self.store = self._blocks.prefixes, self._blocks.pools, self._blocks.of_kind
        self._epoch = 0
        self._by_id: dict[int, Group] = {}  # filled as asked
        self._by_device: dict[int, Group] = {}  # likewise
        self._next_group_id = 1 + max((group.group_id for group in groups), default=-1)
        # What `prefix_lengths` was asked for last, and the cache's version then: all groups ask for one head.
        self._lengths: tuple[tuple[Request, int] | None, dict[int, int]] = None, {}
        self._suspects, self._lost = set[int](), set[int]()  # devices
        self._departed: dict[Request, BlockTable] = {}
        self._expected: list[tuple[Group, BlockTable]] = []  # tables that requests of other groups are to get

    # --- groups -------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Return how often the grouping has changed: a plan is for one epoch only."""
        return self._epoch

    @property
    def num_running(self) -> int:
        """Return how many requests are bound to a group."""
        return sum(len(group.running) for group in self.groups)

    @property
    def working(self) -> list[Group]:
        """Return the groups that do their work: no device of theirs is suspected or lost."""
        return [group for group in self.groups if not group.is_suspect]

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold so many tokens of one request."""
        return ceil_div(num_tokens, self.block_size)

    def group(self, group_id: int) -> Group:
        """Return the group of that id."""
        if group_id not in self._by_id:  # the grouping is new
            self._by_id = {group.group_id: group for group in self.groups}
        return self._by_id[group_id]

    def make_group(self, stages: Sequence[StageView], block_size: int, lineage: Lineage | None) -> Group:
        """Return a new group, with an id of its own, on devices that there are. It joins the others by `regroup`."""
        pools = [self.store(kind).pools for kind in range(self.num_kinds)]
        chain = [Stage(*stage, *(of_kind[stage.device] for of_kind in pools)) for stage in stages]
        self._next_group_id += 1
        return new_group(self._next_group_id - 1, chain, block_size, lineage, self.near)

    def regroup(self, old: Sequence[Group], new: Sequence[Group]) -> None:
        """Put `new` in the place of `old`, and begin a new epoch."""
        gone = set(old)
        self._epoch += 1
        self._by_device.clear()
        self._blocks.regrouped(old)
        self.groups[:] = [group for group in self.groups if group not in gone] + list(new)
        self._mark_groups(new)

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

    def mark(self, device: int, *, is_suspect: bool, is_lost: bool) -> None:
        """Let the group of a device take no requests while there are others; or do nothing at all any more."""
        (self._suspects.add if is_suspect else self._suspects.discard)(device)
        (self._lost.add if is_lost else self._lost.discard)(device)
        self._mark_groups(self.groups)

    def _mark_groups(self, groups: Iterable[Group]) -> None:
        for group in groups:
            devices = {stage.device for stage in group.stages}
            group.is_suspect = not devices.isdisjoint(self._suspects)
            group.is_lost = not devices.isdisjoint(self._lost)

    # --- requests in their group --------------------------------------------------------------------------------

    def admit(self, request: Request, group: Group, *, finds_prefix: bool = False) -> None:
        """Bind a request that waits to a group that has blocks for all its tokens.

        `finds_prefix`: it has no KV yet, and takes what is there of its tokens: all but the last, which has to be
        computed.
        """
        request.group_id = group.group_id
        group.running.append(request)
        table, num_behind = request.table, self.num_behind(request.num_computed_tokens)
        self._blocks.begin_empty(table, num_behind)  # no KV comes for those
        if finds_prefix and self.prefixes is not None:
            self._begin_with_prefix(request, group)
        num_places, num_near = self.blocks_for(request.num_tokens), self.blocks_for(request.num_computed_tokens)
        is_allocated = self._blocks.hold(table, group, num_places, num_near)
        assert is_allocated, "admitted what does not fit"

    def allocate(self, request: Request, group: Group, num_tokens: int) -> bool:
        """Let a request of `group` hold blocks for its first `num_tokens`; False, and no change, if it cannot."""
        table = request.table
        if num_tokens <= (table.near or table).num_places * group.block_size:
            return True
        num_places = group.blocks_for(num_tokens)
        return self._blocks.hold(table, group, num_places, num_places)

    def allocate_next(self, requests: Iterable[Request], group: Group) -> None:
        """Let requests of `group` that decode hold blocks for their next tokens, of which there are enough."""
        full = [r for r in requests if r.num_scheduled_tokens % group.block_size == 0]
        lacking = [r for r in full if r.table.num_places * group.block_size == r.num_scheduled_tokens]
        is_allocated = self._blocks.append([r.table for r in lacking], group, 1)
        assert is_allocated, "there are enough"

    def release(self, request: Request) -> None:
        """Take a request out of its group. Its blocks are idle or free then, unless others use them."""
        assert request.group_id is not None
        group = self.group(request.group_id)
        group.running.remove(request)
        self._blocks.release(request.table, group, is_kept=True)
        request.table, request.group_id = BlockTable(), None

    def computed(self, request: Request, group: Group) -> None:
        """Let others find the blocks that a running request has filled, and let go of those that it needs no more.

        A step has computed more of its tokens. What is in flight begins with the next one, or behind it.
        """
        if self.prefixes is not None and num_full(request, group.block_size) > request.table.num_indexed:
            new = self._blocks.index(request.table, group, full_keys(request, group.block_size))
            self.prefixes.tell_stored(request, new, group.block_size)
        if self._window is not None:
            self._blocks.leave_behind(request.table, group, self.num_behind(request.num_computed_tokens))

    def due(self, decoding: Decoding, group: Group) -> Collection[Request]:
        """Return the requests of `decoding` for which `computed` has something to do."""
        if self._window is not None:
            return set(decoding.requests)
        size, pairs = group.block_size, zip(decoding.requests, decoding.ends, strict=True)
        return () if self.prefixes is None else {r for r, end in pairs if end // size > r.table.num_indexed}

    def num_behind(self, position: int) -> int:
        """Return how many blocks are behind the window of a token."""
        return 0 if self._window is None else max(0, position + 1 - self._window) // self.block_size

    def _behind_prefix(self, num_blocks: int) -> int:
        """Return how many of the first blocks are behind the window of what follows them; one at least is not."""
        return min(num_blocks - 1, self.num_behind(num_blocks * self.block_size)) if num_blocks else 0

    def _begin_with_prefix(self, request: Request, group: Group) -> None:
        """Let a request begin with the blocks that its group has of its tokens."""
        keys = extend_keys(request, group.block_size)[: most_found(request, self.block_size)]
        num_tokens = self._blocks.begin(request.table, group, keys) * group.block_size
        request.num_computed_tokens = request.num_scheduled_tokens = num_tokens
        if request.num_preemptions == 0 and not request.is_continued:
            request.num_cached_tokens = num_tokens

    def distrust(self, request: Request, group: Group) -> None:
        """Let nobody find the blocks of a running request: what was computed for it was wrong."""
        self._blocks.distrust(request.table, group)

    def prefix_lengths(self, request: Request) -> dict[int, int]:
        """Return how many blocks of a waiting request's tokens groups have, by group id; without those with none."""
        if self.prefixes is None or request.num_computed_tokens:  # KV comes back from the host whole, sharing none
            return {}
        asked = request, self.prefixes.version
        if self._lengths[0] != asked:
            keys = extend_keys(request, self.block_size)[: most_found(request, self.block_size)]
            self._lengths = asked, self.prefixes.lengths(keys)
        return self._lengths[1]

    def shared_blocks(self, request: Request, group: Group) -> int:
        """Return how many blocks a waiting request need not take in `group`: others use them, or it does without."""
        num_found = self.prefix_lengths(request).get(group.group_id, 0)
        if not num_found or self.prefixes is None:
            return 0
        return self.prefixes.num_shared(group, request.block_keys[:num_found])

    def is_prefix_coming(self, request: Request, group: Group) -> bool:
        """Return whether the next block that a waiting request would have to compute in `group` is being computed.

        Whoever began with it has the same tokens up to there: one of them computes them for all.
        """
        if self.prefixes is None:
            return False
        num_found = self.prefix_lengths(request).get(group.group_id, 0)
        if num_found >= most_found(request, self.block_size):
            return False
        return is_being_computed(extend_keys(request, group.block_size)[num_found], num_found, group)

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
        request.note("kv departed", group=source.group_id, to_group=destination.group_id, blocks=len(table.blocks))
        self._blocks.depart(table, source, destination)
        request.table, request.group_id, request.is_moving = BlockTable(), destination.group_id, True
        return table

    def reserve(self, request: Request, group: Group, *, is_beyond_limit: bool = False) -> bool:
        """Give a request that departed blocks on every device of `group`; False, and nothing taken, if one lacks them.

        `is_beyond_limit`: the last ids, which are not mapped so far.
        """
        return self._blocks.reserve(self._departed[request], group, is_beyond_limit=is_beyond_limit)

    def arrive(self, request: Request, group: Group) -> None:
        """Let a request that departed, and whose KV is all there, run on in `group`; free what it has elsewhere."""
        table = self._departed.pop(request)
        self._blocks.arrive(table, group, full_keys(request, group.block_size) if self.prefixes is not None else ())
        request.table, request.is_moving = table, False
        request.note("kv arrived", group=group.group_id)
        self.computed(request, group)

    def lose(self, request: Request) -> None:
        """Take a request that departed out of its group: its KV did not arrive, or nobody wants it any more."""
        assert request.group_id is not None
        group = self.group(request.group_id)
        request.note("kv lost", group=group.group_id)
        group.running.remove(request)
        self._blocks.release(self._departed.pop(request), group, is_kept=False)
        request.group_id, request.is_moving = None, False

    def expect(self, group: Group, num_computed_tokens: int = 0) -> BlockTable:
        """Return an empty table of `group`, for a request that runs elsewhere meanwhile: see `extend`, `hand_over`."""
        table = BlockTable()
        self._blocks.begin_empty(table, self.num_behind(num_computed_tokens) if self.num_kinds > 1 else 0)
        self._expected.append((group, table))
        return table

    def extend(self, table: BlockTable, group: Group, num_blocks: int) -> bool:
        """Let an expected table have so many blocks in all; False, and no change, if `group` has not got them."""
        return self._blocks.hold(table, group, num_blocks, num_blocks)

    def hand_over(self, request: Request, destination: Group, table: BlockTable) -> None:
        """Bind an evictable request to another group, where its KV is in an expected table by now."""
        self.release(request)
        self._expected.remove((destination, table))
        request.group_id, request.table = destination.group_id, table
        if table.near is None:  # else near ones began there
            table.num_indexed = self.num_behind(request.num_computed_tokens)  # copied after they were let go
        request.note("kv arrived", group=destination.group_id)
        destination.running.append(request)
        self.computed(request, destination)

    def expect_no_more(self, group: Group, table: BlockTable) -> None:
        """Free an expected table: its request does not come."""
        self._expected.remove((group, table))
        self._blocks.release(table, group, is_kept=False)

    # --- block pools --------------------------------------------------------------------------------------------

    def grow(self, device: int, *num_blocks: int) -> None:
        """Hand out ids below `num_blocks`, of each kind, on a device: they are mapped now. Lifts any limit."""
        for kind, number in enumerate(num_blocks):
            self.store(kind).pools[device].grow(number)

    def limit(self, device: int, *num_blocks: int) -> None:
        """Hand out only ids below `num_blocks` on a device from now on; what is beyond is to be moved (`emptying`)."""
        group = self.group_on(device)
        assert group is not None
        for kind, number in enumerate(num_blocks):
            self.store(kind).limit(device, number, group)

    def refill(self, device: int, *num_blocks: int) -> None:
        """Hand out ids below `num_blocks` on a device, of whose blocks nobody uses any."""
        self.shrink(device, *(0 for _ in num_blocks))
        self.grow(device, *num_blocks)

    def shrink(self, device: int, *num_blocks: int) -> None:
        """Forget ids from `num_blocks` on, which nobody uses: they are about to be unmapped."""
        for kind, number in enumerate(num_blocks):
            self.store(kind).pools[device].shrink(number)

    @property
    def num_shared(self) -> int:
        """Return how many blocks more requests would hold if each had blocks of its own."""
        return self._blocks.num_shared

    def num_used(self, device: int) -> int:
        """Return how many blocks requests use on a device."""
        group = self.group_on(device)
        return self.pools[device].num_used - (len(group.idle) if group else 0)

    def group_on(self, device: int) -> Group | None:
        """Return the group that a device is in; None if it is in none."""
        if not self._by_device:  # the grouping is new
            self._by_device = {stage.device: group for group in self.groups for stage in group.stages}
        return self._by_device.get(device)

    def emptying(self, group: Group, stage: Stage, limit: int, kind: int = 0) -> AbstractContextManager[Tail]:
        """Move blocks of a stage from beyond `limit` to free ones before it: the caller copies their KV inside.

        On leaving, requests hold the new ones, and the old are free; after an error it is the other way round. The
        group is paused, but requests may end meanwhile.
        """
        return self.store(kind).emptying(group, stage, limit)

    # --- cached blocks that nobody uses -------------------------------------------------------------------------

    def forget_idle(self, group: Group) -> None:
        """Free all cached blocks of a group that nobody uses."""
        self._blocks.forget_idle(group)

    def follow(self, source: Group, destinations: Sequence[tuple[Block, Group]], kind: int = 0) -> None:
        """Send idle blocks of a group, the hottest first, to other groups. They set out by `take_convoy`."""
        self.store(kind).follow(source, destinations)

    def take_convoy(self, group: Group, most: int, kind: int = 0) -> Convoy | None:
        """Take the hottest blocks that follow to a group, with blocks on all its devices; None if none is left.

        Where there is no room for them, they and all colder ones are given up.
        """
        return self.store(kind).take_convoy(group, most)

    def end_convoy(self, convoy: Convoy, *, is_lost: bool = False, kind: int = 0) -> None:
        """Let others find the blocks of a convoy: its KV has arrived. Or free them: it is lost."""
        self.store(kind).end(convoy, is_lost=is_lost)

    @property
    def num_following(self) -> int:
        """Return how many cached blocks are on their way."""
        return self._blocks.num_following

    def end_following(self, group: Group) -> None:
        """Let others find blocks of a group again that were beyond a limit."""
        self._blocks.end_following(group)

    def give_up_followers(self, group: Group) -> bool:
        """Free cached blocks that follow, from or to devices of a group; False if there were none."""
        return self._blocks.give_up(group)

    # --- checks -------------------------------------------------------------------------------------------------

    def check(self, num_layers: int) -> None:
        """Assert that groups are complete, and that each block is named by the tables that hold it, idle, or free."""
        tables = [request.table for group in self.groups for request in group.running]
        tables += [*(table for _, table in self._expected), *self._departed.values()]
        self._blocks.check(tables, self.groups)
        for request in self._departed:
            assert request.is_moving and not request.table.blocks
        for table in tables[: -len(self._departed) or None]:
            table.check()
        for group in self.groups:
            group.check(num_layers)
