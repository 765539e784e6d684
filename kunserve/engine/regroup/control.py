"""Control: watches the engine, asks the planner, and hands its plans to reconfigure. Decides nothing by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import structlog

from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.regroup.live_kv import loss_of
from kunserve.engine.regroup.membership import Membership
from kunserve.engine.regroup.pressure import Pressure
from kunserve.engine.regroup.reconfigure import Reconfigure
from kunserve.engine.regroup.transition import Transition
from kunserve.engine.regroup.worth import Worth
from kunserve.engine.request import Request
from kunserve.engine.schedule.scheduler import Scheduler
from kunserve.engine.signals import Signals, loop_time
from kunserve.errors import ConflictError, InvalidRequestError, OverloadedError
from kunserve.gpu.refusal import is_refusal
from kunserve.model.host_copy import LoadedFrom
from kunserve.observe.metrics import Metrics
from kunserve.planner.drop import plan_drop, plan_drop_of
from kunserve.planner.overload import Relaxation, Thresholds
from kunserve.planner.plan import RestorePlan
from kunserve.planner.restore import plan_restore
from kunserve.planner.snapshot import DeviceView, GroupView, Snapshot
from kunserve.sampling import FinishReason
from kunserve.sizes import format_size

log = structlog.get_logger()

# Factors of output lengths and of the number of requests, by which demand is multiplied before a plan. Groups merge for
# little more than is known now: each merge makes a chain longer, and one more can follow. But a chain cannot be cut
# anew, so it is cut for much more. Source: docs/measurements.md, "The planner's constants".
MERGE_HEADROOM = (1.25, 1.1)
CUT_HEADROOM = (2.0, 1.5)
MIX_STAYS = 10.0  # times as long as a rebalance took, until one goes back: for all groups stood still meanwhile
RETRY_S = 1.0  # after a transition that failed
WEIGH_EVERY_S = 0.1  # what was not worth it
# Least pause between two looks for a restore, unless a fiftieth of the hold time is less: each measures all requests.
LOOK_EVERY_S = 0.1
TIMER_SLACK_S = 0.001  # added to timers: by rounding, one that fires on time may find its time not quite over


class OverloadControl:
    """Drops and restores as demand asks for, or as an operator does."""

    def __init__(
        self,
        fleet: Fleet,
        scheduler: Scheduler,
        reconfigure: Reconfigure,
        membership: Membership,
        signals: Signals,
        metrics: Metrics,
        worth: Worth,
        devices: Sequence[DeviceView],
        thresholds: Thresholds,
        longest: int,
        *,
        is_automatic: bool,
    ) -> None:
        self._fleet, self._scheduler = fleet, scheduler
        self.reconfigure, self.membership, self._signals, self._metrics = reconfigure, membership, signals, metrics
        self._worth, self._devices, self._thresholds = worth, tuple(devices), thresholds
        self.is_automatic, self._is_stopping = is_automatic, False
        self._relaxation = Relaxation()
        self._not_before_s = 0.0
        self.pressure = Pressure(fleet, scheduler, thresholds, longest, self._look_in)
        self._look_every_s = min(LOOK_EVERY_S, thresholds.hold_s / 50)
        self._next_look_s = 0.0
        self._next_look: asyncio.TimerHandle | None = None
        self._undropped: tuple[int, int] | None = None  # epoch; blocks without any drop, 0 if there is none
        self._merged_epoch: int | None = None  # in which no two groups can merge, however much is needed
        self._tasks: set[asyncio.Task[Transition | None]] = set()  # under way, or about to begin
        self._rebuilds = set[asyncio.Task[Transition | None]]()  # of those, the ones that drops may run beside
        self._removals = set[asyncio.Future[dict[str, Any]]]()  # whose groups drain

    @property
    def tasks(self) -> frozenset[asyncio.Task[Transition | None]]:
        """Return the transitions that are under way or about to begin."""
        return frozenset(self._tasks)

    # --- what the engine calls ----------------------------------------------------------------------------------

    def observe(self, changed: Sequence[Group]) -> None:
        """Look at the engine before it schedules, and begin what the planner says. Cheap while nothing is tight."""
        now = loop_time()
        if self._begin_rebalance(changed) or not self.is_automatic:
            return
        self._worth.look(now)
        if now < self._not_before_s:
            return
        may_drop = self._tasks <= self._rebuilds and self._merged_epoch != self._fleet.epoch
        if (may_drop or self.reconfigure.is_cancellable) and self.pressure.is_too_high(changed):
            self._relaxation = Relaxation()
            if may_drop:
                self.begin_drop(now)
            else:
                self.reconfigure.cancel_restore()
        elif not self._tasks and self._is_dropped() and self._may_look(now) and self._may_be_low():
            self._begin_restore_if_relaxed(now)

    def finished(self, request: Request) -> None:
        """Learn how long outputs are from a request that ended."""
        if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.pressure.finished(request.num_output_tokens)

    def state(self, num_transitions: int | None = None) -> dict[str, Any]:
        """Return for `/kunserve/state` what weights come from, and the last so many transitions, or all remembered."""
        shown = self.reconfigure.transitions.remembered[-(num_transitions or 0) :]
        loader = self.reconfigure.loader
        return {
            "host_copy": str(loader.host.kind),
            "weight_sources": {str(source): loader.num_bytes[source] for source in LoadedFrom},
            "transitions": [transition.state() for transition in shown],
        }

    async def stop(self) -> None:
        """End what is under way, and begin nothing more."""
        self.is_automatic, self._is_stopping = False, True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # --- what operators call ------------------------------------------------------------------------------------

    async def drop(self, group_ids: Sequence[int] | None = None, *, is_forced: bool = False) -> dict[str, Any]:
        """See `Engine.drop`."""
        self._refuse_if_busy()
        snapshot = self.snapshot()
        if group_ids is None:
            if len(snapshot.groups) < 2:
                raise ConflictError("there is one group only: nothing to merge")
            group_ids = _two_smallest(snapshot)
        [merge] = plan_drop_of(snapshot, group_ids, self._need_blocks(*CUT_HEADROOM)).merges
        if not is_forced and (loss := loss_of(self._fleet, snapshot, merge)) is not None:
            raise ConflictError(
                f"the KV of live requests cannot follow its layers: to free {format_size(merge.freed_bytes)} of "
                f"weights, {loss.num_tokens} tokens of {loss.num_requests} requests would be computed again; "
                f'"force": true drops nevertheless'
            )
        committed = asyncio.get_running_loop().create_future()
        drop = self.reconfigure.drop(snapshot, merge, committed.set_result, most_lost_blocks=None if is_forced else 0)
        return await self._until_committed(drop, committed)

    def would_drop(self) -> dict[int, list[str]]:
        """Return the units by device that the two smallest groups would drop in a merge now; none if they cannot."""
        snapshot = self.snapshot()
        if len(snapshot.groups) < 2:
            return {}
        try:
            [merge] = plan_drop_of(snapshot, _two_smallest(snapshot)).merges
        except ConflictError:
            return {}
        return self.reconfigure.would_drop(merge)

    async def restore(self, group_ids: Sequence[int] | None = None) -> dict[str, Any]:
        """See `Engine.restore`."""
        self._refuse_if_busy()
        known = {group.group_id for group in self._fleet.groups}
        if group_ids is not None and (unknown := [i for i in group_ids if i not in known]):
            raise InvalidRequestError(f"no group {unknown[0]}; there are {sorted(known)}", param="groups")
        snapshot = self.snapshot()
        plan = plan_restore(snapshot)
        splits = [s for s in plan.splits if group_ids is None or s.group_id in group_ids] if plan else []
        if not splits:
            raise ConflictError("no such group is merged, or its live requests do not fit without the drop")
        splits = splits[:1] if group_ids is None else splits
        committed = asyncio.get_running_loop().create_future()
        restore = self.reconfigure.restore(RestorePlan(snapshot.epoch, tuple(splits)), committed.set_result)
        return await self._until_committed(restore, committed)

    async def remove(self, device: int, drain_s: float) -> dict[str, Any]:
        """See `Engine.remove_device`."""
        self._refuse_if_busy()
        removal = asyncio.ensure_future(self._remove(device, drain_s))
        self._removals.add(removal)
        removal.add_done_callback(self._removals.discard)
        return await asyncio.shield(removal)  # it goes on if the operator's connection breaks

    async def _remove(self, device: int, drain_s: float) -> dict[str, Any]:
        with self.membership.leaving(device):
            await self.membership.drain(device, drain_s)  # beside transitions of other groups
            self._refuse_if_stopping()
            return await self._until_committed(self.membership.remove(device))

    async def add(self, device: int) -> dict[str, Any]:
        """See `Engine.add_device`."""
        self._refuse_if_busy()
        return await self._until_committed(self.membership.add(device))

    def lost(self, device: int) -> None:
        """Replace the group of a device that is lost."""
        if not self._is_stopping:
            self._spawn(self.membership.lose(), is_rebuild=True)

    def _refuse_if_stopping(self) -> None:
        if self._is_stopping:
            raise OverloadedError("the server is stopping", retry_after_s=5)

    def _refuse_if_busy(self) -> None:
        self._refuse_if_stopping()
        if self._tasks:
            current = self.reconfigure.transitions.current
            raise ConflictError(f"{current.name if current else 'a transition'} is under way", retry_after_s=1)

    async def _until_committed(
        self, transition: Coroutine[Any, Any, Transition], committed: asyncio.Future[Transition] | None = None
    ) -> dict[str, Any]:
        """Run a transition; returns its state when it has committed, or ended. Without `committed`, it is a rebuild."""
        task = self._spawn(transition, is_rebuild=committed is None)
        awaited: list[asyncio.Future[Any]] = [task] if committed is None else [task, committed]
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        if committed is not None and committed.done():
            return committed.result().state()
        if task.cancelled():
            self._refuse_if_stopping()
        ended = task.result()
        assert ended is not None
        return ended.state()

    # --- decisions ----------------------------------------------------------------------------------------------

    def demand_over_undropped(self) -> float:
        """See `Control.demand_over_undropped`."""
        return self.pressure.demand() / max(1, self._undropped_blocks())

    def _undropped_blocks(self) -> int:
        """Return the blocks that there are without any drop: of groups that have lost no device, suspected or not.

        If there are none, of all: what is left of them is about to form new ones.
        """
        groups = self._fleet.groups
        return self._snapshot_of([group for group in groups if not group.is_lost] or groups).undropped_blocks()

    def _is_dropped(self) -> bool:
        """Tell whether any group can be split, now or when it is no more suspected."""
        if self._undropped is None or self._undropped[0] != self._fleet.epoch:
            is_dropped = any(group.lineage and group.lineage.merged_from for group in self._fleet.groups)
            self._undropped = self._fleet.epoch, self._undropped_blocks() if is_dropped else 0
        return self._undropped[1] > 0

    def _may_look(self, now: float) -> bool:
        """Tell whether it is time to see if the burst is over; if not, the engine wakes when it is."""
        if now >= self._next_look_s:
            self._next_look_s = now + self._look_every_s
            return True
        self._look_in(self._look_every_s)
        return False

    def _look_in(self, seconds: float) -> None:
        """Wake the engine in `seconds`, unless a timer is set already: nothing else may happen until then."""
        if self._next_look is None:
            self._next_look = asyncio.get_running_loop().call_later(seconds + TIMER_SLACK_S, self._look_again)

    def _look_again(self) -> None:
        self._next_look = None
        self._signals.wake()

    def _may_be_low(self) -> bool:
        """Tell whether blocks in use, the least that demand can be, are few enough to measure it; else it is high."""
        assert self._undropped is not None
        in_use = sum(group.num_used for group in self._fleet.groups)
        if in_use < self._thresholds.restore_watermark * self._undropped[1]:
            return True
        self._relaxation = Relaxation()
        return False

    def need_blocks(self) -> int:
        """Return the blocks that groups which are made now should hold."""
        return self._need_blocks(*MERGE_HEADROOM)

    def _need_blocks(self, of_lengths: float, of_arrivals: float) -> int:
        return round(of_arrivals * self.pressure.demand(of_lengths))

    def begin_drop(self, now: float) -> None:
        """Begin the merges that the planner proposes and that are worth their cost; their groups are paused at once.

        A group in another transition cannot merge; it goes on with the blocks that it has.
        """
        snapshot, in_the_way = self.snapshot(), self.reconfigure.transitions.in_the_way
        free = tuple(group for group in snapshot.groups if in_the_way("drop", [group.group_id]) is None)
        mergeable = replace(snapshot, groups=free)
        held_elsewhere = snapshot.capacity_blocks() - mergeable.capacity_blocks()
        need, room = (self._need_blocks(*headroom) - held_elsewhere for headroom in (MERGE_HEADROOM, CUT_HEADROOM))
        plan = plan_drop(mergeable, need, room)
        if not plan.merges:
            if not plan.meets_need and not self._tasks:  # a rebuild that fails leaves the epoch as it is
                self._merged_epoch = plan.epoch
            return
        begun = self._worth.merges(now, snapshot, plan, self.pressure.demand(), self.pressure.answer_tokens)
        for merge in begun:
            groups = [self._fleet.group(group_id) for group_id in merge.group_ids]
            self._spawn(self.reconfigure.drop(snapshot, merge, most_lost_blocks=merge.added_blocks), groups)
        if not begun:  # it may be when more waits
            self.pressure.calm(WEIGH_EVERY_S)

    def _begin_rebalance(self, changed: Sequence[Group]) -> bool:
        """Move memory from one kind of KV to the other if that is what is lacking; drops can wait for that."""
        near = self.reconfigure.shape.near
        if near is None or near.is_fixed or self._tasks or self._is_stopping:
            return False
        if len(self._fleet.working) < len(self._fleet.groups):  # not all can be at a step boundary
            return False
        share = self.pressure.wanted_share(changed, self.snapshot)
        if share is None:
            return False
        self._spawn(self.reconfigure.rebalance(share), list(self._fleet.groups))
        return True

    def _begin_restore_if_relaxed(self, now: float) -> None:
        snapshot, demand = self.snapshot(), self.pressure.demand()
        before, undropped = self._relaxation, snapshot.undropped_blocks()
        self._relaxation = before.observed(now, demand, undropped, self._thresholds)
        if self._relaxation.is_over(now, self._thresholds):
            assert self._relaxation.since_s is not None
            plan = plan_restore(snapshot, demand)
            if plan and (splits := self._worth.splits(plan, now - self._relaxation.since_s)):
                self._relaxation = Relaxation()
                self._spawn(self.reconfigure.restore(replace(plan, splits=tuple(splits))))
        elif self._relaxation != before and self._relaxation.since_s is not None:
            asyncio.get_running_loop().call_later(self._thresholds.hold_s + TIMER_SLACK_S, self._signals.wake)

    def _spawn(
        self,
        transition: Coroutine[Any, Any, Transition | None],
        paused: Sequence[Group] = (),
        *,
        is_rebuild: bool = False,
    ) -> asyncio.Task[Transition | None]:
        """Begin a transition; `paused` groups are from this very step on, until it has ended in whatever way."""
        task = asyncio.create_task(transition, name="transition")
        if paused:
            pause = ExitStack()
            pause.enter_context(self.reconfigure.boundary.paused(paused))
            # Not in the task: one that is cancelled before its first step never comes to any `finally` of its own.
            task.add_done_callback(lambda _: pause.close())
        self._tasks.add(task)
        self._rebuilds |= {task} if is_rebuild else set()
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Transition | None]) -> None:
        self._tasks.discard(task)
        self._rebuilds.discard(task)
        if task.cancelled():
            return
        if (error := task.exception()) is None:
            transition = task.result()
            if transition is not None and transition.kind == "rebalance":
                rest_s = MIX_STAYS * transition.seconds["total"]
                self.pressure.keep_mix(rest_s, may_go_on=transition.outcome == "done")
            if transition is not None and transition.outcome == "done":
                self._metrics.transition(transition.kind, transition.seconds, transition.exchange_bytes)
                if self.membership.idle and not self._is_stopping:
                    self._spawn(self.membership.join(), is_rebuild=True)
        else:
            is_bug = not (is_refusal(error) or isinstance(error, ConflictError))
            log.error("transition failed", error=repr(error), exc_info=error if is_bug else None)
            self._look_again_later()
            self.pressure.keep_mix(RETRY_S)
        self._signals.wake()

    def _look_again_later(self) -> None:
        """Begin nothing for a while: what has just failed would do so again."""
        self._not_before_s = loop_time() + RETRY_S
        asyncio.get_running_loop().call_later(RETRY_S + TIMER_SLACK_S, self._signals.wake)

    def snapshot(self) -> Snapshot:
        """Return the groups that do their work, as the planner sees them."""
        return self._snapshot_of(self._fleet.working)

    def _snapshot_of(self, groups: Sequence[Group]) -> Snapshot:
        views = (GroupView(g.group_id, tuple(stage.view for stage in g.stages), g.num_used, g.lineage) for g in groups)
        return Snapshot(self._fleet.epoch, self.reconfigure.shape, self._devices, tuple(views))


def _two_smallest(snapshot: Snapshot) -> list[int]:
    """Return the ids of the groups that are the cheapest to merge."""
    smallest = sorted(snapshot.groups, key=lambda g: (len(g.stages), g.used_blocks, g.group_id))
    return [group.group_id for group in smallest[:2]]
