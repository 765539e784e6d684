from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import pytest
from planner_oracle import (
    SMOLLM2,
    SMOLLM2_BUDGET,
    all_splits,
    apply_drop,
    check_drop,
    group_blocks,
    partitions,
    random_snapshot,
    smollm2_snapshot,
)
from seeds import seeds

from kunserve.errors import ConflictError, InvalidRequestError
from kunserve.planner.drop import FULL_SHARE, plan_drop, plan_drop_of
from kunserve.planner.plan import DropPlan
from kunserve.planner.snapshot import DeviceView, GroupView, Snapshot, StageView


def sizes(snapshot: Snapshot) -> list[int]:
    return sorted(len(group.stages) for group in snapshot.groups)


def test_smollm2_pair_holds_15000_tokens() -> None:
    snapshot = smollm2_snapshot(2, used_blocks=250)
    plan = plan_drop(snapshot, need_blocks=938)
    check_drop(snapshot, plan, 938)
    (merge,) = plan.merges
    assert merge.stages == (StageView(0, 0, 17), StageView(1, 17, 30))
    assert merge.capacity_blocks * SMOLLM2.block_size >= 15_000
    assert plan.meets_need
    assert plan.added_blocks == 938 - 512
    assert plan.freed_bytes == 30 * 7 * SMOLLM2.chunk_bytes  # one copy of all layers; both keep the embedding


def test_a_chain_is_cut_for_more_than_groups_merge_for() -> None:
    snapshot = smollm2_snapshot(4, used_blocks=100)
    tight, roomy = plan_drop(snapshot, 1200), plan_drop(snapshot, 1200, room_blocks=10**6)
    check_drop(snapshot, roomy, 1200)
    assert [merge.group_ids for merge in roomy.merges] == [merge.group_ids for merge in tight.merges]
    (cut,), (longest,) = tight.merges, roomy.merges
    assert longest.capacity_blocks == plan_drop_of(snapshot, longest.group_ids, 10**6).merges[0].capacity_blocks
    assert longest.capacity_blocks > cut.capacity_blocks


def test_nothing_to_do() -> None:
    snapshot = smollm2_snapshot(2)
    assert plan_drop(snapshot, 512) == DropPlan(1, (), meets_need=True)


def test_one_group_cannot_merge() -> None:
    assert plan_drop(smollm2_snapshot(1), 257) == DropPlan(1, (), meets_need=False)


def test_too_large_a_need_still_drops_all_it_can() -> None:
    snapshot = smollm2_snapshot(4)
    plan = plan_drop(snapshot, 10**6)
    check_drop(snapshot, plan, 10**6)
    assert not plan.meets_need
    assert [len(merge.stages) for merge in plan.merges] == [4]


@pytest.mark.parametrize(("times", "merged"), [(1, [4]), (3, [2, 2]), (6, [])])
def test_groups_stay_apart_that_hold_hardly_more_together(times: int, merged: list[int]) -> None:
    """The more of a device is KV anyway, the less a merge adds, and the more has to move for it."""
    devices = tuple(DeviceView(i, times * SMOLLM2_BUDGET) for i in range(4))
    snapshot = replace(smollm2_snapshot(4), devices=devices)
    plan = plan_drop(snapshot, 10**6)
    assert [len(merge.stages) for merge in plan.merges] == merged
    assert not plan.meets_need
    assert [len(merge.stages) for merge in plan_drop_of(snapshot, [0, 1]).merges] == [2]  # if an operator asks


def test_pairs_merge_again_and_keep_what_they_have() -> None:
    singles = smollm2_snapshot(4, used_blocks=100)
    first = plan_drop(singles, 1700)
    check_drop(singles, first, 1700)
    pairs = apply_drop(singles, first)
    assert sizes(pairs) == [2, 2]
    second = plan_drop(pairs, 2400)
    check_drop(pairs, second, 2400)
    assert second.meets_need
    (quad,) = second.merges
    assert len(quad.stages) == 4
    assert [len(half.merged_from) for half in quad.lineage.merged_from] == [2, 2]
    # Both middle stages drop their embedding as well: more than the layers is freed.
    assert second.freed_bytes == (30 * 7 + 2 * 55) * SMOLLM2.chunk_bytes


@pytest.mark.parametrize("seed", seeds(150))
def test_as_many_merges_as_brute_force_needs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has fewer merges holds less than needed, whatever has as many holds enough: then the count is exact."""
    monkeypatch.setattr("kunserve.planner.drop.LEAST_MERGE_GAIN", 0.0)
    rng = random.Random(seed)
    snapshot = random_snapshot(rng, rng.randint(2, 5), is_even=True)
    groups = tuple(replace(group, used_blocks=group.used_blocks // 2) for group in snapshot.groups)  # none is full
    snapshot = replace(snapshot, groups=groups)
    held: dict[int, list[int]] = {}  # merges -> blocks that each partition holds
    for parts in partitions([view.device for view in snapshot.devices]):
        blocks = [most_blocks(snapshot, part) for part in parts]
        if all(blocks):
            held.setdefault(len(snapshot.devices) - len(parts), []).append(sum(blocks))
    for num_merges in range(1, max(held) + 1):
        low, high = max(held[num_merges - 1]) + 1, min(held[num_merges])
        if low > high:
            break  # so few chunks that a merge gains nothing, though the next one might: it is not made
        need = rng.randint(low, high)
        plan = plan_drop(snapshot, need)
        check_drop(snapshot, plan, need)
        assert plan.meets_need
        assert sum(len(merge.group_ids) - 1 for merge in plan.merges) == num_merges
        assert sizes(apply_drop(snapshot, plan)) == two_smallest_first(len(snapshot.devices), num_merges)


def most_blocks(snapshot: Snapshot, part: list[int]) -> int:
    full = [(0, snapshot.model.num_layers)] * len(part)
    budgets = [snapshot.devices[device].budget_chunks for device in part]
    return max((split[0] for split in all_splits(snapshot.model, budgets, full)), default=0)


def two_smallest_first(num_groups: int, num_merges: int) -> list[int]:
    sizes = [1] * num_groups
    for _ in range(num_merges):
        a, b, *rest = sorted(sizes)
        sizes = [a + b, *rest]
    return sorted(sizes)


@pytest.mark.parametrize("seed", seeds(300))
def test_every_plan_holds_on_uneven_devices_again_and_again(seed: int) -> None:
    rng = random.Random(seed)
    snapshot = random_snapshot(rng, rng.randint(1, 7))
    for _ in range(3):
        capacity = snapshot.capacity_blocks()
        need = rng.randint(capacity // 2, 2 * capacity + 10)
        plan = plan_drop(snapshot, need)
        check_drop(snapshot, plan, need)
        assert bool(plan.merges) <= (need > capacity)
        snapshot = apply_drop(snapshot, plan)


@pytest.mark.parametrize("seed", seeds(100))
def test_less_kv_moves_than_in_any_other_seating(seed: int) -> None:
    """Of two equal devices, the one whose group has more KV keeps more layers."""
    rng = random.Random(seed)
    snapshot = random_snapshot(rng, 2, is_even=True)
    plan = plan_drop(snapshot, snapshot.capacity_blocks() + 1)
    used = {group.group_id: group.used_blocks for group in snapshot.groups}
    for merge in plan.merges:
        kept = {stage.device: stage.last_layer - stage.first_layer for stage in merge.stages}
        for a, b in combinations(kept, 2):
            assert (kept[a] - kept[b]) * (used[a] - used[b]) >= 0


def test_partners_are_near_and_have_little_kv() -> None:
    base = smollm2_snapshot(6)
    islands, used = (0, 1, 0, 1, 0, 1), (10, 20, 200, 30, 40, 50)
    snapshot = replace(
        base,
        devices=tuple(DeviceView(i, 365, islands[i]) for i in range(6)),
        groups=tuple(replace(group, used_blocks=used[i]) for i, group in enumerate(base.groups)),
    )
    need = snapshot.capacity_blocks() + 1
    assert plan_drop(snapshot, need).merges[0].group_ids == (0, 4)
    assert [m.group_ids for m in plan_drop(snapshot, need + 900).merges] == [(0, 4), (1, 3)]
    # The last two are on different islands: better so than a longer chain.
    assert [m.group_ids for m in plan_drop(snapshot, need + 1500).merges] == [(0, 4), (1, 3), (2, 5)]


def test_more_devices_than_layers_stay_apart() -> None:
    snapshot = smollm2_snapshot(40)
    plan = plan_drop(snapshot, 10**9)
    check_drop(snapshot, plan, 10**9)
    assert max(len(merge.stages) for merge in plan.merges) <= 30


def test_groups_of_two_devices_at_launch() -> None:
    """A model that needs two devices: its groups merge like dropped ones."""
    model = replace(SMOLLM2, tied=False, head_chunks=54)
    devices = tuple(DeviceView(i, 220) for i in range(4))
    ends = (17, 30)
    groups = tuple(
        GroupView(g, (StageView(2 * g, 0, ends[0]), StageView(2 * g + 1, ends[0], ends[1])), 30) for g in range(2)
    )
    snapshot = Snapshot(3, model, devices, groups)
    need = snapshot.capacity_blocks() + 200
    plan = plan_drop(snapshot, need)
    check_drop(snapshot, plan, need)
    assert plan.meets_need
    assert [stage.device % 2 for stage in plan.merges[0].stages] == [0, 0, 1, 1]


def test_operator_chooses() -> None:
    snapshot = smollm2_snapshot(4, used_blocks=10)
    plan = plan_drop_of(snapshot, [3, 1], need_blocks=0)
    check_drop(snapshot, plan, 0)
    assert [merge.group_ids for merge in plan.merges] == [(1, 3)]
    assert plan.added_blocks > 0
    trio = plan_drop_of(snapshot, [0, 1, 2], need_blocks=10**6)
    check_drop(snapshot, trio, 10**6)
    assert [merge.group_ids for merge in trio.merges] == [(0, 1, 2)]


@pytest.mark.parametrize("group_ids", [[], [1], [1, 1], [0, 9]])
def test_operator_chooses_wrong(group_ids: list[int]) -> None:
    with pytest.raises(InvalidRequestError):
        plan_drop_of(smollm2_snapshot(2), group_ids)


def test_operator_wants_what_cannot_be() -> None:
    snapshot = smollm2_snapshot(31)
    with pytest.raises(ConflictError):
        plan_drop_of(snapshot, range(31))


def test_equal_snapshots_have_equal_plans() -> None:
    rng = random.Random(5)
    snapshot = random_snapshot(rng, 6)
    shuffled = replace(snapshot, groups=tuple(reversed(snapshot.groups)))
    need = snapshot.capacity_blocks() + 5
    assert plan_drop(snapshot, need) == plan_drop(shuffled, need)


def test_all_full_groups_merge_if_any_has_to() -> None:
    """Room elsewhere is nothing to them: the rest is left alone, unless an odd one needs a partner."""
    base = smollm2_snapshot(8)
    full = (250, 40, 250, 30, 250, 20, 250, 10)
    snapshot = replace(base, groups=tuple(replace(g, used_blocks=n) for g, n in zip(base.groups, full, strict=True)))
    need = snapshot.capacity_blocks() + 1
    plan = plan_drop(snapshot, need)
    check_drop(snapshot, plan, need)
    assert [merge.group_ids for merge in plan.merges] == [(0, 2), (4, 6)]
    assert plan_drop(snapshot, need - 1).merges == ()
    odd = replace(snapshot, groups=(replace(snapshot.groups[0], used_blocks=5), *snapshot.groups[1:]))
    assert [merge.group_ids for merge in plan_drop(odd, need).merges] == [(2, 4), (0, 6)]


def on_islands(used: Sequence[int], islands: Sequence[int]) -> Snapshot:
    """Groups of one device each, of 256 blocks: how many each uses, and which island it is on."""
    base = smollm2_snapshot(len(used))
    devices = tuple(replace(view, island=island) for view, island in zip(base.devices, islands, strict=True))
    groups = tuple(replace(group, used_blocks=n) for group, n in zip(base.groups, used, strict=True))
    return replace(base, devices=devices, groups=groups)


@pytest.mark.parametrize("num_pairs", [2, 4])
def test_full_groups_that_merge_with_free_ones_nearby_leave_no_full_one_alone(num_pairs: int) -> None:
    snapshot = on_islands([250, 40] * num_pairs, [i // 2 for i in range(2 * num_pairs)])
    plan = plan_drop(snapshot, snapshot.capacity_blocks() + 1)
    check_drop(snapshot, plan, snapshot.capacity_blocks() + 1)
    assert [merge.group_ids for merge in plan.merges] == [(2 * i, 2 * i + 1) for i in range(num_pairs)]


def test_a_full_chain_gets_room_from_one_smaller_group_and_the_others_are_left_alone() -> None:
    base = smollm2_snapshot(6)
    pair = apply_drop(base, plan_drop_of(base, [0, 1], 10**6))
    [chain] = (group for group in pair.groups if len(group.stages) == 2)
    most = group_blocks(pair, chain.stages)
    snapshot = replace(pair, groups=tuple(replace(g, used_blocks=most if g is chain else 40) for g in pair.groups))
    need = snapshot.capacity_blocks() + 1
    plan = plan_drop(snapshot, need)
    check_drop(snapshot, plan, need)
    merged = sorted(group_id for merge in plan.merges for group_id in merge.group_ids)
    assert chain.group_id in merged and len(merged) == 4  # two make room for the server, one for the chain


@pytest.mark.parametrize("seed", seeds(100))
def test_no_full_group_stays_alone_and_each_makes_for_one_merge_at_most(seed: int) -> None:
    rng = random.Random(seed)
    number = rng.randint(2, 9)
    snapshot = on_islands(rng.choices((40, 60, 240, 250), k=number), rng.choices(range(4), k=number))
    for _ in range(2):
        capacity = snapshot.capacity_blocks()
        full = {g.group_id for g in snapshot.groups if g.used_blocks > FULL_SHARE * group_blocks(snapshot, g.stages)}
        plan = plan_drop(snapshot, capacity + 1)
        check_drop(snapshot, plan, capacity + 1)
        if len(snapshot.groups) > 1:
            assert full <= {group_id for merge in plan.merges for group_id in merge.group_ids}
        assert sum(len(merge.group_ids) - 1 for merge in plan.merges) <= 1 + len(full)
        snapshot = apply_drop(snapshot, plan)
