"""When to drop and when to come back: two watermarks and a hold time between measured demand and a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from kunserve.planner.demand import RequestView
from kunserve.sizes import ceil_div


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When to drop, when to restore. What lies between the watermarks is the hysteresis: no drop undoes itself."""

    drop_watermark: float = 0.95  # of what is mapped
    restore_watermark: float = 0.5  # of the undropped capacity
    hold_s: float = 5.0  # source: docs/measurements.md, "The planner's constants"
    horizon_steps: int = 16  # in which running requests must not outgrow their group
    patience_steps: int = 4  # a wait so short that a drop is not worth it


class GroupLoad(NamedTuple):
    """One group as admission sees it."""

    free_blocks: int
    running: Sequence[RequestView]


def is_overloaded(
    head_blocks: int | None,
    waiting_blocks: int,
    changed: Sequence[GroupLoad],
    groups: Callable[[], Sequence[GroupLoad]],
    demand_blocks: Callable[[], int],
    mapped_blocks: int,
    thresholds: Thresholds,
    block_size: int,
) -> bool:
    """Tell whether memory is, or is about to be, too small for what is asked of it.

    The whole demand exceeds the watermark, and: the running requests of all groups may outgrow their blocks within the
    horizon, before any of them ends; or the head of the queue (None: nothing has waited for long) fits nowhere, and
    what comes free within a few steps is not enough for it or for all that wait. A group that is full while others have
    room is no overload: whoever has to leave it goes there.
    waiting_blocks: for the tokens of all that wait; demand_blocks: tells `Demand.blocks`, and is asked only if the rest
    holds; mapped_blocks: capacity of all groups as they stand. `changed`: groups that have changed since they were
    looked at; `groups` tells all of them, and is asked only if one of those is full, or the head waits.
    """

    def is_short() -> bool:
        # Without a look ahead a drop would begin when running requests lack blocks already, and they would be preempted
        # while it remaps.
        is_full = any(_spare(group, thresholds, block_size) < 0 for group in changed)
        everywhere = groups() if is_full or head_blocks is not None else []
        if is_full and sum(_spare(group, thresholds, block_size) for group in everywhere) < 0:
            return True
        if head_blocks is None or any(group.free_blocks >= head_blocks for group in everywhere):
            return False
        # What ends within a few steps is free before a drop is done. But it may be enough for the head alone, and each
        # of those behind it would find the same: so all that wait count as well.
        soon = [g.free_blocks + surely_freed(g.running, thresholds.patience_steps, block_size) for g in everywhere]
        return max(soon) < head_blocks or sum(max(0, blocks) for blocks in soon) < waiting_blocks

    # Both: a head that fits nowhere while memory is free elsewhere needs time, not a drop. Demand is asked for last, as
    # it costs a pass over all requests.
    return is_short() and demand_blocks() > thresholds.drop_watermark * mapped_blocks


def _spare(group: GroupLoad, thresholds: Thresholds, block_size: int) -> int:
    """Return the blocks of a group that are left at the horizon if none of its requests ends before."""
    return group.free_blocks - growth(group.running, thresholds.horizon_steps, block_size)


def growth(running: Iterable[RequestView], horizon_steps: int, block_size: int) -> int:
    """Return the blocks that so many steps add to running requests if none ends before the others have grown."""
    added = 0
    for request in running:
        tokens = request.num_tokens + min(horizon_steps, request.most_remaining)
        added += max(0, ceil_div(tokens, block_size) - request.num_blocks)
    return added


def surely_freed(running: Iterable[RequestView], horizon_steps: int, block_size: int) -> int:
    """Return the blocks that a group gains in so many steps: of requests that reach `max_tokens`, less growth.

    A request may stop earlier, but nobody can count on that.
    """
    freed = 0
    for request in running:
        if request.most_remaining <= horizon_steps:
            freed += request.num_blocks
        else:
            freed -= max(0, ceil_div(request.num_tokens + horizon_steps, block_size) - request.num_blocks)
    return freed


@dataclass(frozen=True, slots=True)
class Relaxation:
    """The time since which demand has been low without a break; `now` is the caller's clock in seconds."""

    since_s: float | None = None

    def observed(self, now: float, demand_blocks: int, undropped_blocks: int, thresholds: Thresholds) -> Relaxation:
        """Return the state after an observation: the first low one starts the time, any other one ends it.

        What waits counts with the demand, and not for itself: requests keep coming in quiet times, too.
        """
        if demand_blocks >= thresholds.restore_watermark * undropped_blocks:
            return Relaxation()
        return self if self.since_s is not None else replace(self, since_s=now)

    def is_over(self, now: float, thresholds: Thresholds) -> bool:
        """Tell whether the burst is over: demand has been low for the hold time."""
        return self.since_s is not None and now - self.since_s >= thresholds.hold_s
