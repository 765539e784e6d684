"""Dispatch: which groups get their next microbatch, round after round, without a look at all of them in each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kunserve.engine.batch import Microbatch
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.run_ahead import RunAhead
from kunserve.engine.schedule.scheduler import Scheduler
from kunserve.engine.signals import Signals


class Dispatch:
    """Gives every chain a microbatch for each stage, and one more, in time for it to go on without a gap."""

    def __init__(self, fleet: Fleet, scheduler: Scheduler, signals: Signals) -> None:
        self._fleet, self._scheduler, self._signals = fleet, scheduler, signals
        self._run_ahead = RunAhead(scheduler.lookahead, self._due)
        self._free: dict[int, Group] = {}  # groups that have a slot for a microbatch, by id

    def take_changed(self) -> list[Group]:
        """Return the groups that something happened to since the last call."""
        changed = self._signals.take_changed()
        if changed is None:
            self._free = {group.group_id: group for group in self._fleet.groups if self._has_slot(group)}
            return list(self._fleet.groups)
        return changed

    def batches(self, changed: Sequence[Group]) -> Iterator[tuple[Group, Microbatch]]:
        """Yield the microbatches that can go now. Each is in flight: launch it before the next is asked for."""
        candidates, progress = dict.fromkeys(changed), True
        while progress:  # an admission to one group may make another the least loaded
            progress = False
            # Whoever is busy does not compete for the queue: its head would wait for the end of a step.
            free = [g for g in self._free.values() if not g.is_paused] if self._scheduler.num_waiting else []
            for group in free or list(candidates):
                if group.is_paused or not self._has_slot(group):
                    continue
                if not ((group.running and group in candidates) or self._scheduler.can_admit(group)):
                    continue
                batch = self._scheduler.schedule(group, free, self._fleet.epoch)
                if batch is not None:
                    progress = True
                    if group.num_in_flight == 1:
                        self._run_ahead.began(group)
                    if not self._has_slot(group):
                        self._free.pop(group.group_id, None)
                    yield group, batch
                    candidates[group] = None  # it may have room for more

    def came_back(self, group: Group) -> None:
        """Note that a microbatch of a group has come back, and left its slot."""
        self._run_ahead.ended(group)
        if group.in_flight:
            self._run_ahead.began(group)
        if self._has_slot(group):
            self._free[group.group_id] = group

    def _due(self, group: Group) -> None:
        """Let a group have the microbatch that it goes on with."""
        if self._has_slot(group):
            self._free[group.group_id] = group
            self._signals.wake(group)

    def _has_slot(self, group: Group) -> bool:
        """Tell whether a group's chain takes one more microbatch."""
        num_free = len(group.stages) - group.num_in_flight
        return num_free > 0 or (num_free + self._scheduler.limits.num_ahead > 0 and self._run_ahead.is_due(group))
