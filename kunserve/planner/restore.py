"""Plan a restore: which merged groups split in two, and which live requests go with which half.

One plan is one step back (4 -> 2 + 2, later 2 -> 1 + 1): each step is short, and a new burst finds most of the way
still undone. The whole chain serves until the weights are back, so every device must first hold what all live
requests have there in the blocks it will have left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kunserve.planner.exchange import layer_moves
from kunserve.planner.layer_split import Chain, cuts_around, cuts_within, stages_of
from kunserve.planner.layouts import whole_group
from kunserve.planner.plan import NewGroup, RestorePlan, Split
from kunserve.planner.snapshot import GroupView, Lineage, ModelShape, Snapshot, StageView, capacity_blocks


class HeldRequest(NamedTuple):
    """A live request and the blocks it holds on each device of its group."""

    request_id: str
    num_blocks: int


def plan_restore(snapshot: Snapshot, need_blocks: int = 0) -> RestorePlan | None:
    """Split every merged group, largest first, whose live KV fits on each device after the split; None if none.

    The server as a whole keeps holding `need_blocks`.
    """
    model, budgets = snapshot.model, snapshot.budgets()
    capacity = snapshot.capacity_blocks()
    splits = []
    for group in sorted(snapshot.groups, key=lambda group: (-len(group.stages), group.group_id)):
        candidates = [_half(model, budgets, group, half) for half in _halves(group)]
        into = [new for new in candidates if new and new.capacity_blocks >= max(1, group.used_blocks)]
        if len(into) < 2:
            continue
        loss = capacity_blocks(model, budgets, group.stages) - sum(new.capacity_blocks for new in into)
        if capacity - loss >= need_blocks:
            capacity -= loss
            splits.append(Split(group.group_id, (into[0], into[1])))
    return RestorePlan(snapshot.epoch, tuple(splits)) if splits else None


def _halves(group: GroupView) -> list[tuple[list[StageView], Lineage | None]]:
    """Return the stages that each half has now; nothing if the group was launched like this."""
    if group.lineage is None:  # neighbours go apart: then each half has parts of all of the model
        return [(list(group.stages[i::2]), None) for i in (0, 1)] if len(group.stages) > 1 else []
    halves: list[tuple[list[StageView], Lineage | None]] = []
    for half in group.lineage.merged_from:
        devices = {stage.device for lineage in half.launched() for stage in lineage.stages}
        halves.append(([stage for stage in group.stages if stage.device in devices], half))
    return halves


def _half(
    model: ModelShape, budgets: dict[int, int], group: GroupView, half: tuple[list[StageView], Lineage | None]
) -> NewGroup | None:
    """Return one half with all layers: as it was launched, or cut anew around what its devices have."""
    kept, lineage = half
    stages = lineage.stages if lineage and not lineage.merged_from else _widened(model, budgets, group, kept, lineage)
    return whole_group(model, budgets, stages, lineage) if stages else None


def _widened(
    model: ModelShape,
    budgets: dict[int, int],
    group: GroupView,
    kept: list[StageView],
    lineage: Lineage | None,
) -> tuple[StageView, ...] | None:
    """Cut all layers for these devices so that none has to drop any, neither now nor on the way to its launch."""
    full = {stage.device: (0, model.num_layers) for stage in kept}
    for launched in lineage.launched() if lineage else ():
        full |= {stage.device: (stage.first_layer, stage.last_layer) for stage in launched.stages}
    around = cuts_around([(stage.first_layer, stage.last_layer) for stage in kept])
    within = cuts_within([full[stage.device] for stage in kept])
    cuts = [(max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(around, within, strict=True)]
    chain = Chain(model, [budgets[stage.device] for stage in kept], cuts)
    ends = chain.best(model.chunks_for(group.used_blocks))
    return stages_of([stage.device for stage in kept], ends) if ends else None


def assign_requests(
    requests: Sequence[HeldRequest],
    stages: Sequence[StageView],
    halves: Sequence[Sequence[StageView]],
    max_running: Sequence[int],
) -> tuple[tuple[str, ...], ...]:
    """Return which live requests of a chain go to each half: ids, balanced by blocks, then fewest bytes moved.

    `max_running`: how many each half may run; more only if there are more in all.
    """
    moved = [sum(move.num_layers for move in layer_moves(stages, half)) for half in halves]
    given: list[list[str]] = [[] for _ in halves]
    blocks = [0] * len(halves)
    for request in sorted(requests, key=lambda request: (-request.num_blocks, request.request_id)):
        i = min(range(len(halves)), key=lambda i: (len(given[i]) >= max_running[i], blocks[i], moved[i], i))
        given[i].append(request.request_id)
        blocks[i] += request.num_blocks
    # Whatever is heaviest goes where least has to move, if there are seats.
    heaviest_first = sorted(range(len(halves)), key=lambda i: -blocks[i])
    least_moved_first = sorted(range(len(halves)), key=lambda i: moved[i])
    share_of = dict(zip(least_moved_first, heaviest_first, strict=True))
    if all(len(given[share]) <= max_running[half] for half, share in share_of.items()):
        given = [given[share_of[half]] for half in range(len(halves))]
    return tuple(map(tuple, given))
