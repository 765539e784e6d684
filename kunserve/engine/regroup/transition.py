"""Transitions: what is known of each change of the grouping, while it runs and afterwards; and what may run with what.

A transition is two-phase: it prepares while everything serves, then commits a new epoch at a step boundary, or the old
one goes on. Drops of different groups run side by side, and one rebuild beside them; a restore runs alone, and so does
a rebalance.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import structlog

from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.regroup.weight_loader import WeightLoader
from kunserve.engine.signals import Signals, loop_time
from kunserve.errors import ConflictError
from kunserve.model.host_copy import HostCopy
from kunserve.observe.metrics import Metrics

log = structlog.get_logger()

# Rebuilds, in words: transitions that give free devices new groups, or places in one that goes on.
REBUILDS = {"lose": "the loss of a device", "remove": "the removal of a device", "add": "the addition of a device"}
ALONE = {"restore", "rebalance"}  # kinds of transitions that nothing may run beside
HISTORY = 1000  # transitions that are remembered


@dataclass(slots=True)
class Transition:
    """What happened, step by step. Times in seconds; `started_s` on the engine's clock."""

    kind: str  # "drop", "restore", "rebalance", "lose", "remove", "add"
    started_s: float
    old_groups: tuple[int, ...]
    new_groups: tuple[int, ...] = ()
    epoch: int | None = None  # the one it made, once committed
    outcome: str = "running"  # then "done", "cancelled", "rolled back", "failed after its commit"
    exchange_mode: str | None = None
    exchange_bytes: int = 0
    num_lost: int = 0  # requests whose KV should have followed its layers but did not arrive: they are recomputed
    num_cached_blocks: int = 0  # that no request used, and that followed
    weight_bytes: int = 0  # dropped, or loaded
    weight_sources: dict[str, int] = field(default_factory=dict)  # bytes of tensors loaded, by where they came from
    seconds: dict[str, float] = field(default_factory=dict)  # by step
    step: str | None = None  # the one it is at
    planned_bytes: int = 0  # of weights that it is to drop, or to load

    @property
    def name(self) -> str:
        """Return what it is, in words."""
        return REBUILDS.get(self.kind, f"a {self.kind}")

    def state(self) -> dict[str, Any]:
        """Show it as `/kunserve/state` and the log do: `step` and `planned_bytes` only while it runs."""
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.outcome != "running":
            del shown["step"], shown["planned_bytes"]
        return shown


class Transitions:
    """Keeps what transitions there were, and which are under way.

    `clock` measures how long their steps take: finer than the loop's clock, which may count whole milliseconds.
    """

    def __init__(
        self,
        fleet: Fleet,
        loader: WeightLoader,
        signals: Signals,
        metrics: Metrics,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._fleet, self._loader, self._signals, self._metrics, self._clock = fleet, loader, signals, metrics, clock
        self.remembered: list[Transition] = []
        self._running: list[Transition] = []  # one of `ALONE`; or drops, of different groups, and one rebuild

    @property
    def current(self) -> Transition | None:
        """Return the transition that is under way; of several, the one that began first."""
        return self._running[0] if self._running else None

    @property
    def phases(self) -> set[str]:
        """Return what is under way, and at which step it is: "drop.remap", for instance."""
        return {f"{transition.kind}.{transition.step}" for transition in self._running}

    def in_the_way(self, kind: str, group_ids: Sequence[int]) -> Transition | None:
        """Return a transition that has to end before one of this kind, of these groups, can begin."""
        for other in self._running:
            has_own_groups = {*other.old_groups, *other.new_groups}.isdisjoint(group_ids)
            if not (has_own_groups and self._may_run_beside(kind, other.kind)):
                return other
        return None

    def _may_run_beside(self, kind: str, other: str) -> bool:
        if not ALONE.isdisjoint((kind, other)):
            return False
        num_rebuilds = (kind in REBUILDS) + (other in REBUILDS)
        if num_rebuilds == 2:  # else both would take the same free devices
            return False
        # A rebuild may copy weights from any device that has them, where the host keeps none: no drop may take them.
        return num_rebuilds == 0 or self._loader.host.kind is not HostCopy.NONE

    @contextmanager
    def begin(self, kind: str, group_ids: Sequence[int]) -> Iterator[tuple[Transition, list[Group]]]:
        """Begin a transition of groups that are there and in no other; it is recorded, whatever becomes of it."""
        if (other := self.in_the_way(kind, group_ids)) is not None:
            raise ConflictError(f"{other.name} is under way", retry_after_s=1)
        groups = self._groups(group_ids)
        transition = Transition(kind, loop_time(), tuple(group_ids))
        self._running.append(transition)
        loaded_before: Counter[Any] = self._loader.num_bytes.copy()
        self.remembered.append(transition)
        del self.remembered[:-HISTORY]
        try:
            yield transition, groups
            if transition.outcome == "running":
                transition.outcome = "done"
        except BaseException:
            transition.outcome = "rolled back" if transition.epoch is None else "failed after its commit"
            if transition.epoch is None:
                self._metrics.rolled_back(kind)
            raise
        finally:
            self._running.remove(transition)
            transition.weight_sources = {str(k): n for k, n in (self._loader.num_bytes - loaded_before).items()}
            transition.seconds["total"] = loop_time() - transition.started_s
            self._signals.progress()
            self._signals.wake()
            log.info("transition", **transition.state())

    @contextmanager
    def step(self, transition: Transition, name: str) -> Iterator[None]:
        """Add the time of the block to a step."""
        started, transition.step = self._clock(), name
        try:
            yield
        finally:
            transition.step = None
            transition.seconds[name] = transition.seconds.get(name, 0.0) + self._clock() - started

    def commit(
        self,
        transition: Transition,
        old: Sequence[Group],
        new: Sequence[Group],
        on_commit: Callable[[Transition], None] | None = None,
    ) -> None:
        """Make the new grouping live."""
        self._fleet.regroup(old, new)
        transition.epoch, transition.new_groups = self._fleet.epoch, tuple(group.group_id for group in new)
        transition.seconds["committed"] = loop_time() - transition.started_s
        for request in [request for group in (*old, *new) for request in group.running]:  # some have departed already
            request.note(transition.kind, epoch=self._fleet.epoch, groups=str(transition.new_groups))
        for group in new:
            group.on_first_commit = partial(self._first_token, transition)
        if on_commit is not None:
            on_commit(transition)
        self._signals.wake()

    def _first_token(self, transition: Transition) -> None:
        transition.seconds.setdefault("first_token", loop_time() - transition.started_s)

    def _groups(self, group_ids: Sequence[int]) -> list[Group]:
        there = {group.group_id: group for group in self._fleet.groups}
        if gone := [group_id for group_id in group_ids if group_id not in there]:
            raise ConflictError(f"group {gone[0]} is not there any more")
        return [there[group_id] for group_id in group_ids]
