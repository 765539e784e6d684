"""Plan a rebuild: what new groups free devices make, once theirs has dissolved because a device left it or came.

Weights that a device lacks are loaded from the host, and all requests of the old group are computed anew: nothing has
to be kept. What a device already holds only says where in a chain it stands, so that less is loaded.

Devices that can make no group by themselves join one that goes on, whose KV has to be kept: those of the group only
drop layers, which the newcomers have loaded before, and the KV of these layers follows as after a merge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations_with_replacement

from kunserve.planner.layer_split import Chain, cuts_within, free_cuts, split_layers
from kunserve.planner.layouts import whole_group
from kunserve.planner.plan import Join, Merge, NewGroup
from kunserve.planner.restore import plan_restore
from kunserve.planner.snapshot import (
    DeviceView,
    GroupView,
    Lineage,
    ModelShape,
    Snapshot,
    StageView,
    capacity_blocks,
)
from kunserve.sizes import ceil_div

MOST_JOINING = 3  # devices at once: all places for them in a chain are tried
NEWCOMERS = -1  # as a group id: of devices that are in no group so far


def plan_rebuild(
    snapshot: Snapshot,
    devices: Sequence[DeviceView],
    held: Mapping[int, StageView],
    need_blocks: int,
    least_blocks: int,
) -> tuple[NewGroup, ...] | None:
    """Make new groups of free devices, each with all layers; None if they cannot hold all, with a block of KV.

    As many groups as hold `least_blocks` (the longest request) each; or all devices in one chain, if only that keeps
    the server as a whole holding `need_blocks`, or holds more at least. A restore can split that chain again.
    `snapshot.groups` are those that go on; `held`: the weights that each device has now, if any.

    If no grouping of all devices holds `least_blocks`, they are one chain nevertheless; a device idles (the poorest
    first) only if no chain can be made with it.
    """
    rest = max(0, need_blocks - snapshot.capacity_blocks())
    richest_first = sorted(devices, key=lambda view: (-view.budget_chunks, view.device))
    for num_used in range(len(devices), 0, -1):
        used = richest_first[:num_used]
        if unmerged := _unmerged(snapshot.model, used, held, rest, max(1, least_blocks)):
            return _merged(snapshot.model, used, held, rest, unmerged) or unmerged
    return None


def _unmerged(
    model: ModelShape, devices: Sequence[DeviceView], held: Mapping[int, StageView], need_blocks: int, least_blocks: int
) -> tuple[NewGroup, ...] | None:
    """Make as many chains of all devices as hold `least_blocks` each; else one that holds less; None if that cannot be.

    Each is cut for its share of `need_blocks`, or for `least_blocks` if that is more.
    """
    choices = [(num_chains, least_blocks) for num_chains in range(len(devices), 0, -1)]
    for num_chains, least in (*choices, (1, 1)):
        row = _in_a_row(model, devices, held, num_chains)
        # Neighbours go apart: they hold much the same.
        chains = [_in_order(model, row[i::num_chains], least) for i in range(num_chains)]
        most = [_most_blocks(model, chain) for chain in chains]
        if min(most) < least:
            continue
        budgets = {view.device: view.budget_chunks for view in devices}
        new = []
        for chain, blocks in zip(chains, most, strict=True):
            stages = split_layers(model, chain, max(least_blocks, ceil_div(need_blocks * blocks, sum(most))))
            assert stages is not None
            new.append(whole_group(model, budgets, stages, Lineage(stages)))
        return tuple(new)
    return None


def _merged(
    model: ModelShape,
    devices: Sequence[DeviceView],
    held: Mapping[int, StageView],
    need_blocks: int,
    unmerged: Sequence[NewGroup],
) -> tuple[NewGroup] | None:
    """Make one chain instead of the groups `unmerged`; None if they hold `need_blocks`, or as much as the chain.

    Each device gets only layers that it would have unmerged: a split, during which the chain serves, takes none away.
    """
    blocks = sum(group.capacity_blocks for group in unmerged)
    if len(unmerged) == 1 or blocks >= need_blocks:
        return None
    layers = {stage.device: (stage.first_layer, stage.last_layer) for group in unmerged for stage in group.stages}
    row = sorted(_in_a_row(model, devices, held, 1), key=lambda view: layers[view.device])
    stages = split_layers(model, row, need_blocks, cuts_within([layers[view.device] for view in row]))
    if stages is None:
        return None
    budgets = {view.device: view.budget_chunks for view in devices}
    chain = whole_group(model, budgets, stages, _tree([Lineage(group.stages) for group in unmerged]))
    return (chain,) if chain.capacity_blocks > blocks else None


def _in_a_row(
    model: ModelShape, devices: Sequence[DeviceView], held: Mapping[int, StageView], num_copies: int
) -> list[DeviceView]:
    """Sort devices by the layers they hold; one that holds nothing stands where fewest of the others hold a layer."""
    num_holders, sort_keys = [0] * model.num_layers, {}
    length = ceil_div(num_copies * model.num_layers, len(devices))
    for view in sorted(devices, key=lambda view: (view.device not in held, view.device)):
        if stage := held.get(view.device):
            first, last = stage.first_layer, stage.last_layer
        else:
            first = num_holders.index(min(num_holders))
            last = min(first + length, model.num_layers)
        sort_keys[view.device] = (first, last, view.device)
        for layer in range(first, last):
            num_holders[layer] += 1
    return sorted(devices, key=lambda view: sort_keys[view.device])


def _in_order(model: ModelShape, chain: Sequence[DeviceView], least_blocks: int) -> Sequence[DeviceView]:
    """Keep a chain's order if it holds `least_blocks` so; else put its richest at the ends, which hold more weights."""
    if len(chain) < 2 or _most_blocks(model, chain) >= least_blocks:
        return chain
    first, last, *others = sorted(chain, key=lambda view: -view.budget_chunks)
    return [first, *others, last]


def _most_blocks(model: ModelShape, chain: Sequence[DeviceView]) -> int:
    """Count the blocks of KV in the split of a chain that holds most; 0 if not even the weights fit."""
    budgets = [view.budget_chunks for view in chain]
    return model.blocks_in(Chain(model, budgets, free_cuts(model, len(chain))).most_chunks or 0)


def _tree(lineages: Sequence[Lineage]) -> Lineage:
    """Halve lineages again and again, neighbours apart: each half of a chain then has parts of all of the model."""
    if len(lineages) == 1:
        return lineages[0]
    return Lineage((), (_tree(lineages[0::2]), _tree(lineages[1::2])))


def plan_join(snapshot: Snapshot, devices: Sequence[DeviceView], need_blocks: int, least_blocks: int) -> Join | None:
    """Let devices, which can make no group, become stages of a group that goes on; None if that is of no use.

    It is if the group holds more with them, or as much and a restore can then split it: in halves that hold
    `least_blocks` each. Of the groups that are not merged, the one that gains most; as few devices as that takes.
    `need_blocks` is what the server as a whole should hold.
    """
    joining = sorted(devices, key=lambda view: (-view.budget_chunks, view.device))[:MOST_JOINING]
    best, best_gain = None, (0, False)
    for group in snapshot.groups:
        if group.lineage is not None and group.lineage.merged_from:
            continue
        before = capacity_blocks(snapshot.model, snapshot.budgets(), group.stages)
        need = max(before + 1, need_blocks - snapshot.capacity_blocks() + before)
        for number in range(1, len(joining) + 1):
            for gaps in combinations_with_replacement(range(len(group.stages) + 1), number):
                stages = _with_newcomers(snapshot, group, joining[:number], gaps, need)
                join = _join(snapshot, group, stages, before, least_blocks) if stages else None
                if join and (gain := (join.merge.added_blocks, bool(join.merge.lineage.merged_from))) > best_gain:
                    best, best_gain = join, gain
    return best


def _with_newcomers(
    snapshot: Snapshot, group: GroupView, joining: Sequence[DeviceView], gaps: Sequence[int], need_blocks: int
) -> tuple[StageView, ...]:
    """Cut a group's layers with newcomers in these gaps between its stages; empty if that cannot be."""
    model, views = snapshot.model, {view.device: view for view in snapshot.devices}
    row = list[tuple[DeviceView, tuple[int, int]]]()
    for position in range(len(group.stages) + 1):
        row += [(view, (0, model.num_layers)) for view, gap in zip(joining, gaps, strict=True) if gap == position]
        row += [(views[s.device], (s.first_layer, s.last_layer)) for s in group.stages[position : position + 1]]
    cuts = cuts_within([layers for _, layers in row])
    return split_layers(model, [view for view, _ in row], need_blocks, cuts) or ()


def _join(snapshot: Snapshot, group: GroupView, stages: tuple[StageView, ...], before: int, least_blocks: int) -> Join:
    """Return the plan for this chain, of a group that holds `before` blocks."""
    members = {stage.device for stage in group.stages}
    newcomers = tuple(stage for stage in stages if stage.device not in members)
    restore = plan_restore(replace(snapshot, groups=(GroupView(0, stages),)))
    halves = restore.splits[0].into if restore else ()
    lineage = Lineage(stages)
    if halves and min(half.capacity_blocks for half in halves) >= least_blocks:
        lineage = Lineage((), tuple(Lineage(half.stages) for half in halves))
    blocks = capacity_blocks(snapshot.model, snapshot.budgets(), stages)
    merge = Merge((group.group_id, NEWCOMERS), stages, blocks, lineage, 0, blocks - before)
    with_newcomers = replace(snapshot, groups=(*snapshot.groups, GroupView(NEWCOMERS, newcomers)))
    return Join(group.group_id, with_newcomers, merge, newcomers)
