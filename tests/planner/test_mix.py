"""Which share of KV layers with a window should have: against all thousand of them, tried one by one."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
from planner_oracle import random_snapshot
from seeds import seeds

from kunserve.planner.kinds.mix import Asked, OfKinds, most_share, plan_share
from kunserve.planner.layouts import blocks_of, stage_layout
from kunserve.planner.snapshot import DeviceView, GroupView, ModelShape, NearKv, Snapshot, StageView

BUDGET = 400  # chunks of KV beside the weights
GEMMA = ModelShape(48, 3, 2, 0, True, 1, 1, 16, near=NearKv(tuple(i for i in range(48) if i % 6 < 5), 1000, 2))


def holding(snapshot: Snapshot, stages: tuple[StageView, ...], share: int) -> OfKinds:
    """What a group holds, by the layouts of its devices."""
    model, budgets = snapshot.model.with_share(share), snapshot.budgets()
    each = [blocks_of(model, stage_layout(model, budgets[stage.device], stage)) for stage in stages]
    return OfKinds(min(full for full, _ in each), min(near for _, near in each))


def served(snapshot: Snapshot, demand: Mapping[int, OfKinds], share: int) -> float:
    """Which part of the demand for the scarcer kind is held, in the group that holds least of it."""
    parts = list[float]()
    for group in snapshot.groups:
        held, asked = holding(snapshot, group.stages, share), demand[group.group_id]
        parts += [held.full / asked.full, held.near / asked.near]
    return min(parts)


def all_keep(snapshot: Snapshot, asked: Asked, share: int, now: int) -> bool:
    """Whether all who run keep what they hold, and the longest request fits where it does with a share `now`."""
    for group in snapshot.groups:
        held, then = asked.held[group.group_id], holding(snapshot, group.stages, share)
        longest = min(asked.longest, holding(snapshot, group.stages, now).full)
        if then.full < max(held.full, longest) or then.near < held.near:
            return False
    return True


@pytest.mark.parametrize("seed", seeds(40))
def test_as_good_as_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    snapshot = random_snapshot(rng, num_devices=rng.randint(1, 2))
    layers = tuple(sorted(rng.sample(range(snapshot.model.num_layers), rng.randint(1, snapshot.model.num_layers - 1))))
    now = rng.choice([60, 300, 1000])
    model = replace(snapshot.model, near=NearKv(layers, now, rng.randint(1, 3)))
    devices = tuple(replace(view, budget_chunks=view.budget_chunks + 300) for view in snapshot.devices)
    snapshot = replace(snapshot, model=model, devices=devices)
    has = {group.group_id: holding(snapshot, group.stages, now) for group in snapshot.groups}
    held = {i: OfKinds(int(rng.random() * full), int(rng.random() * near)) for i, (full, near) in has.items()}
    demand = {i: OfKinds(rng.randint(1, 900), rng.randint(1, 900)) for i in has}
    asked = Asked(held, demand, rng.randint(1, 20))
    shares = [share for share in range(1, 1001) if all_keep(snapshot, asked, share, 1)]  # wherever it could fit
    shares = shares or [share for share in range(1, 1001) if all_keep(snapshot, asked, share, now)]
    best = max((served(snapshot, asked.demand, share) for share in shares), default=0.0)
    share, before = plan_share(snapshot, asked), served(snapshot, asked.demand, now)
    if share is None:
        assert best < 1.15 * before or not shares
    else:
        assert share in shares
        after = served(snapshot, asked.demand, share)
        assert after >= 0.9 * best
        assert after >= 1.1 * before or before < 1 <= after or now not in shares


def gemma(share: int, num_groups: int = 1) -> Snapshot:
    devices = tuple(DeviceView(i, GEMMA.weight_chunks(0, 48) + BUDGET * 48) for i in range(num_groups))
    groups = tuple(GroupView(i, (StageView(i, 0, 48),)) for i in range(num_groups))
    return Snapshot(1, GEMMA.with_share(share), devices, groups)


def asked_of(full: int, near: int, held: tuple[int, int] = (0, 0), longest: int = 1) -> Asked:
    return Asked({0: OfKinds(*held)}, {0: OfKinds(full, near)}, longest)


def test_follows_what_is_asked() -> None:
    """Requests of eight windows get eight times as many full blocks, and those of one as many of both."""
    long = plan_share(gemma(1000), asked_of(2000, 250))
    assert long is not None and holding(gemma(long), (StageView(0, 0, 48),), long).full > 3 * BUDGET
    short = plan_share(gemma(long), asked_of(600, 600))
    assert short is not None and holding(gemma(short), (StageView(0, 0, 48),), short) == (BUDGET, BUDGET)


def test_stays_while_there_is_little_to_gain() -> None:
    assert plan_share(gemma(500), asked_of(1000, 490)) is None
    assert plan_share(gemma(500), asked_of(1000, 440)) is None
    assert plan_share(gemma(500), asked_of(1000, 300)) is not None


def test_moves_for_little_where_those_who_run_would_have_to_make_way() -> None:
    has = holding(gemma(500), (StageView(0, 0, 48),), 500)
    assert plan_share(gemma(500), asked_of(1000, 480, (has.full, 200))) is None
    share = plan_share(gemma(500), asked_of(1000, 480, (has.full + 5, 200)))
    assert share is not None and holding(gemma(share), (StageView(0, 0, 48),), share).full >= has.full + 5


def test_the_group_that_is_short_decides() -> None:
    """Both together have enough of both kinds; one of them has not."""
    held = {0: OfKinds(0, 0), 1: OfKinds(0, 0)}
    asked = Asked(held, {0: OfKinds(100, 100), 1: OfKinds(700, 150)}, 1)
    share = plan_share(gemma(1000, 2), asked)
    assert share is not None and holding(gemma(share), (StageView(0, 0, 48),), share).full >= 700


def test_nobody_loses_what_is_held() -> None:
    near = plan_share(gemma(1000), asked_of(2000, 250, (300, 200)))
    assert near is not None and holding(gemma(near), (StageView(0, 0, 48),), near).near >= 200
    assert plan_share(gemma(1000), asked_of(2000, 250, (300, BUDGET))) is None
    assert plan_share(gemma(250), asked_of(900, 900, (1050, 100))) is None


def test_the_longest_request_fits_still() -> None:
    share = plan_share(gemma(250), asked_of(600, 600, longest=700))
    assert share is not None and share < 1000 and holding(gemma(share), (StageView(0, 0, 48),), share).full >= 700


@pytest.mark.parametrize("longest", [1, BUDGET, BUDGET + 1, 800, 1500])
def test_begins_with_the_most_that_the_longest_request_leaves(longest: int) -> None:
    snapshot = gemma(1)
    groups = [group.stages for group in snapshot.groups]
    share = most_share(GEMMA, snapshot.budgets(), groups, longest)
    assert holding(snapshot, groups[0], share).full >= longest
    assert share == 1000 or holding(snapshot, groups[0], share + 1).full < longest
