"""Migrate: live migration of running requests between groups, as Llumnix does it.

Every 50 ms, while anything runs, the most loaded groups are paired with the least loaded, and the shortest decoding
request of each source moves. It keeps running there while stage after stage copies the blocks that are complete;
when few are left it stops, the rest follows, and it runs on at the destination. A migration that cannot be finished
is given up: the request never left.

Llumnix's second kind, migration of queued requests, is not needed: the queue is global (see policy.Migrate).
Only groups of one device migrate: both ends then hold all layers, and one block table is all there is to copy.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kunserve.engine.blocks.block_table import BlockTable
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group, Stage
from kunserve.engine.regroup.transfer import Transfers
from kunserve.engine.request import Request
from kunserve.engine.schedule.policy import Freeness, pair_groups, remaining_steps, shortest_running
from kunserve.engine.schedule.scheduler import Scheduler
from kunserve.engine.signals import Signals
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.links import Links
from kunserve.gpu.refusal import log_failure

PAIR_EVERY_S = 0.05
MAX_COPY_ROUNDS = 3  # copies of complete blocks, the last of them stop-and-copy
LAST_ROUND_BLOCKS = 16  # fewer than these left: stop and copy


@dataclass(slots=True, eq=False)
class Migrating:
    """One request on its way. The blocks in `table` are at the destination; the first `num_copied` have arrived."""

    request: Request
    source: Group
    destination: Group
    num_preemptions: int  # of the request when it began: another means that its KV is gone
    table: BlockTable
    num_copied: int = 0

    @property
    def is_here(self) -> bool:
        """Return whether the request still has its KV at the source."""
        request = self.request
        return request.group_id == self.source.group_id and request.num_preemptions == self.num_preemptions

    @property
    def is_wanted(self) -> bool:
        """Return whether the request still runs at the source, and no transition waits for either group."""
        is_paused = self.source.is_paused or self.destination.is_paused
        return self.is_here and self.request.finish_reason is None and not is_paused


class Migration:
    """Moves requests from loaded groups to free ones: one at a time from each source."""

    def __init__(
        self,
        fleet: Fleet,
        scheduler: Scheduler,
        memories: Sequence[DeviceMemory],
        links: Links,
        signals: Signals,
    ) -> None:
        self._fleet, self._scheduler, self._signals = fleet, scheduler, signals
        self._transfers = Transfers(memories, links)
        self._migrating: dict[int, Migrating] = {}  # by source group id
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_stopped = False
        self.num_given_up = 0

    @property
    def num_bytes(self) -> int:
        """Return the bytes that were copied since the server started."""
        return self._transfers.num_bytes

    @property
    def is_watching(self) -> bool:
        """Return whether groups will be looked at again in a moment."""
        return self._timer is not None

    # --- what the engine calls ----------------------------------------------------------------------------------

    def observe(self) -> None:
        """Look for pairs in 50 ms, if anything runs."""
        if self._timer is None and not self._is_stopped and len(self._fleet.groups) > 1 and self._fleet.num_running:
            self._timer = asyncio.get_running_loop().call_later(PAIR_EVERY_S, self.pair)

    def stepped(self, group: Group, seconds: float) -> None:
        """Do nothing: steps do not matter here."""

    def is_busy(self, groups: Sequence[Group]) -> bool:
        """Tell whether a request is on its way from or to one of these groups."""
        return any(m.source in groups or m.destination in groups for m in self._migrating.values())

    def finished(self, request: Request) -> None:
        """Do nothing: the migration of a request that ended, if there is one, sees that."""

    async def stop(self) -> None:
        """End what is under way, and begin nothing more."""
        self._is_stopped = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # --- who goes where -----------------------------------------------------------------------------------------

    def pair(self) -> None:
        """Begin a migration from each loaded group that has a free one to go to."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        groups = [g for g in self._fleet.groups if len(g.stages) == 1 and not g.is_paused and g.is_admitting]
        groups = [g for g in groups if not g.is_suspect]
        by_id = {group.group_id: group for group in groups}
        for source_id, destination_id in pair_groups(self._freeness(groups)):
            source, destination = by_id[source_id], by_id[destination_id]
            may_run_more = len(destination.running) < self._scheduler.limits.max_running(destination)
            if source_id not in self._migrating and may_run_more and (request := shortest_running(source)) is not None:
                self.begin(request, source, destination)
        self.observe()

    def _freeness(self, groups: Sequence[Group]) -> list[Freeness]:
        """Return how free each group is. What waits is nobody's yet: each counts an equal share as one request."""
        scheduler, share = self._scheduler, 1 / len(self._fleet.groups)
        killed = Counter(scheduler.preempted_by.values())
        num_waiting = len(scheduler.waiting) * share
        blocks = self._fleet.blocks_for(scheduler.waiting.num_tokens) * share
        return [
            Freeness(g.group_id, remaining_steps(g.num_free, len(g.running), blocks, num_waiting), killed[g.group_id])
            for g in groups
        ]

    # --- one migration ------------------------------------------------------------------------------------------

    def begin(self, request: Request, source: Group, destination: Group) -> None:
        """Move a decoding request; nothing else may be on its way from `source`."""
        table = self._fleet.expect(destination, request.num_computed_tokens)
        migrating = Migrating(request, source, destination, request.num_preemptions, table)
        assert source.group_id not in self._migrating
        self._migrating[source.group_id] = migrating
        task = asyncio.create_task(self._migrate(migrating), name="migrate")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _migrate(self, m: Migrating) -> None:
        has_arrived = False
        try:
            has_arrived = await self._copy_in_rounds(m)
        except Exception as error:
            log_failure("migration failed, the request stays", error, request=m.request.request_id)
        finally:
            self._end(m, has_arrived=has_arrived)

    async def _copy_in_rounds(self, m: Migrating) -> bool:
        """Copy while it runs, then stop it and copy the rest; False if that cannot be."""
        for _ in range(MAX_COPY_ROUNDS):
            if not m.is_wanted:
                return False
            computed = m.request.num_computed_tokens
            if m.source.blocks_for(computed) - m.num_copied < LAST_ROUND_BLOCKS:
                return await self._stop_and_copy(m)
            complete = computed // m.source.block_size
            if not self._allocate(m, complete):
                return False
            await self._copy(m, complete)
        return False  # it grows faster than it is copied

    async def _stop_and_copy(self, m: Migrating) -> bool:
        self._fleet.suspend(m.request)
        while m.is_here and m.request.num_in_flight:  # a step that fails takes its KV
            await self._signals.next_commit(m.source)
        if not m.is_here or m.request.finish_reason is not None or not self._allocate(m, m.request.num_places):
            return False
        await self._copy(m, m.source.blocks_for(m.request.num_computed_tokens))
        return m.request.finish_reason is None

    def _allocate(self, m: Migrating, num_blocks: int) -> bool:
        """Hold `num_blocks` at the destination; False, and no change, if it has not got them."""
        return self._fleet.extend(m.table, m.destination, num_blocks)

    async def _copy(self, m: Migrating, end: int) -> None:
        """Copy blocks up to `end`, all layers. Stops early for a request that is not wanted any more."""
        source, target = _stage(m.source).device, _stage(m.destination)
        for kind, (of_source, of_target) in enumerate(_by_kind(m.request.table, m.table)):
            new = slice(max(m.num_copied, of_target.num_behind), end)
            layers = self._fleet.layers_of(kind, range(target.first_layer, target.last_layer))
            read, write = of_source.ids[source][new].tolist(), of_target.ids[target.device][new].tolist()
            if not await self._transfers.between(
                source, target.device, layers, read, write, is_wanted=lambda: m.is_wanted or m.request.is_moving
            ):
                return
        m.num_copied = end

    def _end(self, m: Migrating, *, has_arrived: bool) -> None:
        """Let a request run on at the destination, or at the source; do nothing if it has ended on the way."""
        del self._migrating[m.source.group_id]
        is_stopped = m.is_here and m.request.is_moving
        if is_stopped:
            self._fleet.resume(m.request)
        if has_arrived:
            self._scheduler.hand_over(m.request, m.destination, m.table)
        else:
            self.num_given_up += 1
            self._fleet.expect_no_more(m.destination, m.table)
            if is_stopped and m.request.finish_reason is not None and m.request.num_in_flight == 0:
                self._fleet.release(m.request)
        for group in (m.source, m.destination):
            self._signals.progress(group.group_id)
            self._signals.wake(group)


def _by_kind(source: BlockTable, target: BlockTable) -> Iterator[tuple[BlockTable, BlockTable]]:
    """Yield what both tables hold of each kind."""
    yield source, target
    if source.near is not None and target.near is not None:
        yield source.near, target.near


def _stage(group: Group) -> Stage:
    """Return the only stage of a group."""
    (stage,) = group.stages
    return stage
