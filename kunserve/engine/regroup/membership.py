"""Membership: devices that go and come. The group of one that goes dissolves; what is left of it forms new groups.

All requests of a group that dissolves are recomputed from their tokens, at once where another group has room: a part of
the layers' KV is gone with the device, and hidden states of the others cannot be had without it. The weights that the
remaining devices lack come from the host copy, or from a device that has them. Those that can make no group join one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import structlog

from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.regroup.boundary import Boundary
from kunserve.engine.regroup.live_kv import by_admission
from kunserve.engine.regroup.reconfigure import Reconfigure
from kunserve.engine.regroup.remap import Remap
from kunserve.engine.regroup.transition import Transition
from kunserve.engine.schedule.scheduler import Scheduler
from kunserve.engine.signals import Signals
from kunserve.engine.survive.health import DeviceState, Health
from kunserve.errors import ConflictError, DeviceLostError
from kunserve.gpu.refusal import log_failure
from kunserve.planner.layouts import blocks_of
from kunserve.planner.plan import Join, NewGroup
from kunserve.planner.rebuild import plan_join, plan_rebuild
from kunserve.planner.snapshot import GroupView, Snapshot

log = structlog.get_logger()

RETRY_S = 1.0  # after new groups could not be made of devices that are there
MOST_ATTEMPTS = 3  # then the devices stay idle, if there are other groups
GONE = (DeviceState.LOST, DeviceState.REMOVED)
LAST_COPY_S = 0.5  # for copies that a lost device has begun


class Membership:
    """Replaces groups whose devices go, and gives devices that come a group.

    `snapshot` shows groups that do their work, `need_blocks` what the server should hold. `halt` ends the engine: no
    complete copy of the weights is left.
    """

    def __init__(
        self,
        fleet: Fleet,
        scheduler: Scheduler,
        reconfigure: Reconfigure,
        boundary: Boundary,
        remap: Remap,
        health: Health,
        signals: Signals,
        snapshot: Callable[[], Snapshot],
        need_blocks: Callable[[], int],
        least_blocks: int,
        reopen: Callable[[int], None],
        limit_tokens: Callable[[int], None],
        halt: Callable[[], None],
    ) -> None:
        """Make groups. `least_blocks`: of a group, for the longest request. `limit_tokens` gets that length in tokens.

        `reopen` puts a new device, with nothing in it, in the place of one that is gone. It blocks.
        """
        self._snapshot, self._need_blocks = snapshot, need_blocks
        self._fleet, self._scheduler, self._reconfigure = fleet, scheduler, reconfigure
        self._boundary, self.remap, self._health, self._signals = boundary, remap, health, signals
        self._least_blocks, self._reopen, self._limit_tokens, self._halt = least_blocks, reopen, limit_tokens, halt

    # --- what can happen ----------------------------------------------------------------------------------------

    async def lose(self) -> Transition | None:
        """Replace all groups that have lost a device; None if there are none any more, or no group can be made.

        Begins when the transitions that they are in have ended: those have stopped waiting for the device by now. All
        groups go at once, since only together the devices that are left of them may hold a complete copy.
        """
        num_failed = 0
        while True:
            await self._until_free("lose", self._lost_groups)
            if not (lost := self._lost_groups()):
                return None
            try:
                return await self._rebuild("lose", lost, may_idle=num_failed == MOST_ATTEMPTS)
            except DeviceLostError:
                continue  # another device was lost meanwhile
            except NothingLeftError:
                if lost != self._lost_groups():  # with what is left of those, there may be a copy
                    continue
                log.error("no complete copy of the weights is left: the server ends")
                self._halt()
                return None
            except Exception as error:
                num_failed = min(num_failed + 1, MOST_ATTEMPTS)
                log_failure("new groups could not be made, trying again", error)
                await asyncio.sleep(RETRY_S)

    @contextmanager
    def leaving(self, device: int) -> Iterator[None]:
        """Give the group of a device no new requests inside, while there are others: the device is to be removed.

        ConflictError if it is gone, or about to be, or no complete copy would be left.
        """
        if self._health.is_leaving(device) or self._health.state(device) in GONE:
            raise ConflictError(f"{self._health.devices[device].name} is not there, or is taken out already")
        groups = self._groups_on(device)
        if groups and self._plan(groups, device) is None and not self._others(groups, is_suspect=False):
            raise NothingLeftError
        self._health.retire(device)
        try:
            yield
        finally:
            self._health.stay(device)

    async def drain(self, device: int, drain_s: float) -> None:
        """Return when the group of a device has no requests any more, or is replaced; at the latest after `drain_s`."""
        group = self._fleet.group_on(device)
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                while group is not None and group.running and self._fleet.group_on(device) is group:
                    await self._signals.next_commit()

    async def remove(self, device: int) -> Transition:
        """Take a device that is leaving out: what its group has still to do is done elsewhere. Closes the device.

        ConflictError, and nothing has changed, if it was lost, or no complete copy would be left.
        """
        await self._until_free("remove", lambda: self._groups_on(device))
        if self._health.devices[device].is_lost:
            raise ConflictError(f"{self._health.devices[device].name} is lost")
        transition = await self._rebuild("remove", self._groups_on(device), without=device)
        self._health.remove(device)
        await asyncio.to_thread(self._health.devices[device].close)
        return transition

    async def add(self, device: int) -> Transition:
        """Put a device that was lost or taken out in again: a new one, in a group that it may be alone in.

        ConflictError if it is at work, or cannot be opened without a restart.
        """
        is_gone = self._health.state(device) in GONE
        if self._fleet.group_on(device) is not None:
            if is_gone:
                raise ConflictError("the group of this device is being replaced", retry_after_s=1)
            raise ConflictError(f"{self._health.devices[device].name} is at work")
        if is_gone:  # else it was opened before, and there was no group for it
            await asyncio.to_thread(self._reopen, device)
            self._health.welcome(device)
        await self._until_free("add", list)
        return await self._rebuild("add", [])

    async def join(self) -> Transition | None:
        """Let devices that are in no group, and can make none, become stages of one; None if that gives nothing.

        Their memory and compute would be of no use. Raises ConflictError or DeviceError if it cannot be now.
        """
        while True:
            await self._until_free("add", list)
            plan = self._plan_join()
            if plan is None:
                return None
            if self._reconfigure.transitions.in_the_way("add", [plan.group_id]) is None:
                break
            await self._signals.next_commit()
        transition = await self._reconfigure.join(plan)
        self._limit_requests()
        return transition

    @property
    def idle(self) -> list[int]:
        """Return the devices that do their work, but are in no group."""
        ok = [i for i in range(len(self._health.devices)) if self._health.state(i) is DeviceState.OK]
        return [device for device in ok if self._fleet.group_on(device) is None]

    def _plan_join(self) -> Join | None:
        idle, snapshot = self.idle, self._snapshot()
        if not idle or self._plan([]) is not None:
            return None
        free = [view for view in snapshot.devices if view.device in idle]
        return plan_join(snapshot, free, self._need_blocks(), self._least_blocks)

    # --- how ----------------------------------------------------------------------------------------------------

    async def _rebuild(
        self, kind: str, old: Sequence[Group], *, without: int | None = None, may_idle: bool = False
    ) -> Transition:
        """Put groups of all devices that are free then in the place of `old`.

        `may_idle`: of none, if other groups do their work. NothingLeftError if there are no others, and it needs them.
        """
        transitions, remap = self._reconfigure.transitions, self.remap
        with transitions.begin(kind, [group.group_id for group in old]) as (transition, _), self._boundary.paused(old):
            with transitions.step(transition, "boundary"):
                await self._boundary.reached(old)
                await self._copies_ended(old)
            has_others = bool(self._others(old, is_suspect=kind == "lose"))
            new = None if may_idle and has_others else self._plan(old, without)
            if new is None and not has_others and kind != "add":
                raise NothingLeftError
            for group in old:
                self._dissolve(group)
            layouts = remap.planned(layout for group in new or () for layout in group.layouts)
            before = remap.now(old)
            try:
                with transitions.step(transition, "remap"):
                    await remap.apply(layouts)
                transition.planned_bytes = remap.num_unfilled_bytes(layouts)
                with transitions.step(transition, "load"):
                    transition.weight_bytes = await remap.load(layouts)
                self._assert_alive(layouts)
            except BaseException as error:  # a group that has lost no device goes on
                whole = {stage.device for group in old if not group.is_lost for stage in group.stages}
                await remap.go_back({device: before[device] for device in whole}, error)
                raise
            transitions.commit(transition, old, [self._make_group(group) for group in new or ()])
        self._limit_requests()
        return transition

    async def _copies_ended(self, groups: Sequence[Group]) -> None:
        """Wait until the lost devices of groups copy nothing any more, but not long: one may hang in the midst of it.

        It would read what is about to be unmapped under it.
        """
        devices = [self._health.devices[stage.device] for group in groups for stage in group.stages]
        lost = [device for device in devices if device.is_lost]
        await asyncio.gather(*(asyncio.to_thread(device.copies_have_ended, LAST_COPY_S) for device in lost))

    def _assert_alive(self, devices: Iterable[int]) -> None:
        """Raise DeviceLostError if one was lost while in no group: nobody would replace the group that it gets."""
        for device in (self._health.devices[index] for index in devices):
            if device.is_lost:
                raise DeviceLostError(f"{device.name} is lost")

    def _dissolve(self, group: Group) -> None:
        """Take all requests out of a group that stands still: they wait again, in the order of their admission."""
        self._fleet.give_up_followers(group)
        for request, _ in reversed(by_admission([group])):
            self._scheduler.preempt(group, request, is_hurried=True)
        self._fleet.forget_idle(group)
        self._signals.wake()

    def _plan(self, old: Sequence[Group], without: int | None = None) -> tuple[NewGroup, ...] | None:
        """Plan groups of the devices that no group but `old` has; None if they cannot make one."""
        snapshot, gone = self._snapshot(), {group.group_id for group in old}
        others = tuple(view for view in snapshot.groups if view.group_id not in gone)
        busy = {stage.device for group in self._fleet.groups if group not in old for stage in group.stages}
        free = [
            view
            for view in snapshot.devices
            if view.device not in busy and view.device != without and self._health.state(view.device) not in GONE
        ]
        held = {stage.device: stage.view for group in old for stage in group.stages}
        rest = replace(snapshot, groups=others)
        return plan_rebuild(rest, free, held, self._need_blocks(), self._least_blocks) if free else None

    def _make_group(self, group: NewGroup) -> Group:
        for layout in group.layouts:
            self._fleet.refill(layout.stage.device, *blocks_of(self.remap.shape, layout))
        return self._fleet.make_group(group.stages, self.remap.shape.block_size, group.lineage)

    def _limit_requests(self) -> None:
        """Tell how long a request can be now, unless groups are about to come in the place of some that are lost."""
        if not self._lost_groups():
            self._limit_tokens(self._longest_blocks() * self._fleet.block_size)

    def _longest_blocks(self) -> int:
        """Return the blocks that one request can have: those of the largest group, suspected or not.

        Memory may have to move to the kind of KV that is lacking first: it does for one that waits (`Pressure`).
        """
        snapshot = self._snapshot()
        groups = (GroupView(g.group_id, tuple(s.view for s in g.stages), 0, g.lineage) for g in self._others([]))
        return replace(snapshot, model=snapshot.model.with_most_full(), groups=tuple(groups)).longest_blocks()

    def _groups_on(self, device: int) -> list[Group]:
        """Return the group of a device, or none."""
        group = self._fleet.group_on(device)
        return [group] if group is not None else []

    def _lost_groups(self) -> list[Group]:
        return [group for group in self._fleet.groups if group.is_lost]

    def _others(self, groups: Sequence[Group], *, is_suspect: bool = True) -> list[Group]:
        """Return all groups that have lost no device, but for these; if not `is_suspect`, only those that do work."""
        others = [group for group in self._fleet.groups if group not in groups and not group.is_lost]
        return [group for group in others if is_suspect or not group.is_suspect]

    async def _until_free(self, kind: str, groups: Callable[[], Sequence[Group]]) -> None:
        """Return when no transition is in the way of one of this kind, of groups that may be others by then."""
        while self._reconfigure.transitions.in_the_way(kind, [group.group_id for group in groups()]) is not None:
            self._reconfigure.cancel_restore()
            await self._signals.next_commit()


class NothingLeftError(ConflictError):
    """The devices that are left cannot hold one complete copy of the weights."""

    def __init__(self) -> None:
        super().__init__("the last complete copy of the weights needs this device")
