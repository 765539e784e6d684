from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
from planner_oracle import (
    SMOLLM2,
    apply_drop,
    blocks_of,
    check_stages,
    random_snapshot,
    smollm2_snapshot,
)
from seeds import seeds

from kunserve.planner.drop import plan_drop
from kunserve.planner.exchange import layer_moves
from kunserve.planner.plan import RestorePlan
from kunserve.planner.restore import HeldRequest, assign_requests, plan_restore
from kunserve.planner.snapshot import DeviceView, GroupView, Snapshot, StageView


def check_restore(snapshot: Snapshot, plan: RestorePlan) -> None:
    """Everything a restore plan says, counted again."""
    assert plan.epoch == snapshot.epoch
    groups, budgets = {group.group_id: group for group in snapshot.groups}, snapshot.budgets()
    assert len({split.group_id for split in plan.splits}) == len(plan.splits) > 0
    for split in plan.splits:
        group = groups[split.group_id]
        kept = {stage.device: stage for stage in group.stages}
        assert sorted(s.device for part in split.into for s in part.stages) == sorted(kept)
        for part in split.into:
            check_stages(snapshot, part.stages)
            for stage, num_blocks in zip(part.stages, part.num_blocks, strict=True):
                first, last = stage.first_layer, stage.last_layer
                assert num_blocks == blocks_of(snapshot.model, budgets[stage.device], first, last)
                assert num_blocks >= group.used_blocks
                assert first <= kept[stage.device].first_layer and kept[stage.device].last_layer <= last


def apply_restore(snapshot: Snapshot, plan: RestorePlan) -> Snapshot:
    groups = {group.group_id: group for group in snapshot.groups}
    for split in plan.splits:
        used = groups.pop(split.group_id).used_blocks
        for i, (part, blocks) in enumerate(zip(split.into, (used // 2, used - used // 2), strict=True)):
            group_id = 2 * split.group_id + 10_000 + i
            groups[group_id] = GroupView(group_id, part.stages, blocks, part.lineage)
    return replace(snapshot, epoch=snapshot.epoch + 1, groups=tuple(groups.values()))


def layouts(snapshot: Snapshot) -> set[tuple[StageView, ...]]:
    return {group.stages for group in snapshot.groups}


def test_four_to_two_to_one() -> None:
    launched = smollm2_snapshot(4, used_blocks=50)
    dropped = apply_drop(launched, plan_drop(launched, 10**6))
    assert len(dropped.groups) == 1
    assert dropped.undropped_blocks() == launched.capacity_blocks() == 4 * 256
    first = plan_restore(dropped)
    assert first is not None
    check_restore(dropped, first)
    pairs = apply_restore(dropped, first)
    assert sorted(len(group.stages) for group in pairs.groups) == [2, 2]
    second = plan_restore(pairs)
    assert second is not None
    check_restore(pairs, second)
    assert [part.num_blocks for split in second.splits for part in split.into] == [(256,)] * 4
    restored = apply_restore(pairs, second)
    assert layouts(restored) == layouts(launched)
    assert plan_restore(restored) is None


def test_kv_that_does_not_fit_into_what_will_be_left() -> None:
    launched = smollm2_snapshot(2, used_blocks=128)
    dropped = apply_drop(launched, plan_drop(launched, 938))
    assert plan_restore(dropped) is not None
    full = replace(dropped, groups=tuple(replace(group, used_blocks=257) for group in dropped.groups))
    assert plan_restore(full) is None


def test_the_server_keeps_what_it_needs() -> None:
    launched = smollm2_snapshot(4)
    dropped = apply_drop(launched, plan_drop(launched, 1800))
    assert len(dropped.groups) == 2
    plan = plan_restore(dropped, need_blocks=dropped.capacity_blocks() - 1)
    assert plan is None
    one = plan_restore(dropped, need_blocks=dropped.capacity_blocks() // 2 + 512)
    assert one is not None
    assert len(one.splits) == 1


def test_without_a_known_origin_a_group_is_halved() -> None:
    stages = (StageView(0, 0, 7), StageView(1, 7, 15), StageView(2, 15, 23), StageView(3, 23, 30))
    snapshot = Snapshot(7, SMOLLM2, smollm2_snapshot(4).devices, (GroupView(5, stages, 100),))
    assert snapshot.undropped_blocks() == 4 * 256
    plan = plan_restore(snapshot)
    assert plan is not None
    check_restore(snapshot, plan)
    assert [[s.device for s in part.stages] for part in plan.splits[0].into] == [[0, 2], [1, 3]]


def test_a_model_that_needs_two_devices_is_not_halved() -> None:
    devices = tuple(DeviceView(i, 200) for i in range(2))
    stages = (StageView(0, 0, 15), StageView(1, 15, 30))
    snapshot = Snapshot(1, SMOLLM2, devices, (GroupView(0, stages),))
    assert plan_restore(snapshot) is None
    assert snapshot.undropped_blocks() == snapshot.capacity_blocks() > 0


@pytest.mark.parametrize("seed", seeds(200))
def test_every_step_back_fits(seed: int) -> None:
    """However often groups merged, every split on the way back fits, with KV in the way."""
    rng = random.Random(seed)
    launched = random_snapshot(rng, rng.randint(2, 7))
    snapshot = launched
    for _ in range(rng.randint(1, 3)):
        snapshot = apply_drop(snapshot, plan_drop(snapshot, snapshot.capacity_blocks() + rng.randint(1, 60)))
    assert snapshot.undropped_blocks() == launched.capacity_blocks()
    while (plan := plan_restore(snapshot)) is not None:
        check_restore(snapshot, plan)
        snapshot = apply_restore(snapshot, plan)


@pytest.mark.parametrize("seed", seeds(40))
def test_an_idle_server_always_gets_back(seed: int) -> None:
    rng = random.Random(seed)
    launched = random_snapshot(rng, rng.randint(2, 7))
    launched = replace(launched, groups=tuple(replace(group, used_blocks=0) for group in launched.groups))
    snapshot = apply_drop(launched, plan_drop(launched, 10**6))
    while (plan := plan_restore(snapshot)) is not None:
        snapshot = apply_restore(snapshot, plan)
    assert layouts(snapshot) == layouts(launched)


def test_groups_of_two_devices_come_back_as_launched() -> None:
    devices = tuple(DeviceView(i, 220) for i in range(8))
    launched = tuple(GroupView(g, (StageView(2 * g, 0, 17), StageView(2 * g + 1, 17, 30)), 9) for g in range(4))
    snapshot = Snapshot(1, SMOLLM2, devices, launched)
    for need in (2 * snapshot.capacity_blocks(), 10**6):
        snapshot = apply_drop(snapshot, plan_drop(snapshot, need))
    assert [len(group.stages) for group in snapshot.groups] == [8]
    while (plan := plan_restore(snapshot)) is not None:
        check_restore(snapshot, plan)
        snapshot = apply_restore(snapshot, plan)
    assert layouts(snapshot) == {group.stages for group in launched}


@pytest.mark.parametrize("seed", seeds(60))
def test_requests_are_shared_out_evenly_and_little_moves(seed: int) -> None:
    rng = random.Random(seed)
    stages = (StageView(0, 0, 17), StageView(1, 17, 30))
    halves = [(StageView(0, 0, 30),), (StageView(1, 0, 30),)]
    requests = [HeldRequest(f"r{i}", rng.randint(1, 9)) for i in range(rng.randint(0, 8))]
    given = assign_requests(requests, stages, halves, [len(requests)] * 2)
    assert sorted(i for ids in given for i in ids) == sorted(request.request_id for request in requests)
    blocks = {request.request_id: request.num_blocks for request in requests}
    loads = [sum(blocks[i] for i in ids) for ids in given]
    assert loads[0] >= loads[1]  # the first half has more layers where they are
    best = min(
        abs(sum(b if side else -b for b, side in zip(blocks.values(), sides, strict=True)))
        for sides in product((0, 1), repeat=len(requests))
    )
    assert loads[0] - loads[1] <= best + max(blocks.values(), default=0) // 2
    assert sum(move.num_layers for move in layer_moves(stages, halves[0])) == 13


@pytest.mark.parametrize(
    ("max_running", "counts"), [([6, 6], (5, 1)), ([4, 4], (2, 4)), ([3, 3], (3, 3)), ([1, 5], (1, 5))]
)
def test_no_half_gets_more_requests_than_it_may_run(max_running: list[int], counts: tuple[int, int]) -> None:
    stages = (StageView(0, 0, 17), StageView(1, 17, 30))
    halves = [(StageView(0, 0, 30),), (StageView(1, 0, 30),)]
    requests = [HeldRequest(f"r{i}", num_blocks) for i, num_blocks in enumerate([9, 2, 2, 2, 2, 2])]
    given = assign_requests(requests, stages, halves, max_running)
    assert tuple(map(len, given)) == counts
