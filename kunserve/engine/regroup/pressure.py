"""Say how hard memory is pressed: how much is asked of it, and whether that is, or is about to be, too much."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.kinds.mixed_group import MixedGroup
from kunserve.engine.regroup.live_kv import as_full, demand_of, held_by
from kunserve.engine.request import Request
from kunserve.engine.schedule.scheduler import Scheduler
from kunserve.engine.signals import loop_time
from kunserve.planner.demand import OutputLengthEstimate, RequestView, measure_demand, measure_near
from kunserve.planner.kinds.mix import Asked, OfKinds, plan_share
from kunserve.planner.overload import GroupLoad, Thresholds, is_overloaded
from kunserve.planner.snapshot import Snapshot
from kunserve.sizes import ceil_div

# Between two looks at all requests, if the first found no overload: of many groups, one is always tight.
OVERLOAD_PAUSE_S = 0.02


class Pressure:
    """Looks at groups and at the queue; decides nothing, and costs little while nothing is tight."""

    def __init__(
        self,
        fleet: Fleet,
        scheduler: Scheduler,
        thresholds: Thresholds,
        longest: int,
        look_in: Callable[[float], None],
    ) -> None:
        """Look at a fleet whose longest request has `longest` blocks.

        `look_in` is called with the seconds after which another look may find something else.
        """
        self._fleet, self._scheduler, self._thresholds = fleet, scheduler, thresholds
        self._look_in = look_in
        self._estimate = OutputLengthEstimate()
        self._pause_until_s = 0.0
        self._waits_since_s: float | None = None  # somebody, for blocks, without a break
        self._longest, self._mix_stays_until_s = longest, 0.0
        self._is_near_growing, self._no_turn_until_s = False, 0.0  # which kind got memory last

    @property
    def answer_tokens(self) -> float:
        """Return how many tokens answers are expected to have, on average."""
        return self._estimate.mean_tokens

    def finished(self, num_output_tokens: int) -> None:
        """Learn how long outputs are: one came to its end."""
        self._estimate = self._estimate.finished(num_output_tokens)

    def demand(self, headroom: float = 1.0) -> int:
        """Return the blocks that all requests need, if outputs are `headroom` times as long as expected.

        Blocks that they share count once, and so do those that waiting ones will share, by an estimate
        (`PrefixCache.num_repeated`).
        """
        estimate = replace(self._estimate, mean_tokens=self._estimate.mean_tokens * headroom)
        blocks = self._full_demand(estimate)
        if self._fleet.near is None:
            return blocks
        return max(blocks, as_full(self._fleet, self._near_demand(estimate)))

    def _full_demand(self, estimate: OutputLengthEstimate) -> int:
        running: Iterator[RequestView] = (self._view(r) for group in self._fleet.groups for r in group.running)
        waiting, block_size = list(self._scheduler.queued()), self._fleet.block_size
        blocks = measure_demand(running, map(self._view, waiting), estimate, block_size).blocks
        prefixes = self._fleet.prefixes
        num_repeated = prefixes.num_repeated(waiting, block_size) if prefixes is not None else 0
        return blocks - self._fleet.num_shared - num_repeated

    def _near_demand(self, estimate: OutputLengthEstimate) -> int:
        assert self._fleet.near is not None
        everybody = [r for group in self._fleet.groups for r in group.running] + list(self._scheduler.queued())
        return measure_near(map(self._view, everybody), estimate, self._fleet.near.window, self._fleet.block_size)

    def wanted_share(self, changed: Sequence[Group], snapshot: Callable[[], Snapshot]) -> int | None:
        """Return the share that layers with a window should have where KV is of two kinds; None if nothing is gained.

        `changed` as in `is_too_high`. Nothing is gained while nothing is tight.
        """
        now = loop_time()
        if now < self._mix_stays_until_s or not self._is_tight(changed):
            return None
        self._mix_stays_until_s = now + OVERLOAD_PAUSE_S
        before = snapshot()
        assert before.model.near is not None
        share = plan_share(before, self._asked())
        if share is None:
            return None
        is_near_growing = share > before.model.near.share
        if is_near_growing != self._is_near_growing and now < self._no_turn_until_s:
            return None
        self._is_near_growing = is_near_growing
        return share

    def _asked(self) -> Asked:
        """Return what is asked of both kinds, by group; each group is taken to get the same part of what waits."""
        step_tokens, horizon = self._scheduler.limits.max_num_batched_tokens, self._thresholds.horizon_steps
        groups = [group for group in self._fleet.groups if isinstance(group, MixedGroup)]
        waiting, size = list(map(self._view, self._scheduler.queued())), self._fleet.block_size
        full = ceil_div(measure_demand((), waiting, self._estimate, size).blocks, len(groups))
        near = ceil_div(measure_near(waiting, self._estimate, groups[0].window, size), len(groups))
        near += self._fleet.blocks_for(step_tokens)
        held, demand = dict[int, OfKinds](), dict[int, OfKinds]()
        for group in groups:
            running = list(map(self._view, group.running))
            own = demand_of(group, running, self._estimate)
            demand[group.group_id] = OfKinds(own.full + full, own.near + near)
            held[group.group_id] = held_by(group, running, horizon, step_tokens)
        return Asked(held, demand, self._longest)

    def keep_mix(self, seconds: float, *, may_go_on: bool = False) -> None:
        """Keep the share for `seconds`; if it `may_go_on`, it may move on in that time, but not back."""
        self._no_turn_until_s = loop_time() + seconds
        if not may_go_on:
            self._mix_stays_until_s = self._no_turn_until_s

    def is_too_high(self, changed: Sequence[Group]) -> bool:
        """Return whether memory is too small. `changed`: groups that something happened to since the last call."""
        return self._is_tight(changed) and self._is_overloaded(changed)

    def calm(self, seconds: float) -> None:
        """Find no overload for `seconds`: no merge was worth its cost."""
        self._pause_until_s = loop_time() + seconds
        self._look_in(seconds)

    def _is_tight(self, changed: Sequence[Group]) -> bool:
        """Return whether it is worth asking the planner: a group may run out of blocks, or the head does not fit."""
        horizon = self._thresholds.horizon_steps
        per_request = 1 + horizon // self._fleet.block_size
        if any(self._num_free(group) < len(group.running) * per_request for group in changed):
            return True
        head = self._scheduler.head
        return (head is not None and self._has_to_wait(head)) or self._nobody_waits()

    def _has_to_wait(self, head: Request) -> bool:
        """Return whether no group has blocks for a request, less those that it would share with others."""
        num_blocks, n = self._fleet.blocks_for(head.num_tokens), head.num_tokens
        groups = self._fleet.working
        if any(self._num_free(group, n) >= num_blocks for group in groups):
            return False
        return all(self._num_free(group, n) < num_blocks - self._fleet.shared_blocks(head, group) for group in groups)

    def _num_free(self, group: Group, num_tokens: int = 1) -> int:
        """Return the blocks that a request of so many tokens which is admitted may get."""
        return group.free_for(num_tokens) - self._scheduler.policy.num_reserved(group)

    def _is_overloaded(self, changed: Sequence[Group]) -> bool:
        if not (working := self._fleet.working):  # none that could merge
            return False
        head, now = self._scheduler.head, loop_time()
        has_to_wait = head is not None and self._has_to_wait(head)
        has_waited = self._has_waited(now) if has_to_wait else self._nobody_waits()
        if now < self._pause_until_s:
            self._look_in(OVERLOAD_PAUSE_S)
            return False
        blocks_for = self._fleet.blocks_for
        return is_overloaded(
            blocks_for(head.num_tokens) if head is not None and has_waited else None,
            blocks_for(self._scheduler.num_waiting_tokens),
            self._loads(changed),
            partial(self._all_loads, now),
            partial(self._demand_looked_at, now),
            sum(group.num_blocks for group in working),
            self._thresholds,
            self._fleet.block_size,
        )

    def _has_waited(self, now: float) -> bool:
        """Return whether somebody has waited for blocks as long as a merge would make others wait: for a step."""
        if self._waits_since_s is None:
            self._waits_since_s = now
        step_s = max((group.step_s or 0.0 for group in self._fleet.working), default=0.0)
        if (left_s := self._waits_since_s + step_s - now) > 0:
            self._look_in(left_s)
            return False
        return True

    def _nobody_waits(self) -> bool:
        self._waits_since_s = None
        return False

    def _loads(self, groups: Sequence[Group]) -> list[GroupLoad]:
        head = self._scheduler.head
        n = 1 if head is None or self._waits_since_s is None else head.num_tokens
        return [GroupLoad(self._num_free(g, n), list(map(self._view, g.running))) for g in groups if not g.is_suspect]

    def _all_loads(self, now: float) -> list[GroupLoad]:
        """Return the load of all groups; it is not asked for again so soon."""
        self._pause_until_s = now + OVERLOAD_PAUSE_S
        return self._loads(self._fleet.working)

    def _demand_looked_at(self, now: float) -> int:
        """Return the demand; it is not asked for again so soon."""
        self._pause_until_s = now + OVERLOAD_PAUSE_S
        return self.demand()

    def _view(self, request: Request) -> RequestView:
        """Return what the planner knows of a request: one with a window as if it began where that does."""
        table, num_output_tokens = request.table, request.num_output_tokens
        num_tokens = len(request.token_ids) - table.num_behind * self._fleet.block_size
        return RequestView(num_tokens, num_output_tokens, request.params.max_tokens, len(table.blocks))
