"""Running ahead: when a device gets a microbatch to go on with, while it still works on the one before.

If the next microbatch comes too late, the device waits for the host between two steps. If it comes too early, a
request that arrives meanwhile waits for two steps instead of one, and so does a merge, which takes place between steps.
So the next one comes shortly before the first is predicted to end: by as much as predictions are wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from kunserve.engine.batch import work_of
from kunserve.engine.group import Group
from kunserve.engine.signals import loop_time
from kunserve.planner.cost import Work
from kunserve.planner.microbatch import Lookahead

# Before the predicted end, the longer of both: what a busy host needs to schedule, and so many times what predictions
# are wrong by on average, but no more than a quarter of the step.
HOST_S, NUM_ERRORS, MARGIN = 0.015, 3.0, 0.25
LEARNING_RATE = 0.2  # how fast predictions follow what steps take


@dataclass(slots=True)
class _Step:
    """A microbatch that a device works on, and nothing is queued behind it."""

    started_s: float
    predicted_s: float
    timer: asyncio.TimerHandle | None  # None: it is due


class RunAhead:
    """Knows for each group whether it is time for the microbatch after the one in flight. Used on the event loop.

    Only groups of one device have to wait for that time: a chain has several microbatches in flight anyway.
    """

    def __init__(self, lookahead: Lookahead | None, on_due: Callable[[Group], None]) -> None:
        """Call `on_due` when it is time for a group's next microbatch; without `lookahead`, it always is."""
        self._lookahead, self._on_due = lookahead, on_due
        self._steps: dict[int, _Step] = {}  # by group id
        self._cost = None if lookahead is None else lookahead.cost  # what the rest was learned with
        self._slowness = 1.0  # what steps take of what the cost model predicts
        self._error = MARGIN  # by what share they differ from that, on average

    def is_due(self, group: Group) -> bool:
        """Return whether a group whose device works may have one more microbatch."""
        step = self._steps.get(group.group_id)
        return step is None or step.timer is None

    def began(self, group: Group) -> None:
        """Note that the device of a group begins with the only microbatch in flight."""
        if self._lookahead is None or len(group.stages) > 1:
            return
        if self._lookahead.cost is not self._cost:
            self._follow(self._lookahead, work_of(group.in_flight[0]))
        predicted_s = self._lookahead.time(work_of(group.in_flight[0]))
        expected_s = predicted_s * self._slowness
        delay_s = expected_s - max(HOST_S, min(MARGIN, NUM_ERRORS * self._error) * expected_s)
        timer = None
        if delay_s > 0:
            timer = asyncio.get_running_loop().call_later(delay_s, self._due, group)
        self._steps[group.group_id] = _Step(loop_time(), predicted_s, timer)

    def ended(self, group: Group) -> None:
        """Note that the microbatch that began has come back."""
        if (step := self._steps.pop(group.group_id, None)) is None:
            return
        if step.timer is not None:
            step.timer.cancel()
        if step.predicted_s > 0:
            slowness = (loop_time() - step.started_s) / step.predicted_s
            self._error += LEARNING_RATE * (abs(slowness / self._slowness - 1) - self._error)
            self._slowness += LEARNING_RATE * (slowness - self._slowness)

    def _follow(self, lookahead: Lookahead, work: Work) -> None:
        """Expect of `work` with other constants what was expected of it: they are no news of how long it takes."""
        assert self._cost is not None
        before_s, now_s = replace(lookahead, cost=self._cost).time(work), lookahead.time(work)
        self._cost = lookahead.cost
        if before_s > 0 and now_s > 0:
            self._slowness *= before_s / now_s
            for step in self._steps.values():
                step.predicted_s *= now_s / before_s

    def _due(self, group: Group) -> None:
        self._steps[group.group_id].timer = None
        self._on_due(group)
