"""The scheduler without an engine: a loop that schedules, pretends to compute, commits, and checks."""

from __future__ import annotations

import random
from collections import deque

import pytest

from kunserve.engine.block_pool import BlockPool
from kunserve.engine.group import Group, Stage
from kunserve.engine.microbatch import Microbatch
from kunserve.engine.policy import OverloadPolicy, make_policy
from kunserve.engine.request import FinishReason, Request, SamplingParams
from kunserve.engine.scheduler import Limits, Scheduler

LAYERS = 8


def make_group(group_id: int = 0, num_stages: int = 1, num_blocks: int = 16, block_size: int = 4) -> Group:
    per_stage = LAYERS // num_stages
    stages = [Stage(i, i * per_stage, (i + 1) * per_stage, BlockPool(num_blocks + i)) for i in range(num_stages)]
    return Group(group_id, tuple(stages), block_size)


def make_request(name: str, num_prompt: int, max_tokens: int) -> Request:
    return Request(name, list(range(1, num_prompt + 1)), SamplingParams(max_tokens=max_tokens, temperature=0))


def make_scheduler(
    policy: OverloadPolicy = OverloadPolicy.RECOMPUTE, budget: int = 12, watermark: float = 0
) -> Scheduler:
    return Scheduler(Limits(max_num_batched_tokens=budget, max_num_seqs=64), make_policy(policy, watermark))


def commit(scheduler: Scheduler, group: Group, batch: Microbatch) -> list[Request]:
    """What the engine does after a step, with token ids that do not matter; returns who finished."""
    scheduler.commit(group, batch)
    finished = []
    for span in batch.spans:
        if span.samples:
            span.request.token_ids.append(7)
            if span.request.num_output_tokens == span.request.params.max_tokens:
                span.request.finish_reason = FinishReason.LENGTH
                group.release(span.request)
                finished.append(span.request)
    return finished


def check(groups: list[Group]) -> None:
    for group in groups:
        group.check(LAYERS)
        for i, stage in enumerate(group.stages):
            stage.pool.check([r.block_tables[i] for r in group.running if r.block_tables])


@pytest.mark.parametrize("policy", list(OverloadPolicy))
@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("seed", range(12))
def test_every_request_finishes_within_memory_and_budget(policy: OverloadPolicy, num_stages: int, seed: int) -> None:
    rng = random.Random(seed)
    scheduler = make_scheduler(policy)
    groups = [make_group(i, num_stages) for i in range(rng.randrange(1, 4))]
    requests = [make_request(f"r{i}", rng.randrange(1, 40), rng.randrange(1, 24)) for i in range(30)]
    arrivals, done = deque(requests), []
    in_flight: list[tuple[Group, Microbatch]] = []
    for _ in range(20_000):
        for _ in range(rng.randrange(3)):
            if arrivals:
                scheduler.waiting.append(arrivals.popleft())
        for group in groups:
            while group.num_in_flight < num_stages:
                batch = scheduler.schedule(group, groups, 0)
                if batch is None:
                    break
                assert 0 < batch.num_tokens <= 12
                assert len({id(s.request) for s in batch.spans}) == len(batch.spans)
                in_flight.append((group, batch))
        check(groups)
        if in_flight:
            # microbatches of one group come back in order; groups in any
            group = rng.choice(in_flight)[0]
            at = next(i for i, (g, _) in enumerate(in_flight) if g is group)
            done += commit(scheduler, *in_flight.pop(at))
            check(groups)
        if len(done) == len(requests):
            break
    assert len(done) == len(requests), "no progress"
    assert all(group.num_used == 0 and not group.running for group in groups) and not scheduler.waiting
    if policy is OverloadPolicy.QUEUE:
        assert scheduler.num_preemptions == 0


def test_decodes_go_before_prompts_and_prompts_are_cut_to_the_budget() -> None:
    scheduler, group = make_scheduler(budget=6), make_group()
    scheduler.waiting += [make_request("a", 3, 9), make_request("long", 20, 9)]
    first = scheduler.schedule(group, [group], 0)
    assert first is not None
    assert [(s.request.request_id, s.start, s.end, s.samples) for s in first.spans] == [
        ("a", 0, 3, True),
        ("long", 0, 3, False),
    ]
    commit(scheduler, group, first)
    second = scheduler.schedule(group, [group], 0)
    assert second is not None
    assert [(s.request.request_id, s.start, s.end) for s in second.spans] == [("a", 3, 4), ("long", 3, 8)]


def test_recompute_preempts_the_tail_and_resumes_it_first() -> None:
    scheduler, group = make_scheduler(), make_group(num_blocks=4)  # 16 tokens
    for name in ("a", "b"):
        scheduler.waiting.append(make_request(name, 6, 8))
    scheduler.waiting.append(make_request("c", 4, 1))
    preempted_at = None
    for _ in range(40):
        batch = scheduler.schedule(group, [group], 0)
        if batch is None:
            break
        if scheduler.num_preemptions and preempted_at is None:
            preempted_at = [r.request_id for r in scheduler.waiting]
            assert all(s.request.request_id == "a" for s in batch.spans)  # nobody is admitted in such a step
        commit(scheduler, group, batch)
        check([group])
    assert preempted_at is not None and preempted_at[0] == "b" and not scheduler.waiting
    assert scheduler.num_preemptions >= 1


def test_admission_waits_for_the_whole_prompt_and_keeps_order() -> None:
    scheduler, group = make_scheduler(), make_group(num_blocks=4)
    scheduler.waiting += [make_request("a", 8, 2), make_request("big", 12, 2), make_request("small", 2, 2)]
    batch = scheduler.schedule(group, [group], 0)
    assert batch is not None
    assert [s.request.request_id for s in batch.spans] == ["a"]  # no overtaking past the head


def test_watermark_holds_admission_back_only_while_something_runs() -> None:
    scheduler, group = make_scheduler(watermark=0.5), make_group(num_blocks=8)
    scheduler.waiting += [make_request("a", 12, 9), make_request("b", 8, 9)]
    batch = scheduler.schedule(group, [group], 0)
    assert batch is not None and [s.request.request_id for s in batch.spans] == ["a"]
    commit(scheduler, group, batch)
    batch = scheduler.schedule(group, [group], 0)
    assert batch is not None and [s.request.request_id for s in batch.spans] == ["a"]


def test_requests_spread_over_idle_groups() -> None:
    scheduler = make_scheduler(budget=64)
    groups = [make_group(i) for i in range(3)]
    scheduler.waiting += [make_request(f"r{i}", 4, 4) for i in range(6)]
    progress = True
    while progress:
        progress = False
        for group in groups:
            if group.num_in_flight == 0 and scheduler.schedule(group, groups, 0) is not None:
                progress = True
    for group in groups:
        group.num_in_flight = 0
        for request in group.running:
            request.num_in_flight, request.num_computed_tokens = 0, request.num_tokens
    while any(scheduler.schedule(group, groups, 0) for group in groups):
        for group in groups:
            group.num_in_flight = 0
    assert sorted(len(group.running) for group in groups) == [2, 2, 2]


def test_two_microbatches_share_the_decodes_of_a_chain() -> None:
    scheduler, group = make_scheduler(budget=64), make_group(num_stages=2, num_blocks=64)
    scheduler.waiting += [make_request(f"r{i}", 2, 20) for i in range(8)]
    batch = scheduler.schedule(group, [group], 0)
    assert batch is not None and len(batch.spans) == 8  # prompts
    commit(scheduler, group, batch)
    first, second = scheduler.schedule(group, [group], 0), scheduler.schedule(group, [group], 0)
    assert first is not None and second is not None
    assert len(first.spans) == len(second.spans) == 4
    assert {id(s.request) for s in first.spans}.isdisjoint({id(s.request) for s in second.spans})


def test_a_request_in_flight_is_no_victim() -> None:
    scheduler, group = make_scheduler(budget=64), make_group(num_stages=2, num_blocks=4)
    scheduler.waiting += [make_request("a", 8, 9), make_request("b", 7, 9)]
    batch = scheduler.schedule(group, [group], 0)
    assert batch is not None
    commit(scheduler, group, batch)
    a, b = group.running
    first = scheduler.schedule(group, [group], 0)
    assert first is not None
    # a needs a third block: none is left, and b ... is preempted only if no microbatch carries it
    assert scheduler.num_preemptions == (0 if b.num_in_flight else 1)
    check([group])
    del a
