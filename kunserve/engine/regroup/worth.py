"""Worth: whether a merge or a split pays. Measures, as the engine runs, what the planner's prices need."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import structlog

from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.regroup.live_kv import loss_of
from kunserve.engine.schedule.scheduler import Scheduler
from kunserve.gpu.links import Links
from kunserve.planner.overload import Thresholds
from kunserve.planner.plan import DropPlan, Merge, RestorePlan, Split
from kunserve.planner.price import Bubbles, Change, Shortage, Trend
from kunserve.planner.snapshot import ModelShape, Snapshot

log = structlog.get_logger()


class Worth:
    """Follows the demand for memory, what chains lose and the time of steps, and says which merges and splits pay."""

    def __init__(
        self,
        fleet: Fleet,
        scheduler: Scheduler,
        links: Links,
        shape: ModelShape,
        thresholds: Thresholds,
    ) -> None:
        self._fleet, self._scheduler, self._links = fleet, scheduler, links
        self._shape, self._thresholds = shape, thresholds
        self._asked = Trend()  # of blocks
        self._bubbles = Bubbles()
        self._short_since_s = self._short_at_s = -inf

    def look(self, now_s: float) -> None:
        """Sample the demand for memory, and what chains lose, now and then; called before every step."""
        if self._asked.is_due(now_s):
            for group in self._fleet.groups:
                if len(group.stages) > 1:
                    self._bubbles.learn(len(group.stages), *group.occupancy.take_waiting(now_s))
            in_use = sum(group.num_used for group in self._fleet.groups)
            self._asked.sample(now_s, in_use + self._shape.blocks_for(self._scheduler.num_waiting_tokens))

    def merges(
        self, now_s: float, snapshot: Snapshot, plan: DropPlan, demand_blocks: int, answer_tokens: float
    ) -> list[Merge]:
        """Return a plan's merges, but for those that lose too much KV, if they save more seconds than they cost.

        `demand_blocks`: of all requests; `answer_tokens`: mean length of an answer.
        """
        if now_s - self._short_at_s > self._asked.window_s:  # there was no shortage for a while
            self._short_since_s = now_s
        self._short_at_s = now_s
        shortage = Shortage(
            demand_blocks - self._thresholds.drop_watermark * snapshot.capacity_blocks(),
            self._asked.per_s,
            self._request_blocks(demand_blocks, answer_tokens),
            now_s - self._short_since_s,
        )
        merges = [merge for merge in plan.merges if self._keeps_more_than_it_loses(snapshot, merge)]
        costs_s = [self._change(merge).cost_s(shortage.rest_s) for merge in merges]
        # All or none: a plan merges no more groups than it has to, and all that are full, since whoever alone has room
        # gets all new requests, which are more than it can compute.
        saved_s, cost_s = shortage.saved_s(sum(merge.added_blocks for merge in merges)), sum(costs_s)
        log.debug("merges weighed", groups=[m.group_ids for m in merges], saved_s=saved_s, cost_s=cost_s)
        return merges if saved_s > cost_s else []

    def splits(self, plan: RestorePlan, calm_s: float) -> list[Split]:
        """Return the splits of a plan that pay back within the time for which demand has been low so far, `calm_s`."""
        return [split for split in plan.splits if self._change_back(split).pays_back_in(calm_s)]

    def _change(self, merge: Merge) -> Change:
        """Return what a merge does to those who run in its groups."""
        groups = [self._fleet.group(group_id) for group_id in merge.group_ids]
        num_requests = sum(len(group.running) for group in groups)
        passed = sum(len(group.running) * len(group.stages) for group in groups) / max(1, num_requests)
        return self._change_of(groups, len(merge.stages) - passed)

    def _change_back(self, split: Split) -> Change:
        """Return what a split does to those who run in its group, if each half takes as many of them."""
        group = self._fleet.group(split.group_id)
        passed = sum(len(half.stages) for half in split.into) / len(split.into)
        return self._change_of([group], len(group.stages) - passed)

    def _change_of(self, groups: Sequence[Group], added_stages: float) -> Change:
        """Return the change in which half of the KV of some groups moves, both ways at once."""
        used = sum(group.num_used for group in groups)
        num_bytes = used * self._shape.kv_block_bytes * self._shape.num_layers
        exchange_s = num_bytes / 4 / self._links.kv_bytes_per_s
        boundary_s = max(group.step_s or 0.0 for group in groups)
        num_requests = sum(len(group.running) for group in groups)
        return Change(num_requests, boundary_s, exchange_s, added_stages, self._bubbles.share)

    def _request_blocks(self, demand_blocks: int, answer_tokens: float) -> float:
        """Return the mean blocks of the requests that lack some: those that wait, or if none does, those that run."""
        if num_waiting := self._scheduler.num_waiting:
            num_tokens = self._scheduler.num_waiting_tokens / num_waiting + answer_tokens
            return max(1.0, num_tokens / self._shape.block_size)
        return max(1.0, demand_blocks / max(1, sum(len(group.running) for group in self._fleet.groups)))

    def _keeps_more_than_it_loses(self, snapshot: Snapshot, merge: Merge) -> bool:
        """Return whether a merge gives more blocks than it takes from requests whose KV cannot follow its layers.

        Without it, requests that lack a block make others start over: as many as hold what it would have given.
        """
        loss = loss_of(self._fleet, snapshot, merge)
        return loss is None or loss.num_blocks < merge.added_blocks
