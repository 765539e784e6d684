"""Chains with lookahead: the scheduler of test_scheduler.py with budgets of time."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from cost_models import COST
from groups import LAYERS, check, commit, make_group, make_request
from seeds import seeds

from kunserve.engine.batch import Microbatch
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.schedule.policy import make_policy
from kunserve.engine.schedule.scheduler import Scheduler, SchedulerLimits
from kunserve.planner.cost import TokenSpan, Work
from kunserve.planner.microbatch import Lookahead
from kunserve.policies import OverloadPolicy

LOOKAHEAD = Lookahead(COST, LAYERS, 64)


def make_scheduler(
    group: Group, max_num_tokens: int = 64, policy: OverloadPolicy = OverloadPolicy.RECOMPUTE
) -> Scheduler:
    lookahead = Lookahead(COST, LAYERS, max_num_tokens)
    return Scheduler(Fleet([group]), SchedulerLimits(max_num_tokens, 64), make_policy(policy, 0.0), lookahead=lookahead)


def time_of(batch: Microbatch) -> float:
    return LOOKAHEAD.time(Work.of(TokenSpan(s.start, s.end - s.start, int(s.samples)) for s in batch.spans))


def num_tokens_by_request(batch: Microbatch) -> dict[str, int]:
    return {span.request.request_id: span.end - span.start for span in batch.spans}


@pytest.mark.parametrize("policy", list(OverloadPolicy))
@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("seed", seeds(2))
def test_every_request_finishes_within_memory(policy: OverloadPolicy, num_stages: int, seed: int) -> None:
    rng = random.Random(seed)
    scheduler = make_scheduler(group := make_group(num_stages=num_stages), 12, policy)
    requests = [make_request(f"r{i}", rng.randrange(1, 40), rng.randrange(1, 24)) for i in range(12)]
    scheduler.waiting.extend(requests)
    in_flight: list[Microbatch] = []
    num_finished = num_rounds = 0
    while num_finished < len(requests):
        num_rounds += 1
        assert num_rounds < 5000, "no progress"
        while group.num_in_flight < num_stages and (batch := scheduler.schedule(group, [group], 0)) is not None:
            assert 0 < batch.num_tokens <= 12
            in_flight.append(batch)
        check([group])
        if in_flight:
            num_finished += len(commit(scheduler, group, in_flight.pop(0)))
    assert not group.running and not group.num_used


def test_a_prompt_alone_is_cut_for_both_stages() -> None:
    scheduler = make_scheduler(group := make_group(num_stages=2, num_blocks=64))
    scheduler.waiting.append(make_request("long", 100, 9))
    first, second = (scheduler.schedule(group, [group], 0) for _ in range(2))
    assert first is not None and second is not None
    assert first.num_tokens + second.num_tokens == 100 and 45 <= first.num_tokens <= 64
    assert time_of(first) == pytest.approx(time_of(second), rel=0.25)


def test_pieces_of_a_prompt_get_shorter_as_its_prefix_grows() -> None:
    scheduler = make_scheduler(group := make_group(num_stages=2, num_blocks=1000))
    scheduler.waiting.append(make_request("long", 3000, 9))
    sizes, times = [], []
    while (batch := scheduler.schedule(group, [group], 0)) is not None:
        sizes.append(batch.num_tokens)
        times.append(time_of(batch))
        commit(scheduler, group, batch)
        if batch.spans[0].samples:
            break
    assert sum(sizes) == 3000
    assert sizes[0] > sizes[len(sizes) // 2] > sizes[-4]
    assert all(a == pytest.approx(b, rel=0.1) for a, b in pairwise(times[:-3]))  # those that pass the chain together
    assert max(times) < 1.25 * min(times[:-3])


def test_microbatches_share_decodes_by_time_and_prompts_fill_them_up() -> None:
    scheduler = make_scheduler(group := make_group(num_stages=2, num_blocks=2000))
    lengths = {"long": 6000, **{f"r{i}": 20 for i in range(8)}}
    scheduler.waiting.extend([make_request(name, n, 99) for name, n in lengths.items()])
    while any(r.num_output_tokens == 0 for r in [*scheduler.waiting, *group.running]):
        batch = scheduler.schedule(group, [group], 0)
        assert batch is not None
        commit(scheduler, group, batch)
    first, second = (scheduler.schedule(group, [group], 0) for _ in range(2))
    assert first is not None and second is not None
    rows = {**num_tokens_by_request(first), **num_tokens_by_request(second)}
    assert rows == dict.fromkeys(lengths, 1)  # each decodes once in a round
    assert len(first.spans) < len(second.spans)  # the long one counts for several
    commit(scheduler, group, first)
    scheduler.waiting.append(make_request("new", 500, 9))
    third = scheduler.schedule(group, [group], 0)
    assert third is not None
    tokens = num_tokens_by_request(third)
    assert tokens.pop("new") > 20 and tokens == dict.fromkeys(num_tokens_by_request(first), 1)


def test_prompts_get_on_however_many_decode() -> None:
    scheduler = make_scheduler(group := make_group(num_stages=2, num_blocks=4000))
    scheduler.waiting.extend([make_request(f"r{i}", 100, 500) for i in range(50)])
    for _ in range(400):
        batch = scheduler.schedule(group, [group], 0)
        assert batch is not None
        commit(scheduler, group, batch)
        if not scheduler.waiting and all(r.num_output_tokens for r in group.running):
            break
    new = make_request("new", 100, 9)
    scheduler.waiting.append(new)
    for _ in range(12):
        batch = scheduler.schedule(group, [group], 0)
        assert batch is not None
        commit(scheduler, group, batch)
    assert new.num_output_tokens


def test_a_prompt_gets_on_though_reading_its_kv_alone_takes_longer_than_a_part() -> None:
    scheduler = make_scheduler(group := make_group(num_stages=2, num_blocks=12000))
    scheduler.waiting.extend([make_request(f"r{i}", 4, 500) for i in range(4)])
    for _ in range(4):  # microbatch by microbatch: each has some that decode
        batch = scheduler.schedule(group, [group], 0)
        assert batch is not None
        commit(scheduler, group, batch)
    long = make_request("long", 40_010, 9)
    long.num_scheduled_tokens, long.num_computed_tokens = 40_000, 40_000
    scheduler.fleet.admit(long, group)
    for num_tokens in (8, 2):
        batch = scheduler.schedule(group, [group], 0)
        assert batch is not None
        tokens = num_tokens_by_request(batch)
        assert tokens.pop("long") == num_tokens and set(tokens.values()) == {1}
        commit(scheduler, group, batch)
    assert long.num_output_tokens == 1


def test_one_stage_counts_tokens() -> None:
    scheduler = make_scheduler(group := make_group(num_blocks=200))
    scheduler.waiting.append(make_request("long", 300, 9))
    batch = scheduler.schedule(group, [group], 0)
    assert batch is not None and batch.num_tokens == 64
