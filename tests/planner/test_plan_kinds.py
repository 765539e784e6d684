"""Plans where KV is of two kinds: counted layer by layer, and chunk by chunk."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import pytest
from planner_oracle import random_model, random_snapshot
from seeds import seeds

from kunserve.planner.drop import plan_drop_of
from kunserve.planner.exchange import LiveRequest, plan_exchange
from kunserve.planner.layer_split import split_layers
from kunserve.planner.layouts import blocks_of, stage_layout
from kunserve.planner.plan import DeviceLayout, ExchangeMode, ExchangePlan, Merge
from kunserve.planner.restore import plan_restore
from kunserve.planner.snapshot import DeviceView, ModelShape, NearKv, Snapshot, StageView, capacity_blocks
from kunserve.sizes import ceil_div

GEMMA = ModelShape(48, 3, 2, 0, True, 1, 1, 16, near=NearKv(tuple(i for i in range(48) if i % 6 < 5), 250, 2))


def with_near(rng: random.Random, model: ModelShape) -> ModelShape:
    layers = sorted(rng.sample(range(model.num_layers), rng.randint(1, model.num_layers - 1)))
    return replace(model, near=NearKv(tuple(layers), rng.choice([1, 90, 300, 500, 999]), rng.randint(1, 4)))


def chunks_of(model: ModelShape, full: int) -> tuple[int, int]:
    """Chunks of a layer of each kind, by their definition."""
    assert model.near is not None
    near = max(model.near.least_chunks, ceil_div(full * model.near.share, 1000))
    return full, min(near, full)


def counted(model: ModelShape, budget: int, first: int, last: int) -> int:
    """Chunks of a full layer that a stage can have: tried one by one."""
    assert model.near is not None
    left, full = budget - model.weight_chunks(first, last), 0
    if left < 0:
        return -1
    while True:
        chunks = chunks_of(model, full + 1)
        if sum(chunks[layer in model.near.layers] for layer in range(first, last)) > left:
            return full
        full += 1


@pytest.mark.parametrize("seed", seeds(300))
def test_what_a_stage_holds(seed: int) -> None:
    rng = random.Random(seed)
    model = with_near(rng, random_model(rng))
    first = rng.randrange(model.num_layers)
    last, budget = rng.randint(first + 1, model.num_layers), rng.randint(0, 150)
    full = counted(model, budget, first, last)
    assert max(-1, model.kv_chunks(budget, first, last)) == full
    if full >= 0:
        layout = stage_layout(model, budget, StageView(0, first, last))
        assert model.weight_chunks(first, last) + sum(layout.kv_chunks) <= budget
        assert blocks_of(model, layout) == tuple(map(model.blocks_in, chunks_of(model, full)))


@pytest.mark.parametrize("seed", seeds(300))
def test_best_of_all_splits(seed: int) -> None:
    rng = random.Random(seed)
    model, num_stages = with_near(rng, random_model(rng)), rng.randint(1, 4)
    budgets, need = [rng.randint(5, 90) for _ in range(num_stages)], rng.randint(0, 60)
    splits = dict[tuple[int, ...], tuple[int, float]]()
    for cuts in combinations(range(1, model.num_layers), num_stages - 1):
        ends = (*cuts, model.num_layers)
        ranges = list(zip((0, *cuts), ends, strict=True))
        chunks = min(counted(model, budget, *r) for r, budget in zip(ranges, budgets, strict=True))
        if chunks >= 0:
            splits[ends] = model.blocks_in(chunks), max(model.stage_time(*r) for r in ranges)
    stages = split_layers(model, [DeviceView(i, b) for i, b in enumerate(budgets)], need)
    if stages is None:
        assert not splits
        return
    blocks, time = splits[tuple(stage.last_layer for stage in stages)]
    enough = [split for split in splits.values() if split[0] >= need]
    if enough:
        assert blocks >= need
        assert time == pytest.approx(min(time for _, time in enough))
        assert blocks == max(b for b, t in enough if t == pytest.approx(time))
    else:
        assert blocks == max(b for b, _ in splits.values())


class Ranges:
    """Every range of the merged devices, from the drop to the end of the exchange."""

    def __init__(self, snapshot: Snapshot, merge: Merge, plan: ExchangePlan, requests: Sequence[LiveRequest]) -> None:
        self.model, self.budgets = snapshot.model, snapshot.budgets()
        self.stages = {stage.device: stage for stage in merge.stages}
        self.chunks = {layout.stage.device: list(layout.kv_chunks) for layout in plan.layouts}
        self.requests = {request.request_id: request for request in requests}
        self.group_of = {s.device: g.group_id for g in snapshot.groups for s in g.stages}
        self.at = {  # (device, layer) -> whose KV is there
            (s.device, layer): {r.request_id for r in requests if r.group_id == group.group_id and r.num_blocks}
            for group in snapshot.groups
            for s in group.stages
            for layer in range(s.first_layer, s.last_layer)
        }
        self.plan = plan
        self.check()

    def is_home(self, device: int, layer: int) -> bool:
        stage = self.stages[device]
        return stage.first_layer <= layer < stage.last_layer

    def check(self) -> None:
        for device, stage in self.stages.items():
            weights = self.model.weight_chunks(stage.first_layer, stage.last_layer)
            assert weights + sum(self.chunks[device]) <= self.budgets[device]
            for layer in range(self.model.num_layers):
                kind = self.model.kind_of(layer)
                held = sum(self.requests[i].by_kind(2)[kind] for i in self.at[device, layer])
                assert held <= self.model.blocks_in(self.chunks[device][layer]), (device, layer)

    def reassign(self, device: int) -> None:
        """Unmap what everybody has left, and give the chunks to the layers that stay."""
        layers = range(self.model.num_layers)
        for layer in layers:
            if not self.is_home(device, layer) and not self.at[device, layer]:
                self.chunks[device][layer] = 0
        if self.plan.mode is ExchangeMode.BY_REQUEST:
            stage = self.stages[device]
            stay = range(stage.first_layer, stage.last_layer)
            left = self.budgets[device] - self.model.weight_chunks(*stage[1:])
            left -= sum(n for layer, n in enumerate(self.chunks[device]) if layer not in stay)
            full = self.model.chunks_within(left, self.model.by_kind(stay))
            for layer in stay:
                grown = chunks_of(self.model, full)[self.model.kind_of(layer)]
                assert grown >= self.chunks[device][layer]
                self.chunks[device][layer] = grown

    def run(self) -> None:
        early = {growth.device: growth.by_kind(2) for growth in self.plan.early_growth}
        for move in self.plan.moves:
            for layer in range(move.first_layer, move.last_layer):
                assert self.is_home(move.destination, layer)
                self.at[move.destination, layer] |= set(move.request_ids)
                if early:
                    needed = self.model.chunks_for(early[move.destination][self.model.kind_of(layer)])
                    self.chunks[move.destination][layer] = max(self.chunks[move.destination][layer], needed)
            self.check()  # everything in the move lands before anything of it leaves
            for layer in range(move.first_layer, move.last_layer):
                self.at[move.source, layer] -= set(move.request_ids)
            for device in self.stages:
                self.reassign(device)
            self.check()
        for (device, layer), ids in self.at.items():
            everybody = {i for i, request in self.requests.items() if request.num_blocks}
            assert ids == (everybody if self.is_home(device, layer) else set())


def holding(rng: random.Random, snapshot: Snapshot) -> list[LiveRequest]:
    """Requests that hold no more than each group has of either kind."""
    requests = list[LiveRequest]()
    for group in snapshot.groups:
        [stage] = group.stages
        budget = snapshot.budgets()[stage.device]
        full, near = snapshot.model.blocks_by_kind(snapshot.model.kv_chunks(budget, *stage[1:]))
        share = rng.choice([0.3, 1.0])
        full, near = int(share * full), int(share * near)
        while full:
            blocks = rng.randint(1, full)
            kept = rng.randint(0, min(blocks, near))
            requests.append(
                LiveRequest(f"r{len(requests)}", group.group_id, blocks, rng.choice([0.0, 1.0]), num_near=kept)
            )
            full, near = full - blocks, near - kept
    return requests


def test_every_exchange_fits() -> None:
    modes = set[ExchangeMode]()
    for seed in range(400):
        rng = random.Random(seed)
        snapshot = random_snapshot(rng, num_devices=2)
        model = with_near(rng, snapshot.model)
        if model.num_layers < 2:
            continue
        snapshot = replace(snapshot, model=model)
        if min(capacity_blocks(model, snapshot.budgets(), group.stages) for group in snapshot.groups) < 1:
            continue
        try:
            (merge,) = plan_drop_of(snapshot, [0, 1]).merges
        except Exception:
            continue
        requests = holding(rng, snapshot)
        plan = plan_exchange(snapshot, merge, requests)
        modes.add(plan.mode)
        if plan.mode is not ExchangeMode.INFEASIBLE:
            Ranges(snapshot, merge, plan, requests).run()
    assert modes == set(ExchangeMode)


def test_a_merge_of_gemma_and_its_way_back() -> None:
    """Both halves of a merge hold more, each layer by its kind; a split goes back to what was there."""
    budget = GEMMA.weight_chunks(0, 48) + 8 * 40 + 40 * 10
    groups = random_snapshot(random.Random(0), 2).groups
    snapshot = Snapshot(
        1,
        GEMMA,
        (DeviceView(0, budget), DeviceView(1, budget)),
        tuple(replace(group, stages=(StageView(i, 0, 48),), used_blocks=9) for i, group in enumerate(groups)),
    )
    assert snapshot.capacity_blocks() == 80
    (merge,) = plan_drop_of(snapshot, [0, 1]).merges
    for stage in merge.stages:
        layout: DeviceLayout = stage_layout(GEMMA, budget, stage)
        full, near = blocks_of(GEMMA, layout)
        assert full >= merge.capacity_blocks > 80 and near == ceil_div(full, 4)
    merged = replace(snapshot.groups[0], group_id=7, stages=merge.stages, lineage=merge.lineage, used_blocks=70)
    assert plan_restore(replace(snapshot, groups=(merged,))) is None
    plan = plan_restore(replace(snapshot, groups=(replace(merged, used_blocks=40),)))
    assert plan is not None and [part.num_blocks for part in plan.splits[0].into] == [(40,), (40,)]
