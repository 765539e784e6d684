"""Live KV: what requests of some groups hold, as the planner of an exchange sees it, and what a merge would lose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kunserve.engine.blocks.block_table import Block, BlockTable
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.kinds.mixed_group import MixedGroup
from kunserve.engine.request import Request
from kunserve.planner.demand import OutputLengthEstimate, RequestView, measure_demand, measure_near
from kunserve.planner.exchange import LiveRequest, plan_exchange
from kunserve.planner.kinds.mix import OfKinds
from kunserve.planner.overload import growth
from kunserve.planner.plan import ExchangeMode, Merge
from kunserve.planner.snapshot import Snapshot
from kunserve.sizes import ceil_div


class Loss(NamedTuple):
    """What a merge costs if the KV of live requests cannot follow its layers."""

    num_requests: int
    num_tokens: int  # that were computed, and would be again
    num_blocks: int  # that they hold


def loss_of(fleet: Fleet, snapshot: Snapshot, merge: Merge) -> Loss | None:
    """Return what would have to be computed again if groups merged now; None if the KV of all could follow."""
    groups = [fleet.group(group_id) for group_id in merge.group_ids]
    if plan_exchange(snapshot, merge, live_requests(groups)).mode is not ExchangeMode.INFEASIBLE:
        return None
    running = [request for group in groups for request in group.running]
    num_tokens = sum(request.num_computed_tokens for request in running)
    return Loss(len(running), num_tokens, sum(group.num_used for group in groups))


def as_full(fleet: Fleet, num_near: int) -> int:
    """Return how many full blocks are the same part of all full ones as `num_near` are of all near ones."""
    groups = [group for group in fleet.groups if isinstance(group, MixedGroup)]
    full, near = sum(group.num_blocks for group in groups), sum(group.num_near_blocks for group in groups)
    return ceil_div(num_near * full, max(1, near))


def demand_of(group: MixedGroup, running: Sequence[RequestView], estimate: OutputLengthEstimate) -> OfKinds:
    """Return the blocks that requests running in a group need at the length that they are expected to reach."""
    growing = measure_demand(running, (), estimate, group.block_size).growth
    return OfKinds(group.num_full_used + growing, measure_near(running, estimate, group.window, group.block_size))


def held_by(group: MixedGroup, running: Sequence[RequestView], horizon_steps: int, step_tokens: int) -> OfKinds:
    """Return the blocks that requests running in a group will hold after some steps, one of which computes prompts."""
    full = group.num_full_used + growth(running, horizon_steps, group.block_size)
    near = group.num_near_used + group.near_promised(horizon_steps) + ceil_div(step_tokens, group.block_size)
    return OfKinds(full, near)


def live_requests(groups: Sequence[Group]) -> list[LiveRequest]:
    """Return all requests of these groups; first tokens are urgent.

    A shared block counts once, for the first that holds it.
    """
    live, seen = [], set[Block]()
    for group in groups:
        for request in group.running:
            num_new = _count_new(request.table, seen)
            num_near = 0 if request.table.near is None else _count_new(request.table.near, seen)
            urgency = float(request.num_output_tokens == 0)
            live.append(LiveRequest(request.request_id, group.group_id, max(1, num_new), urgency, num_near))
    return live


def _count_new(table: BlockTable, seen: set[Block]) -> int:
    """Return how many blocks of a table are not in `seen`; they are then."""
    num_new = sum(block not in seen for block in table.blocks)
    seen.update(table.blocks)
    return num_new


def by_admission(groups: Sequence[Group]) -> list[tuple[Request, Group]]:
    """Return all requests of these groups with their groups, in the order in which they were admitted."""
    running = [(request, group) for group in groups for request in group.running]
    return sorted(running, key=lambda pair: (pair[0].admitted_s or 0.0, pair[0].arrival_s))
