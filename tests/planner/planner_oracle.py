"""Slow and obvious counterparts of the planner: random servers, brute force, and a validator for every plan."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from kunserve.planner.plan import DropPlan
from kunserve.planner.snapshot import DeviceView, GroupView, Lineage, ModelShape, Snapshot, StageView

SMOLLM2 = ModelShape(30, 7, 55, 0, True, 24_576, 2 << 20, 16, head_time=8.0)
SMOLLM2_BUDGET = 365


def smollm2_snapshot(num_devices: int, used_blocks: int = 0) -> Snapshot:
    """One group per device, as `cpu:N` starts."""
    devices = tuple(DeviceView(i, SMOLLM2_BUDGET) for i in range(num_devices))
    groups = tuple(GroupView(i, (StageView(i, 0, 30),), used_blocks) for i in range(num_devices))
    return Snapshot(1, SMOLLM2, devices, groups)


def random_model(rng: random.Random, max_layers: int = 7) -> ModelShape:
    tied = rng.random() < 0.5
    return ModelShape(
        num_layers=rng.randint(2, max_layers),
        layer_chunks=rng.randint(1, 9),
        embed_chunks=rng.randint(0, 12),
        head_chunks=0 if tied else rng.randint(0, 12),
        tied=tied,
        kv_block_bytes=rng.choice([3, 7, 10, 16]),
        chunk_bytes=rng.choice([16, 32, 50]),
        block_size=16,
        layer_time=rng.choice([1.0, 0.37, 2.5]),
        embed_time=rng.choice([0.0, 0.1, 1.7]),
        head_time=rng.choice([0.0, 0.9, 4.3]),
        shares_head=tied and rng.random() < 0.5,
    )


def full_weights(model: ModelShape) -> int:
    return model.weight_chunks(0, model.num_layers)


def random_snapshot(rng: random.Random, num_devices: int, is_even: bool = False) -> Snapshot:
    """One-device groups with some KV each."""
    model = random_model(rng)
    spare = rng.randint(1, 6) * model.num_layers
    devices, groups = [], []
    for i in range(num_devices):
        extra = spare if is_even else spare + rng.randint(0, 20)
        devices.append(DeviceView(i, full_weights(model) + extra, island=rng.randrange(2)))
        capacity = blocks_of(model, devices[-1].budget_chunks, 0, model.num_layers)
        groups.append(GroupView(i, (StageView(i, 0, model.num_layers),), rng.randint(0, capacity)))
    return Snapshot(rng.randint(1, 99), model, tuple(devices), tuple(groups))


def blocks_of(model: ModelShape, budget_chunks: int, first: int, last: int) -> int:
    """Blocks of one stage, counted unit by unit."""
    weights = model.layer_chunks * (last - first)
    if first == 0 or (last == model.num_layers and model.tied):
        weights += model.embed_chunks
    if last == model.num_layers:
        weights += model.head_chunks
    chunks = (budget_chunks - weights) // (last - first)
    return max(0, chunks) * model.chunk_bytes // model.kv_block_bytes


def group_blocks(snapshot: Snapshot, stages: Sequence[StageView]) -> int:
    budgets = snapshot.budgets()
    return min(blocks_of(snapshot.model, budgets[s.device], s.first_layer, s.last_layer) for s in stages)


def all_splits(
    model: ModelShape, budgets: Sequence[int], held: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, float, tuple[int, ...]]]:
    """Capacity, time of the slowest stage, and ends, of every split within `held` whose weights fit."""
    for cuts in combinations(range(1, model.num_layers), len(budgets) - 1):
        ends = (*cuts, model.num_layers)
        ranges = list(zip((0, *cuts), ends, strict=True))
        if any(first < low or last > high for (first, last), (low, high) in zip(ranges, held, strict=True)):
            continue
        if any(model.weight_chunks(*r) > budget for r, budget in zip(ranges, budgets, strict=True)):
            continue
        blocks = min(blocks_of(model, budget, *r) for r, budget in zip(ranges, budgets, strict=True))
        yield blocks, max(model.stage_time(*r) for r in ranges), ends


def check_stages(snapshot: Snapshot, stages: Sequence[StageView]) -> None:
    """Each layer exactly once and in order; the weights of each stage fit into its device's budget."""
    assert [layer for s in stages for layer in range(s.first_layer, s.last_layer)] == list(
        range(snapshot.model.num_layers)
    )
    assert all(stage.first_layer < stage.last_layer for stage in stages)
    assert len({stage.device for stage in stages}) == len(stages)
    budgets = snapshot.budgets()
    for stage in stages:
        assert snapshot.model.weight_chunks(stage.first_layer, stage.last_layer) <= budgets[stage.device]


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """All ways to put items into groups."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [items[0], *rest[i]], *rest[i + 1 :]]


def check_drop(snapshot: Snapshot, plan: DropPlan, need_blocks: int) -> None:
    """Everything a drop plan says, counted again."""
    assert plan.epoch == snapshot.epoch
    groups = {group.group_id: group for group in snapshot.groups}
    held = {stage.device: stage for group in snapshot.groups for stage in group.stages}
    capacity = before = sum(group_blocks(snapshot, group.stages) for group in snapshot.groups)
    merged_ids = [group_id for merge in plan.merges for group_id in merge.group_ids]
    assert len(set(merged_ids)) == len(merged_ids)
    freed_before, freed = 0, 0
    for merge in plan.merges:
        parts = [groups[group_id] for group_id in merge.group_ids]
        assert len(parts) >= 2
        check_stages(snapshot, merge.stages)
        assert {s.device for s in merge.stages} == {s.device for part in parts for s in part.stages}
        for stage in merge.stages:
            old = held[stage.device]
            assert old.first_layer <= stage.first_layer and stage.last_layer <= old.last_layer
            freed += snapshot.model.weight_chunks(old.first_layer, old.last_layer)
            freed -= snapshot.model.weight_chunks(stage.first_layer, stage.last_layer)
        assert merge.capacity_blocks == group_blocks(snapshot, merge.stages)
        apart = sum(group_blocks(snapshot, part.stages) for part in parts)
        assert merge.capacity_blocks >= apart >= sum(part.used_blocks for part in parts)
        assert merge.added_blocks == merge.capacity_blocks - apart
        assert merge.freed_bytes == (freed - freed_before) * snapshot.model.chunk_bytes
        freed_before = freed
        capacity += merge.added_blocks
        launched = sorted(stage for lineage in merge.lineage.launched() for stage in lineage.stages)
        assert launched == sorted(stage for part in parts for lineage in lineages_of(part) for stage in lineage.stages)
    assert plan.freed_bytes == freed * snapshot.model.chunk_bytes
    assert plan.added_blocks == capacity - before
    assert plan.meets_need == (capacity >= need_blocks)


def lineages_of(group: GroupView) -> list[Lineage]:
    return list((group.lineage or Lineage(group.stages)).launched())


def apply_drop(snapshot: Snapshot, plan: DropPlan) -> Snapshot:
    """The server after a drop and its exchange."""
    groups = {group.group_id: group for group in snapshot.groups}
    for i, merge in enumerate(plan.merges):
        used = sum(groups.pop(group_id).used_blocks for group_id in merge.group_ids)
        groups[1000 * snapshot.epoch + i] = GroupView(1000 * snapshot.epoch + i, merge.stages, used, merge.lineage)
    return replace(snapshot, epoch=snapshot.epoch + 1, groups=tuple(groups.values()))
