from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from planner_oracle import apply_drop, random_model, random_snapshot, smollm2_snapshot
from seeds import seeds

from kunserve.planner.drop import plan_drop, plan_drop_of
from kunserve.planner.exchange import LiveRequest, layer_moves, plan_exchange
from kunserve.planner.plan import EarlyGrowth, ExchangeMode, ExchangePlan, Merge
from kunserve.planner.snapshot import DeviceView, GroupView, ModelShape, Snapshot, StageView


class Simulation:
    """Every chunk of the merged devices, from the drop to the end of the exchange."""

    def __init__(self, snapshot: Snapshot, merge: Merge, requests: list[LiveRequest]) -> None:
        self.model, self.budgets = snapshot.model, snapshot.budgets()
        self.weights = {s.device: self.model.weight_chunks(s.first_layer, s.last_layer) for s in merge.stages}
        self.blocks = {request.request_id: request.num_blocks for request in requests}
        self.holder = {layer: s.device for s in merge.stages for layer in range(s.first_layer, s.last_layer)}
        self.ranges: dict[tuple[int, int], int] = {}  # (device, layer) -> chunks mapped
        self.residents: dict[tuple[int, int], set[str]] = {}
        for group in snapshot.groups:
            if group.group_id not in merge.group_ids:
                continue
            mine = [request for request in requests if request.group_id == group.group_id]
            ids = {request.request_id for request in mine if request.num_blocks}
            for s in group.stages:
                for layer in range(s.first_layer, s.last_layer):
                    chunks = self.model.kv_chunks(self.budgets[s.device], s.first_layer, s.last_layer)
                    self.ranges[s.device, layer] = chunks
                    self.residents[s.device, layer] = set(ids)
        for key in list(self.ranges):
            self.unmap_if_left(*key)
        self.check()

    def unmap_if_left(self, device: int, layer: int) -> None:
        if self.holder[layer] != device and not self.residents[device, layer]:
            self.ranges[device, layer] = 0

    def check(self) -> None:
        for device, weights in self.weights.items():
            kv = sum(chunks for (d, _), chunks in self.ranges.items() if d == device)
            assert weights + kv <= self.budgets[device]

    def run(self, plan: ExchangePlan) -> None:
        self.early = {growth.device: growth for growth in plan.early_growth}
        for layer, device in self.holder.items() if plan.early_growth else ():
            self.ranges[device, layer] += self.early[device].chunks
        self.check()
        for move in plan.moves:
            for layer in range(move.first_layer, move.last_layer):
                here, there = self.residents[move.source, layer], self.residents[move.destination, layer]
                assert self.holder[layer] == move.destination
                assert set(move.request_ids) <= here
                there |= set(move.request_ids)
                needed = self.model.chunks_for(sum(self.blocks[i] for i in there))
                if growth := self.early.get(move.destination):
                    needed = self.model.chunks_for(growth.num_blocks)
                key = move.destination, layer
                self.ranges[key] = max(self.ranges[key], needed)
            self.check()  # everything in the move lands before anything of it leaves
            for layer in range(move.first_layer, move.last_layer):
                self.residents[move.source, layer] -= set(move.request_ids)
                self.unmap_if_left(move.source, layer)
        for (device, layer), ids in self.residents.items():
            if self.holder[layer] == device:
                assert ids == {i for i, blocks in self.blocks.items() if blocks}
            else:
                assert not ids


def live_requests(rng: random.Random, snapshot: Snapshot) -> list[LiveRequest]:
    """Requests that hold exactly the used blocks of each group."""
    requests: list[LiveRequest] = []
    for group in snapshot.groups:
        left = group.used_blocks
        while left:
            blocks = rng.randint(1, left)
            left -= blocks
            requests.append(LiveRequest(f"r{len(requests)}", group.group_id, blocks, rng.choice([0.0, 1.0])))
    return requests


def full_pair(layer_chunks: int, kv_chunks: int, num_layers: int) -> tuple[Snapshot, Merge, list[LiveRequest]]:
    """Two devices whose KV is full, and which then drop half of their layers each. One block is one chunk."""
    model = ModelShape(num_layers, layer_chunks, 0, 0, False, 1, 1, 16)
    devices = tuple(DeviceView(i, num_layers * (layer_chunks + kv_chunks)) for i in range(2))
    groups = tuple(GroupView(i, (StageView(i, 0, num_layers),), kv_chunks) for i in range(2))
    snapshot = Snapshot(1, model, devices, groups)
    (merge,) = plan_drop_of(snapshot, [0, 1]).merges
    requests = [LiveRequest(f"r{g}{i}", g, 1) for g in range(2) for i in range(kv_chunks)]
    return snapshot, merge, requests


def test_by_request_urgent_first_then_small() -> None:
    snapshot = smollm2_snapshot(2, used_blocks=60)
    (merge,) = plan_drop(snapshot, 938).merges
    requests = [
        LiveRequest("big", 0, 40),
        LiveRequest("small", 0, 20),
        LiveRequest("urgent", 1, 50, urgency=1.0),
        LiveRequest("tiny", 1, 10),
        LiveRequest("empty", 1, 0),
    ]
    plan = plan_exchange(snapshot, merge, requests)
    assert plan.mode is ExchangeMode.BY_REQUEST
    assert [move.request_ids for move in plan.moves] == [("urgent",), ("tiny",), ("small",), ("big",)]
    first = plan.moves[0]
    assert (first.source, first.destination, first.first_layer, first.last_layer) == (1, 0, 0, 17)
    Simulation(snapshot, merge, requests).run(plan)


def test_nothing_to_exchange() -> None:
    snapshot = smollm2_snapshot(2)
    (merge,) = plan_drop(snapshot, 938).merges
    assert plan_exchange(snapshot, merge, []) == ExchangePlan(ExchangeMode.BY_REQUEST, ())


@pytest.mark.parametrize("num_layers", [8, 9, 30])
def test_kv_three_times_as_large_as_the_freed_weights(num_layers: int) -> None:
    snapshot, merge, requests = full_pair(layer_chunks=7, kv_chunks=21, num_layers=num_layers)
    plan = plan_exchange(snapshot, merge, requests)
    assert plan.mode is ExchangeMode.BY_LAYER
    assert len(plan.moves) == num_layers
    Simulation(snapshot, merge, requests).run(plan)


def test_what_one_layer_does_not_need_is_room_for_new_requests() -> None:
    """Of 56 chunks that are free, 22 are for a layer to come, and every layer that stays gets some of the rest."""
    snapshot, merge, requests = full_pair(layer_chunks=7, kv_chunks=21, num_layers=16)
    plan = plan_exchange(snapshot, merge, requests)
    assert plan.mode is ExchangeMode.BY_LAYER
    assert plan.early_growth == tuple(EarlyGrowth(device, (56 - 22) // 8, 21 + 4 + 21) for device in (0, 1))
    Simulation(snapshot, merge, requests).run(plan)


def test_not_even_one_layer_fits() -> None:
    snapshot, merge, requests = full_pair(layer_chunks=7, kv_chunks=21, num_layers=4)  # 14 chunks are free
    assert plan_exchange(snapshot, merge, requests) == ExchangePlan(ExchangeMode.INFEASIBLE, ())


def test_one_side_first_if_both_do_not_fit_at_once() -> None:
    """Requests of the small side leave first; then the other side finds room in what they left."""
    snapshot, merge, requests = full_pair(layer_chunks=7, kv_chunks=21, num_layers=8)
    few = [r for r in requests if r.group_id == 0][:7] + [r for r in requests if r.group_id == 1]
    plan = plan_exchange(snapshot, merge, few)
    assert plan.mode is ExchangeMode.BY_REQUEST
    Simulation(snapshot, merge, few).run(plan)


@pytest.mark.parametrize("seed", seeds(300))
def test_every_order_fits_in_chunks(seed: int) -> None:
    """Merges of random groups, and of merged groups, whatever order the plan chose."""
    rng = random.Random(seed)
    snapshot = random_snapshot(rng, rng.randint(2, 6))
    for _ in range(2):
        drop = plan_drop(snapshot, snapshot.capacity_blocks() + rng.randint(1, 40))
        requests = live_requests(rng, snapshot)
        for merge in drop.merges:
            mine = [request for request in requests if request.group_id in merge.group_ids]
            plan = plan_exchange(snapshot, merge, mine)
            if plan.mode is ExchangeMode.INFEASIBLE:
                assert not plan.moves
            else:
                Simulation(snapshot, merge, mine).run(plan)
        snapshot = apply_drop(snapshot, drop)


def reachable(steps: tuple[int, int], fits: Callable[[int, int, int], bool]) -> bool:
    """Whether some order of two kinds of steps exists: `fits(i, j, kind)` after i and j of them."""
    seen, todo = {(0, 0)}, [(0, 0)]
    while todo:
        i, j = todo.pop()
        for kind, after in ((0, (i + 1, j)), (1, (i, j + 1))):
            if after[0] <= steps[0] and after[1] <= steps[1] and after not in seen and fits(i, j, kind):
                seen.add(after)
                todo.append(after)
    return steps in seen


@pytest.mark.parametrize("seed", seeds(400))
def test_infeasible_only_if_no_order_of_layers_fits(seed: int) -> None:
    rng = random.Random(seed)
    model = random_model(rng, max_layers=12)
    num_layers = model.num_layers
    devices, groups = [], []
    for i in range(2):
        kv = rng.randint(1, 6 * model.layer_chunks) * num_layers + rng.randrange(num_layers)
        devices.append(DeviceView(i, model.weight_chunks(0, num_layers) + kv))
        most = model.blocks_in(kv // num_layers)
        groups.append(GroupView(i, (StageView(i, 0, num_layers),), rng.randint(most // 2, most)))
    snapshot = Snapshot(1, model, tuple(devices), tuple(groups))
    drop = plan_drop(snapshot, snapshot.capacity_blocks() + 1)
    if not drop.merges:
        return
    (merge,) = drop.merges
    requests = [LiveRequest(f"r{g.group_id}", g.group_id, g.used_blocks) for g in groups if g.used_blocks]
    plan = plan_exchange(snapshot, merge, requests)
    if plan.mode is not ExchangeMode.INFEASIBLE:
        Simulation(snapshot, merge, requests).run(plan)
        return
    budgets, used = snapshot.budgets(), [group.used_blocks for group in groups]
    a, b = merge.stages
    kept = {s.device: s.last_layer - s.first_layer for s in merge.stages}
    chunks = {s.device: model.kv_chunks(budgets[s.device], 0, num_layers) for s in merge.stages}
    free = {s.device: budgets[s.device] - model.weight_chunks(s.first_layer, s.last_layer) for s in merge.stages}
    grown = model.chunks_for(sum(used))

    def fits(i: int, j: int, kind: int) -> bool:
        """i layers went from b to a, j from a to b; the next goes to a (0) or to b (1)."""
        into, came, went = ((a, i, j), (b, j, i))[kind]
        d = into.device
        mapped = came * max(grown, chunks[d]) + (num_layers - came - went) * chunks[d]
        return mapped - chunks[d] + max(grown, chunks[d]) <= free[d]

    assert not reachable((kept[a.device], kept[b.device]), fits)


def test_layer_moves_in_runs() -> None:
    before = (StageView(0, 0, 17), StageView(1, 17, 30))
    after = (StageView(0, 0, 9), StageView(2, 9, 20), StageView(1, 20, 30))
    assert layer_moves(before, after) == ((9, 17, 0, 2), (17, 20, 1, 2))
    assert layer_moves(after, before) == ((9, 17, 2, 0), (17, 20, 2, 1))
