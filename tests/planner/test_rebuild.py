from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from planner_oracle import (
    SMOLLM2,
    SMOLLM2_BUDGET,
    all_splits,
    check_stages,
    group_blocks,
    random_model,
    smollm2_snapshot,
)
from seeds import seeds

from kunserve.planner.exchange import LiveRequest, plan_exchange
from kunserve.planner.layouts import stage_layout
from kunserve.planner.plan import ExchangeMode, NewGroup
from kunserve.planner.rebuild import plan_join, plan_rebuild
from kunserve.planner.restore import plan_restore
from kunserve.planner.snapshot import DeviceView, GroupView, Lineage, ModelShape, Snapshot, StageView
from kunserve.sizes import ceil_div

UNTIED = ModelShape(30, 7, 20, 20, False, 24_576, 2 << 20, 16, head_time=3.0)
PAIR_BUDGET = 220  # SmolLM2 needs 265 chunks for its weights: two devices hold it


def snapshot_of(model: ModelShape, budgets: Sequence[int], groups: Sequence[GroupView] = ()) -> Snapshot:
    devices = tuple(DeviceView(i, budget) for i, budget in enumerate(budgets))
    return Snapshot(3, model, devices, tuple(groups))


def rebuild(
    snapshot: Snapshot, held: Sequence[StageView] = (), need_blocks: int = 0, least_blocks: int = 1
) -> tuple[NewGroup, ...] | None:
    """Plan with all devices that are in no group."""
    in_groups = {stage.device for group in snapshot.groups for stage in group.stages}
    free = [view for view in snapshot.devices if view.device not in in_groups]
    return plan_rebuild(snapshot, free, {stage.device: stage for stage in held}, need_blocks, least_blocks)


def stages(parts: tuple[NewGroup, ...] | None) -> list[tuple[StageView, ...]]:
    assert parts is not None
    return [part.stages for part in parts]


def regrouped(snapshot: Snapshot, parts: Sequence[NewGroup]) -> Snapshot:
    """The server with these new groups."""
    made = [GroupView(100 + i, part.stages, 0, part.lineage) for i, part in enumerate(parts)]
    return replace(snapshot, groups=(*snapshot.groups, *made))


def split_again(snapshot: Snapshot) -> Snapshot:
    """The server after all restores that can be. None takes a layer from a device."""
    while (plan := plan_restore(snapshot)) is not None:
        groups = {group.group_id: group for group in snapshot.groups}
        for split in plan.splits:
            kept = {stage.device: stage for stage in groups.pop(split.group_id).stages}
            for i, part in enumerate(split.into):
                check_stages(snapshot, part.stages)
                for device, first, last in part.stages:
                    assert first <= kept[device].first_layer and kept[device].last_layer <= last
                group_id = 2 * split.group_id + 10_000 + i
                groups[group_id] = GroupView(group_id, part.stages, 0, part.lineage)
        snapshot = replace(snapshot, groups=tuple(groups.values()))
    return snapshot


def launched(parts: Sequence[NewGroup]) -> list[tuple[StageView, ...]]:
    return [lineage.stages for part in parts if part.lineage for lineage in part.lineage.launched()]


def check_parts(snapshot: Snapshot, parts: Sequence[NewGroup]) -> None:
    """Every layer once, every device at most once, weights and KV within each budget, and some KV."""
    model, budgets = snapshot.model, snapshot.budgets()
    used = [stage.device for group in regrouped(snapshot, parts).groups for stage in group.stages]
    assert len(set(used)) == len(used)
    for part in parts:
        check_stages(snapshot, part.stages)
        assert part.capacity_blocks == group_blocks(snapshot, part.stages) > 0
        for stage, layout in zip(part.stages, part.layouts, strict=True):
            budget = budgets[stage.device]
            assert layout == stage_layout(model, budget, stage)
            assert model.weight_chunks(stage.first_layer, stage.last_layer) + sum(layout.kv_chunks) <= budget


# --- by hand --------------------------------------------------------------------------------------------------------

LEFT = (StageView(0, 0, 10), StageView(2, 20, 30))  # of a chain of three whose middle is lost


def test_a_small_need_makes_groups_of_one() -> None:
    snapshot = snapshot_of(SMOLLM2, [SMOLLM2_BUDGET] * 2)
    parts = rebuild(snapshot, need_blocks=512, least_blocks=256)
    assert stages(parts) == [((0, 0, 30),), ((1, 0, 30),)]
    assert parts is not None
    assert [part.lineage for part in parts] == [Lineage((StageView(i, 0, 30),)) for i in range(2)]
    assert [part.num_blocks for part in parts] == [(256,), (256,)]
    check_parts(snapshot, parts)


@pytest.mark.parametrize(
    ("need", "length"), [(513, 19), (938, 17), (1109, 15), (10**6, 15)]
)  # SmolLM2's embeddings are tied: both ends hold them, and the head costs the last stage time
def test_a_large_need_makes_one_chain(need: int, length: int) -> None:
    snapshot = snapshot_of(SMOLLM2, [SMOLLM2_BUDGET] * 2)
    parts = rebuild(snapshot, need_blocks=need)
    assert stages(parts) == [((0, 0, length), (1, length, 30))]
    assert parts is not None
    check_parts(snapshot, parts)
    assert parts[0].capacity_blocks >= min(need, 1109)
    assert parts[0].lineage == Lineage((), (Lineage((StageView(0, 0, 30),)), Lineage((StageView(1, 0, 30),))))


def test_what_is_left_of_a_chain_stays_near_its_layers() -> None:
    snapshot = snapshot_of(SMOLLM2, [SMOLLM2_BUDGET] * 3)
    devices = [snapshot.devices[2], snapshot.devices[0]]
    parts = plan_rebuild(snapshot, devices, {stage.device: stage for stage in LEFT}, 1109, 1)
    assert stages(parts) == [((0, 0, 15), (2, 15, 30))]


def test_a_device_that_came_stands_in_the_gap() -> None:
    held = [StageView(1, 0, 10), StageView(0, 20, 30)]
    parts = rebuild(snapshot_of(SMOLLM2, [SMOLLM2_BUDGET] * 3), held, 10**6)
    assert [device for device, _, _ in stages(parts)[0]] == [1, 2, 0]


def test_the_groups_that_go_on_count() -> None:
    snapshot = smollm2_snapshot(3)
    snapshot = replace(snapshot, groups=snapshot.groups[:1])
    assert len(stages(rebuild(snapshot, need_blocks=768))) == 2
    assert stages(rebuild(snapshot, need_blocks=256 + 938)) == [((1, 0, 17), (2, 17, 30))]


def test_without_tied_embeddings_each_end_holds_its_own() -> None:
    snapshot = snapshot_of(UNTIED, [SMOLLM2_BUDGET] * 2)
    assert len(stages(rebuild(snapshot, need_blocks=512))) == 2
    parts = rebuild(snapshot, need_blocks=10**6)
    assert parts is not None
    assert stages(parts) == [((0, 0, 15), (1, 15, 30))]
    assert parts[0].num_blocks == ((365 - 20 - 15 * 7) // 15 * (2 << 20) // 24_576,) * 2
    check_parts(snapshot, parts)


def test_the_longest_request_makes_chains_longer() -> None:
    snapshot = snapshot_of(SMOLLM2, [SMOLLM2_BUDGET] * 4)
    assert [len(part) for part in stages(rebuild(snapshot, least_blocks=256))] == [1] * 4
    assert [len(part) for part in stages(rebuild(snapshot, least_blocks=257))] == [2, 2]
    assert [len(part) for part in stages(rebuild(snapshot, least_blocks=1110))] == [4]


def test_less_than_the_longest_request_is_better_than_nothing() -> None:
    parts = rebuild(snapshot_of(SMOLLM2, [SMOLLM2_BUDGET] * 2), least_blocks=10**6)
    assert parts is not None
    assert stages(parts) == [((0, 0, 15), (1, 15, 30))]
    assert parts[0].lineage == Lineage(parts[0].stages)
    assert parts[0].capacity_blocks == 1109


def test_some_kv_comes_before_balance() -> None:
    """The best balanced split, 19 and 11 layers, would leave no chunk for the KV of the first stage."""
    parts = rebuild(snapshot_of(SMOLLM2, [200] * 2), least_blocks=0)
    assert parts is not None
    assert parts[0].capacity_blocks > 0


def test_devices_of_different_budgets() -> None:
    snapshot = snapshot_of(SMOLLM2, [SMOLLM2_BUDGET, 300, 600])
    parts = rebuild(snapshot)
    assert parts is not None
    assert [part.num_blocks for part in parts] == [(256,), (85,), (938,)]
    check_parts(snapshot, parts)
    (chain,) = rebuild(snapshot, need_blocks=10**6) or ()
    assert chain.capacity_blocks > 256 + 85 + 938
    check_parts(snapshot, [chain])
    longest = max(chain.stages, key=lambda stage: stage.last_layer - stage.first_layer)
    assert longest.device == 2


def test_a_device_that_cannot_hold_the_model_joins_another() -> None:
    snapshot = snapshot_of(SMOLLM2, [SMOLLM2_BUDGET, 150, SMOLLM2_BUDGET])
    parts = rebuild(snapshot, least_blocks=256)
    assert parts is not None
    assert [[stage.device for stage in part.stages] for part in parts] == [[0, 1], [2]]
    check_parts(snapshot, parts)


def test_a_device_that_cannot_hold_an_embedding_stands_between_others() -> None:
    snapshot = snapshot_of(SMOLLM2, [PAIR_BUDGET, PAIR_BUDGET, 60])
    parts = rebuild(snapshot, [StageView(2, 0, 10), StageView(0, 10, 20)])
    assert parts is not None
    assert [stage.device for stage in parts[0].stages] == [0, 2, 1]
    check_parts(snapshot, parts)


def test_a_device_that_cannot_hold_one_layer_idles() -> None:
    snapshot = snapshot_of(SMOLLM2, [7, SMOLLM2_BUDGET, SMOLLM2_BUDGET])
    assert stages(rebuild(snapshot)) == [((1, 0, 30),), ((2, 0, 30),)]


def test_a_device_more_than_layers_idles() -> None:
    model = replace(UNTIED, num_layers=2)
    assert len(stages(rebuild(snapshot_of(model, [75] * 3)))) == 3
    assert stages(rebuild(snapshot_of(model, [50] * 3))) == [((0, 0, 1), (1, 1, 2))]


def test_three_devices_of_a_model_that_needs_two_are_one_chain() -> None:
    snapshot = snapshot_of(SMOLLM2, [PAIR_BUDGET] * 3)
    parts = rebuild(snapshot, LEFT)
    assert parts is not None
    assert [stage.device for stage in parts[0].stages] == [0, 1, 2]
    assert parts[0].lineage == Lineage(parts[0].stages)
    check_parts(snapshot, parts)
    assert parts == rebuild(snapshot, LEFT, need_blocks=parts[0].capacity_blocks)


def test_chains_keep_what_their_devices_hold() -> None:
    """A first half is lost, of two chains; device 3 came for it and holds nothing."""
    snapshot = snapshot_of(SMOLLM2, [PAIR_BUDGET] * 4)
    held = [StageView(1, 0, 17), StageView(2, 17, 30), StageView(0, 17, 30)]
    parts = rebuild(snapshot, held)
    assert parts is not None
    assert [[stage.device for stage in part.stages] for part in parts] == [[3, 0], [1, 2]]
    check_parts(snapshot, parts)


def test_a_chain_of_chains_takes_no_layer_away_when_it_splits() -> None:
    snapshot = snapshot_of(SMOLLM2, [PAIR_BUDGET] * 4)
    apart = rebuild(snapshot)
    (chain,) = rebuild(snapshot, need_blocks=10**6) or ()
    assert apart is not None
    assert len(apart) == 2
    assert chain.capacity_blocks > sum(part.capacity_blocks for part in apart)
    restored = split_again(regrouped(snapshot, [chain]))
    assert {group.stages for group in restored.groups} == set(launched([chain]))
    assert sorted(len(group.stages) for group in restored.groups) == [2, 2]


@pytest.mark.parametrize("num_devices", [2, 3, 4, 5, 7])
def test_one_chain_can_be_split_again(num_devices: int) -> None:
    snapshot = snapshot_of(SMOLLM2, [SMOLLM2_BUDGET] * num_devices)
    (chain,) = rebuild(snapshot, need_blocks=10**6) or ()
    assert len(chain.stages) == num_devices
    merged = regrouped(snapshot, [chain])
    assert merged.undropped_blocks() == num_devices * 256
    first = plan_restore(merged)
    assert first is not None
    assert sorted(len(part.stages) for part in first.splits[0].into) == [num_devices // 2, ceil_div(num_devices, 2)]
    restored = split_again(merged)
    assert {group.stages for group in restored.groups} == {(StageView(i, 0, 30),) for i in range(num_devices)}


def test_devices_that_cannot_hold_a_copy_idle() -> None:
    assert rebuild(snapshot_of(SMOLLM2, [PAIR_BUDGET])) is None
    assert rebuild(snapshot_of(SMOLLM2, [PAIR_BUDGET, 5])) is None
    assert rebuild(snapshot_of(SMOLLM2, [265])) is None  # the weights fit, but not a block
    assert rebuild(snapshot_of(SMOLLM2, [])) is None


# --- at random ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """A server with a group that goes on, perhaps, and free devices that hold something, perhaps."""

    snapshot: Snapshot
    held: tuple[StageView, ...]
    need_blocks: int
    least_blocks: int
    budget: int | None  # of all free devices, if they are alike

    def rebuild(self, need_blocks: int | None = None) -> tuple[NewGroup, ...] | None:
        return rebuild(
            self.snapshot, self.held, self.need_blocks if need_blocks is None else need_blocks, self.least_blocks
        )


def random_case(rng: random.Random, is_even: bool) -> Case:
    model = random_model(rng)
    full = model.weight_chunks(0, model.num_layers)
    budget = rng.randint(full // 4, full + 4 * model.num_layers) if is_even else None
    num_devices = rng.randint(1, 6)
    budgets = [budget or rng.randint(full // 4, full + 4 * model.num_layers) for _ in range(num_devices)]
    groups = [GroupView(0, (StageView(num_devices, 0, model.num_layers),))] if rng.random() < 0.5 else []
    snapshot = snapshot_of(model, [*budgets, full + model.num_layers] if groups else budgets, groups)
    held = []
    for device in rng.sample(range(num_devices), rng.randint(0, num_devices)):
        first = rng.randrange(model.num_layers)
        held.append(StageView(device, first, rng.randint(first + 1, model.num_layers)))
    return Case(snapshot, tuple(held), rng.randint(0, 60), rng.randint(0, 12), budget)


def most_blocks(model: ModelShape, budget: int, num_devices: int) -> int:
    """Blocks that a chain of like devices can hold, by trying all splits."""
    free = [(0, model.num_layers)] * num_devices
    return max((blocks for blocks, _, _ in all_splits(model, [budget] * num_devices, free)), default=0)


def expected_lengths(model: ModelShape, budget: int, num_devices: int, least_blocks: int) -> list[int]:
    """Lengths of the chains apart, of like devices; empty if they cannot hold the model."""
    for used in range(num_devices, 0, -1):
        for size in range(1, used + 1):
            num_chains = used // size
            lengths = [used // num_chains + (i < used % num_chains) for i in range(num_chains)]
            if all(most_blocks(model, budget, length) >= max(1, least_blocks) for length in lengths):
                return lengths
        if most_blocks(model, budget, used):
            return [used]
    return []


@pytest.mark.parametrize("seed", seeds(400))
def test_every_plan_fits_and_can_be_split_again(seed: int) -> None:
    case = random_case(random.Random(seed), is_even=seed % 2 == 0)
    parts = case.rebuild()
    if parts is None:
        assert case.rebuild(need_blocks=0) is None
        return
    check_parts(case.snapshot, parts)
    restored = split_again(regrouped(case.snapshot, parts))
    assert {group.stages for group in restored.groups} >= set(launched(parts))


@pytest.mark.parametrize("seed", seeds(400))
def test_groups_stay_apart_wherever_that_meets_the_need(seed: int) -> None:
    case = random_case(random.Random(seed), is_even=seed % 2 == 0)
    parts, most = case.rebuild(), case.rebuild(need_blocks=10**6)
    if parts is None or most is None:
        assert parts is most is None
        return
    capacity = regrouped(case.snapshot, parts).capacity_blocks()
    apart = sum(group_blocks(case.snapshot, stages) for stages in launched(parts))
    going_on = case.snapshot.capacity_blocks()
    if parts[0].lineage and parts[0].lineage.merged_from:
        assert going_on + apart < case.need_blocks
        assert capacity > going_on + apart
    if capacity < case.need_blocks:  # then nothing else would hold more
        assert capacity == regrouped(case.snapshot, most).capacity_blocks()


@pytest.mark.parametrize("seed", seeds(400))
def test_like_devices_form_chains_as_short_as_can_be(seed: int) -> None:
    case = random_case(random.Random(seed), is_even=True)
    assert case.budget is not None
    num_free = len(case.snapshot.devices) - len(case.snapshot.groups)
    lengths = expected_lengths(case.snapshot.model, case.budget, num_free, case.least_blocks)
    parts = case.rebuild()
    if parts is None:
        assert not lengths
        return
    assert sorted(map(len, launched(parts))) == sorted(lengths)
    if len(lengths) > 1:
        assert all(group_blocks(case.snapshot, stages) >= case.least_blocks for stages in launched(parts))


# --- joining a group that goes on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", seeds(400))
def test_whoever_joins_takes_layers_over_and_gives_room(seed: int) -> None:
    rng = random.Random(seed)
    model = random_model(rng)
    full, length = model.weight_chunks(0, model.num_layers), rng.randint(1, min(3, model.num_layers))
    budgets = [rng.randint(full // 3, full + 2 * model.num_layers) for _ in range(length + rng.randint(1, 2))]
    snapshot = snapshot_of(model, budgets)
    parts = plan_rebuild(snapshot, snapshot.devices[:length], {}, 0, 1)
    if parts is None:
        return
    groups = tuple(GroupView(i, part.stages, 0, part.lineage) for i, part in enumerate(parts))
    snapshot = replace(snapshot, groups=groups)
    join = plan_join(snapshot, snapshot.devices[length:], rng.randint(0, 60), 1)
    if join is None:
        return
    old = {stage.device: stage for stage in groups[join.group_id].stages}
    merge = join.merge
    check_stages(snapshot, merge.stages)
    assert {stage.device for stage in merge.stages} == {*old, *(stage.device for stage in join.newcomers)}
    for device, first, last in merge.stages:  # whoever is there loads nothing
        assert device not in old or (old[device].first_layer <= first and last <= old[device].last_layer)
    gain = group_blocks(snapshot, merge.stages) - group_blocks(snapshot, tuple(old.values()))
    assert gain == merge.added_blocks and (gain > 0 or (gain == 0 and merge.lineage.merged_from))
    used = group_blocks(snapshot, tuple(old.values()))
    requests = [LiveRequest(f"r{i}", join.group_id, used // 3) for i in range(3)]
    exchange = plan_exchange(join.snapshot, merge, requests)
    assert exchange.mode is ExchangeMode.BY_REQUEST or not used // 3
    joined = GroupView(join.group_id, merge.stages, 0, merge.lineage)
    others = tuple(group for group in groups if group.group_id != join.group_id)
    restored = split_again(replace(snapshot, groups=(joined, *others)))
    if merge.lineage.merged_from:
        assert {group.stages for group in restored.groups} >= {lineage.stages for lineage in merge.lineage.launched()}


def test_one_that_is_left_stands_between_two() -> None:
    snapshot = snapshot_of(SMOLLM2, [PAIR_BUDGET] * 3)
    group = GroupView(0, (StageView(0, 0, 17), StageView(1, 17, 30)))
    join = plan_join(replace(snapshot, groups=(group,)), snapshot.devices[2:], 0, 1)
    assert join is not None
    assert [stage.device for stage in join.merge.stages] == [0, 2, 1] and join.merge.added_blocks > 0
    assert join.merge.lineage == Lineage(join.merge.stages)


def test_one_more_beside_three_is_two_pairs_again() -> None:
    snapshot = snapshot_of(SMOLLM2, [PAIR_BUDGET] * 4)
    group = GroupView(0, (StageView(0, 0, 11), StageView(2, 11, 20), StageView(1, 20, 30)))
    join = plan_join(replace(snapshot, groups=(group,)), snapshot.devices[3:], 0, 1)
    assert join is not None
    assert sorted(len(lineage.stages) for lineage in join.merge.lineage.launched()) == [2, 2]


def test_nobody_joins_a_merged_group() -> None:
    snapshot = snapshot_of(SMOLLM2, [PAIR_BUDGET] * 3)
    stages = (StageView(0, 0, 17), StageView(1, 17, 30))
    group = GroupView(0, stages, 0, Lineage((), (Lineage(stages[:1]), Lineage(stages[1:]))))
    assert plan_join(replace(snapshot, groups=(group,)), snapshot.devices[2:], 0, 1) is None
