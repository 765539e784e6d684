"""Membership: devices that go and come. The group of one that goes dissolves; what is left of it forms new groups.

All requests of a group that dissolves are recomputed from their tokens, at once where another group has room: a part of
the layers' KV is gone with the device, and hidden states of the others cannot be had without it. The weights that the
remaining devices lack come from the host copy, or from a device that has them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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
from kunserve.planner.plan import Part
from kunserve.planner.rebuild import plan_rebuild
from kunserve.planner.snapshot import GroupView, Snapshot

log = structlog.get_logger()

RETRY_S = 1.0  # after new groups could not be made of devices that are there


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
        fit: Callable[[int], None],
        halt: Callable[[], None],
    ) -> None:
        """`least_blocks`: that a group should hold, for the longest request. `fit` is told the tokens that one has.

        `reopen` puts a new device, with nothing in it, in the place of one that is gone. It blocks.
        """
        self._snapshot, self._need_blocks = snapshot, need_blocks
        self._fleet, self._scheduler, self._reconfigure = fleet, scheduler, reconfigure
        self._boundary, self._remap, self._health, self._signals = boundary, remap, health, signals
        self._least_blocks, self._reopen, self._fit, self._halt = least_blocks, reopen, fit, halt

    # --- what can happen ----------------------------------------------------------------------------------------

    async def lose(self, device: int) -> Transition | None:
        """Replace the group of a device that was lost; None if it was in none, or no group can be made any more.

        Begins when the transition that the group is in has ended: its own waits for the device have, by now.
        """
        while (group := self._fleet.group_on(device)) is not None:
            try:
                await self._until_free(group)
                return await self._rebuild("lose", group)
            except (ConflictError, DeviceLostError):
                continue  # another transition was faster, or another device was lost meanwhile
            except NothingLeftError:
                log.error("no complete copy of the weights is left: the server ends")
                self._halt()
                return None
            except Exception as error:
                log_failure("new groups could not be made, trying again", error, device=device)
                await asyncio.sleep(RETRY_S)
        return None

    async def remove(self, device: int, drain_s: float) -> Transition:
        """Take a device out: let its group's requests finish for `drain_s`, recompute the rest elsewhere, and close it.

        ConflictError, and nothing has changed, if it is not at work, or no complete copy would be left.
        """
        group = self._fleet.group_on(device)
        if self._health.state(device) is not DeviceState.OK or group is None:
            raise ConflictError(f"{self._health.devices[device].name} is not at work")
        if not self._others(group) and self._plan(group, {device}) is None:
            raise ConflictError("the last complete copy of the weights needs this device")
        self._health.retire(device)
        try:
            await self._drained(group, drain_s)
            await self._until_free(group)
            transition = await self._rebuild("remove", group, without=device)
        except BaseException:
            self._health.welcome(device)
            raise
        self._health.remove(device)
        await asyncio.to_thread(self._health.devices[device].close)
        return transition

    async def add(self, device: int) -> Transition:
        """Put a device that was lost or taken out in again: a new one, in a group that it may be alone in.

        ConflictError if it is at work, or cannot be opened without a restart.
        """
        is_gone = self._health.state(device) in (DeviceState.LOST, DeviceState.REMOVED)
        if self._fleet.group_on(device) is not None:
            if is_gone:
                raise ConflictError("the group of this device is being replaced", retry_after_s=1)
            raise ConflictError(f"{self._health.devices[device].name} is at work")
        if is_gone:  # else it was opened before, and there was no group for it
            await asyncio.to_thread(self._reopen, device)
            self._health.welcome(device)
        return await self._rebuild("add", None)

    # --- how ----------------------------------------------------------------------------------------------------

    async def _rebuild(self, kind: str, group: Group | None, without: int | None = None) -> Transition:
        """Put groups of all devices that are free then in the place of `group`."""
        transitions, remap = self._reconfigure.transitions, self._remap
        ids = [] if group is None else [group.group_id]
        with transitions.begin(kind, ids) as (transition, old), self._boundary.paused(old):
            with transitions.step(transition, "boundary"):
                await self._boundary.reached(old)
            for gone in old:
                self._dissolve(gone)
            parts = self._plan(group, set() if without is None else {without})
            if parts is None and not self._others(group):
                raise NothingLeftError
            layouts = remap.planned(layout for part in parts or () for layout in part.layouts)
            with transitions.step(transition, "remap"):
                await remap.apply(layouts)
            transition.planned_bytes = remap.num_unfilled_bytes(layouts)
            with transitions.step(transition, "load"):
                transition.weight_bytes = await remap.load(layouts)
            transitions.commit(transition, old, [self._form(part) for part in parts or ()])
        self._fit(self._longest_blocks() * self._fleet.block_size)
        return transition

    def _dissolve(self, group: Group) -> None:
        """Take all requests out of a group that stands still: they wait again, in the order of their admission."""
        self._fleet.give_up_followers(group)
        for request, _ in reversed(by_admission([group])):
            self._scheduler.preempt(group, request)
        self._fleet.forget_idle(group)
        self._signals.wake()

    def _plan(self, group: Group | None, without: set[int]) -> tuple[Part, ...] | None:
        """Plan groups of the devices that no other group has; None if they cannot make one."""
        snapshot = self._snapshot()
        others = [view for view in snapshot.groups if group is None or view.group_id != group.group_id]
        busy = {stage.device for g in self._fleet.groups if g is not group for stage in g.stages} | without
        free = [
            view
            for view in snapshot.devices
            if view.device not in busy and self._health.state(view.device) in (DeviceState.OK, DeviceState.SUSPECT)
        ]
        held = {stage.device: stage.view for stage in (group.stages if group is not None else ())}
        rest = Snapshot(snapshot.epoch, snapshot.model, snapshot.devices, tuple(others))
        return plan_rebuild(rest, free, held, self._need_blocks(), self._least_blocks) if free else None

    def _form(self, part: Part) -> Group:
        for stage, num_blocks in zip(part.stages, part.num_blocks, strict=True):
            self._fleet.refill(stage.device, num_blocks)
        return self._fleet.make_group(part.stages, self._remap.shape.block_size, part.origin)

    def _longest_blocks(self) -> int:
        """Return the blocks that one request can have: those of the largest group, suspected or not."""
        groups = (GroupView(g.group_id, tuple(s.view for s in g.stages), 0, g.origin) for g in self._others(None))
        return replace(self._snapshot(), groups=tuple(groups)).longest_blocks()

    def _others(self, group: Group | None) -> list[Group]:
        return [other for other in self._fleet.groups if other is not group and not other.is_lost]

    async def _until_free(self, group: Group) -> None:
        """Return when no transition is in the way of replacing a group, which may have another's id by then."""
        while self._reconfigure.transitions.in_the_way("lose", [group.group_id]) is not None:
            self._reconfigure.cancel_restore()
            await self._signals.next_commit()

    async def _drained(self, group: Group, drain_s: float) -> None:
        """Return when a group has no requests any more, at the latest after `drain_s`."""

        async def drain() -> None:
            while group.running and self._fleet.group_on(group.stages[0].device) is group:
                await self._signals.next_commit()

        try:
            await asyncio.wait_for(drain(), drain_s)
        except TimeoutError:
            return


class NothingLeftError(Exception):
    """The devices that are left cannot hold one complete copy of the weights."""
