"""Requests whose KV is of two kinds, in a fleet without any device: what they hold, find, and let go."""

from __future__ import annotations

import random

import pytest
from groups import LAYERS, commit, make_request
from seeds import seeds

from kunserve.engine.blocks.block_pool import BlockPool
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group, Stage
from kunserve.engine.kinds.mixed_group import MixedGroup, NearLayers
from kunserve.engine.request import Request
from kunserve.engine.schedule.policy import make_policy
from kunserve.engine.schedule.scheduler import Scheduler, SchedulerLimits
from kunserve.policies import OverloadPolicy

BLOCK, WINDOW = 4, 10
NEAR = NearLayers(frozenset(range(0, LAYERS, 2)), WINDOW)


def mixed_group(num_full: int, num_near: int, num_stages: int = 1) -> MixedGroup:
    length = LAYERS // num_stages
    stages = [
        Stage(i, i * length, (i + 1) * length, BlockPool(num_full), BlockPool(num_near)) for i in range(num_stages)
    ]
    return MixedGroup(0, tuple(stages), BLOCK, window=WINDOW)


def scheduler_of(group: Group, policy: OverloadPolicy, budget: int, *, has_cache: bool = True) -> Scheduler:
    fleet = Fleet([group], has_prefix_cache=has_cache, near=NEAR)
    return Scheduler(fleet, SchedulerLimits(budget, 64), make_policy(policy, 0.0), num_host_blocks=0)


def run(scheduler: Scheduler, group: Group, requests: list[Request]) -> int:
    """Run requests to their end; returns how many ran at once at the most."""
    for request in requests:
        scheduler.waiting.append(request)
    most = 0
    while scheduler.num_waiting or group.running:
        batch = scheduler.schedule(group, [group], 0)
        assert batch is not None, "nobody can go on"
        most = max(most, len(group.running))
        scheduler.fleet.check(LAYERS)
        commit(scheduler, group, batch)
        for span in batch.spans:
            if span.request in group.running:
                scheduler.fleet.computed(span.request, group)
        scheduler.fleet.check(LAYERS)
    return most


@pytest.mark.parametrize("policy", list(OverloadPolicy))
@pytest.mark.parametrize("seed", seeds(10))
def test_all_come_to_their_end(policy: OverloadPolicy, seed: int) -> None:
    """However little there is of near blocks: one request's window and a block or two."""
    rng = random.Random(seed)
    group = mixed_group(rng.randint(16, 60), rng.randint(6, 12), rng.choice([1, 2]))
    scheduler = scheduler_of(group, policy, rng.choice([5, 16, 40]), has_cache=rng.random() < 0.5)
    requests = [make_request(f"r{i}", rng.randint(1, 40), rng.randint(1, 20)) for i in range(12)]
    run(scheduler, group, requests)
    assert all(request.num_tokens == request.max_num_tokens for request in requests)
    assert group.num_used == group.num_near_used == 0


def test_a_long_request_needs_its_window_only() -> None:
    """Four of 60 tokens: 60 full blocks, and five near ones each, with a step of five tokens."""
    group = mixed_group(60, 20)
    scheduler = scheduler_of(group, OverloadPolicy.RECOMPUTE, 8)
    assert run(scheduler, group, [make_request(f"r{i}", 40 + i, 15) for i in range(4)]) == 4
    assert scheduler.num_preemptions == 0


def test_nobody_comes_in_whose_window_has_no_room() -> None:
    group = mixed_group(60, 7)
    scheduler = scheduler_of(group, OverloadPolicy.RECOMPUTE, 40)
    first, second = make_request("first", 30, 8), make_request("second", 30, 8)
    assert run(scheduler, group, [first, second]) == 1
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize(
    ("kind", "place", "number"),
    [(1, 0, 8), (1, 4, 8), (1, 5, 5), (1, 6, 6), (1, 7, 7), (0, 0, 0), (0, 2, 2), (0, 7, 7)],
)
def test_a_prefix_is_found_only_with_the_window_of_what_follows(kind: int, place: int, number: int) -> None:
    """Of eight blocks one is gone. A token after them sees the last three; after fewer, it needs others of them."""
    group = mixed_group(60, 30)
    scheduler = scheduler_of(group, OverloadPolicy.RECOMPUTE, 100)
    fleet, asked = scheduler.fleet, make_request("asked", 33, 4)
    run(scheduler, group, [make_request("first", 33, 4)])
    assert fleet.prefix_lengths(asked) == {0: 8}
    prefixes = fleet.store(kind).prefixes
    assert prefixes is not None
    block = prefixes.get(group, asked.block_keys[place])
    assert block is not None
    prefixes.remove(group, block)
    assert fleet.prefix_lengths(asked) == ({0: number} if number else {})


def test_what_is_found_is_shared_and_let_go() -> None:
    group = mixed_group(60, 30)
    scheduler = scheduler_of(group, OverloadPolicy.RECOMPUTE, 100)
    run(scheduler, group, [make_request("first", 33, 4)])
    request = make_request("second", 33, 4)
    scheduler.fleet.admit(request, group, finds_prefix=True)
    assert request.num_computed_tokens == 32 and request.table.near is not None
    assert request.table.num_behind == 0 and len(request.table.blocks) == 9
    assert request.table.near.num_behind == (32 + 1 - WINDOW) // BLOCK and request.table.near.num_places == 8
    scheduler.fleet.check(LAYERS)
    scheduler.fleet.release(request)
    scheduler.fleet.check(LAYERS)
