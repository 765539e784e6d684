"""Live KV: what requests of some groups hold, as the planner of an exchange sees it, and what a merge would lose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kunserve.engine.blocks.block_table import Block
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.request import Request
from kunserve.planner.exchange import LiveRequest, plan_exchange
from kunserve.planner.plan import ExchangeMode, Merge
from kunserve.planner.snapshot import Snapshot


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


def live_requests(groups: Sequence[Group]) -> list[LiveRequest]:
    """Return all requests of these groups; first tokens are urgent.

    A shared block counts once, for the first that holds it.
    """
    live, seen = [], set[Block]()
    for group in groups:
        for request in group.running:
            num_new = sum(block not in seen for block in request.table.blocks)
            seen.update(request.table.blocks)
            urgency = float(request.num_output_tokens == 0)
            live.append(LiveRequest(request.request_id, group.group_id, max(1, num_new), urgency))
    return live


def by_admission(groups: Sequence[Group]) -> list[tuple[Request, Group]]:
    """Return all requests of these groups with their groups, in the order in which they were admitted."""
    running = [(request, group) for group in groups for request in group.running]
    return sorted(running, key=lambda pair: (pair[0].admitted_s or 0.0, pair[0].arrival_s))
