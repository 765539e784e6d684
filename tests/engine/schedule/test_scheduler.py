"""The scheduler without an engine: a loop that schedules, pretends to compute, commits, and checks."""

from __future__ import annotations

import random
from collections import deque

import pytest
from groups import LAYERS, check, commit, make_group, make_request, make_scheduler
from seeds import seeds

from kunserve.engine.batch import Microbatch
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.schedule.policy import make_policy, shortest_running
from kunserve.engine.schedule.scheduler import Scheduler, SchedulerLimits
from kunserve.engine.schedule.swap_queue import SwapMove
from kunserve.policies import OverloadPolicy
from kunserve.sampling import FinishReason


@pytest.mark.parametrize("policy", list(OverloadPolicy))
@pytest.mark.parametrize("num_ahead", [0, 1])
@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("seed", seeds(12))
def test_every_request_finishes_within_memory_and_budget(
    policy: OverloadPolicy, num_stages: int, num_ahead: int, seed: int
) -> None:
    rng = random.Random(seed)
    num_host_blocks = 20 * (policy in (OverloadPolicy.SWAP, OverloadPolicy.DROP))
    groups = [make_group(i, num_stages) for i in range(rng.randrange(1, 4))]
    scheduler = make_scheduler(*groups, policy=policy, num_host_blocks=num_host_blocks, num_ahead=num_ahead)
    copies: list[SwapMove] = []
    requests = [make_request(f"r{i}", rng.randrange(1, 40), rng.randrange(1, 24)) for i in range(30)]
    arrivals, done = deque(requests), []
    in_flight: list[tuple[Group, Microbatch]] = []
    for _ in range(20_000):
        for _ in range(rng.randrange(3)):
            if arrivals:
                scheduler.waiting.append(arrivals.popleft())
        for group in groups:
            while group.num_in_flight < num_stages + num_ahead:
                batch = scheduler.schedule(group, groups, 0)
                if batch is None:
                    break
                assert 0 < batch.num_tokens <= 12
                assert len({id(s.request) for s in batch.spans}) == len(batch.spans)
                in_flight.append((group, batch))
        check(groups)
        copies += scheduler.swapped.take_begun()
        if copies and rng.random() < 0.3:
            scheduler.end_swap(copies.pop(rng.randrange(len(copies))), is_lost=rng.random() < 0.1)
        if policy is OverloadPolicy.MIGRATE and rng.random() < 0.1:
            migrate(scheduler, *rng.choices(groups, k=2))
        scheduler.swapped.check()
        check(groups)
        if in_flight:
            # microbatches of one group come back in order; groups in any
            group = rng.choice(in_flight)[0]
            at = next(i for i, (g, _) in enumerate(in_flight) if g is group)
            done += commit(scheduler, *in_flight.pop(at), stops=0.02)
            check(groups)
        if len(done) == len(requests) and not in_flight:
            break
    assert len(done) == len(requests), "no progress"
    assert all(group.num_used == 0 and not group.running for group in groups)
    assert scheduler.num_waiting == 0 and not scheduler.preempted_by and not copies
    assert scheduler.swapped.num_free == scheduler.swapped.num_blocks
    if policy is OverloadPolicy.QUEUE:
        assert scheduler.num_preemptions == 0


def migrate(scheduler: Scheduler, source: Group, destination: Group) -> None:
    """Hand the shortest running request over, if that can be now."""
    request = shortest_running(source)
    if source is destination or request is None or request.num_in_flight:
        return  # with one step planned ahead it has to be held back first, as engine/regroup/migrate.py does
    table = scheduler.fleet.expect(destination)
    if scheduler.fleet.extend(table, destination, request.num_blocks):
        scheduler.hand_over(request, destination, table)
    else:
        scheduler.fleet.expect_no_more(destination, table)


def test_decodes_go_before_prompts_and_prompts_are_cut_to_the_budget() -> None:
    scheduler = make_scheduler(group := make_group(), budget=6)
    scheduler.waiting.extend([make_request("a", 3, 9), make_request("long", 20, 9)])
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
    scheduler = make_scheduler(group := make_group(num_blocks=4))  # 16 tokens
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
    scheduler = make_scheduler(group := make_group(num_blocks=4))
    scheduler.waiting.extend([make_request("a", 8, 2), make_request("big", 12, 2), make_request("small", 2, 2)])
    batch = scheduler.schedule(group, [group], 0)
    assert batch is not None
    assert [s.request.request_id for s in batch.spans] == ["a"]  # no overtaking past the head


def test_watermark_holds_admission_back_only_while_something_runs() -> None:
    scheduler = make_scheduler(group := make_group(num_blocks=8), watermark=0.5)
    scheduler.waiting.extend([make_request("a", 12, 9), make_request("b", 8, 9)])
    batch = scheduler.schedule(group, [group], 0)
    assert batch is not None and [s.request.request_id for s in batch.spans] == ["a"]
    commit(scheduler, group, batch)
    batch = scheduler.schedule(group, [group], 0)
    assert batch is not None and [s.request.request_id for s in batch.spans] == ["a"]


def test_requests_spread_over_idle_groups() -> None:
    scheduler = make_scheduler(budget=64)
    groups = [make_group(i) for i in range(3)]
    scheduler.waiting.extend([make_request(f"r{i}", 4, 4) for i in range(6)])
    progress = True
    while progress:
        progress = False
        for group in groups:
            if group.num_in_flight == 0 and scheduler.schedule(group, groups, 0) is not None:
                progress = True
    for group in groups:
        group.in_flight.clear()
        for request in group.running:
            request.num_in_flight, request.num_computed_tokens = 0, request.num_tokens
    while any(scheduler.schedule(group, groups, 0) for group in groups):
        for group in groups:
            group.in_flight.clear()
    assert sorted(len(group.running) for group in groups) == [2, 2, 2]


def test_a_chain_has_as_many_seats_as_its_devices_had_and_no_microbatch_has_more_than_one_of_them() -> None:
    group = make_group(num_stages=2, num_blocks=64)
    limits = SchedulerLimits(max_num_batched_tokens=64, max_num_seqs=2)
    scheduler = Scheduler(Fleet([group]), limits, make_policy(OverloadPolicy.RECOMPUTE, 0.0))
    scheduler.waiting.extend([make_request(f"r{i}", 4, 8) for i in range(5)])
    first, second = (scheduler.schedule(group, [group], 0) for _ in range(2))
    assert spans(first) == [("r0", 0, 4, False), ("r1", 0, 4, False)]
    assert spans(second) == [("r2", 0, 4, False), ("r3", 0, 4, False)]
    assert scheduler.schedule(group, [group], 0) is None  # r4 may not run yet
    for batch in (first, second):
        assert batch is not None
        commit(scheduler, group, batch)
    assert spans(scheduler.schedule(group, [group], 0)) == [("r0", 4, 5, False), ("r1", 4, 5, False)]


@pytest.mark.parametrize("is_admitting", [False, True])
def test_nobody_waits_for_a_less_loaded_group_that_admits_nobody(is_admitting: bool) -> None:
    chain, single = make_group(0, num_stages=4), make_group(1)
    scheduler = make_scheduler(chain, single)
    scheduler.fleet.set_admitting(chain, is_admitting)
    for group, num_running in ((chain, 1), (single, 1)):
        for i in range(num_running):
            request = make_request(f"{group.group_id}.{i}", 4, 4)
            scheduler.fleet.admit(request, group)
            scheduler.fleet.suspend(request)
    scheduler.waiting.append(make_request("head", 4, 4))
    assert (scheduler.schedule(single, [chain, single], 0) is None) == is_admitting
    assert (scheduler.schedule(chain, [chain, single], 0) is not None) == is_admitting


def test_two_microbatches_share_the_decodes_of_a_chain() -> None:
    scheduler = make_scheduler(group := make_group(num_stages=2, num_blocks=64), budget=64)
    scheduler.waiting.extend([make_request(f"r{i}", 2, 20) for i in range(8)])
    batch = scheduler.schedule(group, [group], 0)
    assert batch is not None and len(batch.spans) == 8  # prompts
    commit(scheduler, group, batch)
    first, second = scheduler.schedule(group, [group], 0), scheduler.schedule(group, [group], 0)
    assert first is not None and second is not None
    assert len(first.spans) == len(second.spans) == 4
    assert {id(s.request) for s in first.spans}.isdisjoint({id(s.request) for s in second.spans})


def spans(batch: Microbatch | None) -> list[tuple[str, int, int, bool]]:
    return [(s.request.request_id, s.start, s.end, s.is_ahead) for s in batch.spans] if batch else []


def test_the_next_step_is_planned_while_the_current_one_runs() -> None:
    scheduler = make_scheduler(group := make_group(num_blocks=64), budget=64, num_ahead=1)
    scheduler.waiting.extend([make_request("a", 4, 2), make_request("b", 6, 9)])
    first, second = scheduler.schedule(group, [group], 0), scheduler.schedule(group, [group], 0)
    assert first is not None and second is not None
    assert spans(first) == [("a", 0, 4, False), ("b", 0, 6, False)]
    assert spans(second) == [("a", 4, 5, True), ("b", 6, 7, True)]
    a, b = group.running
    assert (a.num_tokens, a.num_expected_tokens, a.num_scheduled_tokens) == (4, 6, 5)
    assert scheduler.schedule(group, [group], 0) is None  # nothing follows what only the second samples
    check([group])
    commit(scheduler, group, first)
    third = scheduler.schedule(group, [group], 0)
    assert spans(third) == [("b", 7, 8, True)]  # a ends with what the second samples
    assert commit(scheduler, group, second) == [a]
    b.finish_reason = FinishReason.STOP  # found out late: the third carries it already
    check([group])
    assert scheduler.schedule(group, [group], 0) is None and group.num_used == 2
    assert third is not None
    commit(scheduler, group, third)
    assert not group.running and group.num_used == 0


def test_a_chain_runs_ahead_of_its_oldest_microbatch_only() -> None:
    scheduler = make_scheduler(group := make_group(num_stages=2, num_blocks=64), budget=64, num_ahead=1)
    scheduler.waiting.extend([make_request(name, 2, 20) for name in "abcd"])
    prompts = scheduler.schedule(group, [group], 0)
    assert prompts is not None
    first, second = scheduler.schedule(group, [group], 0), scheduler.schedule(group, [group], 0)
    assert first is not None and second is not None
    assert spans(first) == [("a", 2, 3, True), ("b", 2, 3, True)]
    assert spans(second) == [("c", 2, 3, True), ("d", 2, 3, True)]
    for done, names in ((prompts, "ab"), (first, "cd"), (second, "ab")):
        commit(scheduler, group, done)
        batch = scheduler.schedule(group, [group], 0)
        assert [(name, is_ahead) for name, _, _, is_ahead in spans(batch)] == [(name, True) for name in names]


def test_nobody_runs_ahead_into_a_shortage_and_the_victim_is_the_same() -> None:
    victims = []
    for num_ahead in (0, 1):
        scheduler = make_scheduler(group := make_group(num_blocks=5), budget=64, num_ahead=num_ahead)  # 20 tokens
        scheduler.waiting.extend([make_request("a", 6, 14), make_request("b", 6, 14), make_request("c", 2, 9)])
        in_flight: list[Microbatch] = []
        while not scheduler.num_preemptions:
            while len(in_flight) < 1 + num_ahead and (batch := scheduler.schedule(group, [group], 0)) is not None:
                in_flight.append(batch)
            if not scheduler.num_preemptions:
                commit(scheduler, group, in_flight.pop(0))
        victims.append((list(scheduler.waiting), [r.num_tokens for r in group.running]))
    (off, lens_off), (on, lens_on) = victims
    assert [r.request_id for r in on] == [r.request_id for r in off] == ["b", "c"] and lens_on == lens_off


def test_a_request_in_flight_is_no_victim() -> None:
    scheduler = make_scheduler(group := make_group(num_stages=2, num_blocks=4), budget=64)
    scheduler.waiting.extend([make_request("a", 8, 9), make_request("b", 7, 9)])
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


def test_who_lacks_more_blocks_than_were_kept_for_it_goes_to_the_host_too() -> None:
    """A block is kept for each that runs; whoever has moved here may need two for its next tokens."""
    groups = here, other = [make_group(0, num_blocks=5), make_group(1)]
    scheduler = make_scheduler(*groups, budget=8, policy=OverloadPolicy.DROP, num_host_blocks=20)
    scheduler.waiting.append(decoding := make_request("decoding", 4, 9))
    run_steps(scheduler, here, 1)
    scheduler.waiting.append(moved := make_request("moved", 20, 9))
    run_steps(scheduler, other, 1)
    scheduler.fleet.extend(table := scheduler.fleet.expect(here), here, 2)
    scheduler.hand_over(moved, here, table)
    assert here.num_free == 2
    batch = scheduler.schedule(here, groups, 0)
    assert batch is not None and batch.requests == [decoding]
    [move] = scheduler.swapped.take_begun()
    assert move.request is moved and move.is_out and scheduler.num_preemptions == 0
    scheduler.end_swap(move)
    assert list(scheduler.swapped.ready) == [moved] and moved.num_computed_tokens == 8
    check(groups)


def test_who_is_on_the_host_keeps_nobody_of_a_better_priority_waiting() -> None:
    scheduler = make_scheduler(
        group := make_group(num_blocks=8), policy=OverloadPolicy.SWAP, num_host_blocks=20, budget=40
    )
    low = make_request("low", 19, 30)
    low.priority = 1
    scheduler.waiting.extend([make_request("running", 8, 30), low])
    while not scheduler.swapped.num_swaps:
        run_steps(scheduler, group, 1)
    for move in scheduler.swapped.take_begun():
        scheduler.end_swap(move)
    assert scheduler.head is low and group.num_free >= 2  # for few tokens, not for its own
    other, urgent = make_request("other", 3, 4), make_request("urgent", 3, 4)
    other.priority = 1
    scheduler.waiting.append(other)
    assert scheduler.head is low
    scheduler.waiting.append(urgent)
    assert scheduler.head is urgent
    batch = scheduler.schedule(group, [group], 0)
    assert batch is not None and urgent in batch.requests and not {low, other} & set(batch.requests)


def run_steps(scheduler: Scheduler, group: Group, num_steps: int) -> None:
    for _ in range(num_steps):
        if (batch := scheduler.schedule(group, [group], 0)) is None:
            return
        commit(scheduler, group, batch)


def test_swap_sends_the_tail_away_and_serves_it_before_those_that_wait() -> None:
    scheduler = make_scheduler(
        group := make_group(num_blocks=4), policy=OverloadPolicy.SWAP, num_host_blocks=8
    )  # 16 tokens
    for name in ("a", "b"):
        scheduler.waiting.append(make_request(name, 6, 8))
    scheduler.waiting.append(make_request("c", 2, 1))
    run_steps(scheduler, group, 3)  # prompts, then tokens 7 and 8
    a, b = group.running
    batch = scheduler.schedule(group, [group], 0)
    (move,) = scheduler.swapped.take_begun()
    assert batch is None and (move.request, move.num_blocks, move.is_out) == (b, 2, True)
    assert b.is_moving and group.num_free == 0  # until the copy is done
    assert scheduler.schedule(group, [group], 0) is None and not scheduler.swapped.take_begun()  # b is enough
    scheduler.end_swap(move)
    assert list(scheduler.swapped.ready) == [b] and b.num_computed_tokens == 8 and not b.block_tables
    run_steps(scheduler, group, 4)
    assert [r.request_id for r in scheduler.waiting] == ["c"] and group.running == [a]  # c would fit, b is first
    run_steps(scheduler, group, 9)
    (move,) = scheduler.swapped.take_begun()
    assert (move.request, move.is_out, b.is_moving) == (b, False, True)
    scheduler.end_swap(move)
    check([group])
    run_steps(scheduler, group, 9)
    assert b.finish_reason and scheduler.num_waiting == scheduler.num_preemptions == 0
    assert scheduler.swapped.num_swaps == 1 and scheduler.swapped.num_free == 8


def test_swap_recomputes_when_the_host_is_full() -> None:
    scheduler = make_scheduler(group := make_group(num_blocks=4), policy=OverloadPolicy.SWAP, num_host_blocks=1)
    scheduler.waiting.extend([make_request("a", 6, 8), make_request("b", 6, 8)])
    run_steps(scheduler, group, 40)
    assert scheduler.num_preemptions == 1 and scheduler.swapped.num_swaps == 0
    assert not group.running and scheduler.num_waiting == 0


def test_a_retracted_request_goes_to_the_tail_of_the_queue() -> None:
    scheduler = make_scheduler(group := make_group(num_blocks=4), policy=OverloadPolicy.RETRACT, budget=64)
    a = make_request("a", 6, 8)
    scheduler.waiting.extend([a, make_request("b", 16, 1)])
    batch = scheduler.schedule(group, [group], 0)
    assert batch is not None
    commit(scheduler, group, batch)
    assert group.running == [a]
    scheduler.preempt(group, a)
    assert [r.request_id for r in scheduler.waiting] == ["b", "a"] and scheduler.preempted_by == {"a": 0}
    scheduler.remove(a)
    assert [r.request_id for r in scheduler.waiting] == ["b"] and not scheduler.preempted_by


@pytest.mark.parametrize("policy", [OverloadPolicy.RECOMPUTE, OverloadPolicy.RETRACT, OverloadPolicy.SWAP])
def test_a_head_is_admitted_without_blocks_for_what_it_shares(policy: OverloadPolicy) -> None:
    group = make_group(num_blocks=10)
    fleet = Fleet([group], has_prefix_cache=True)
    scheduler = Scheduler(fleet, SchedulerLimits(64, 64), make_policy(policy, 0))
    first, second, other = make_request("a", 25, 2), make_request("b", 26, 2), make_request("c", 26, 2)
    other.token_ids = [token + 1 for token in other.token_ids]
    scheduler.waiting.append(first)
    batch = scheduler.schedule(group, [group], 0)
    assert batch is not None and group.num_free == 3
    commit(scheduler, group, batch)
    fleet.computed(first, group)
    scheduler.waiting.append(other)
    assert not scheduler.can_admit(group)
    scheduler.remove(other)
    scheduler.waiting.append(second)
    assert scheduler.can_admit(group)
    assert scheduler.schedule(group, [group], 0) is not None
    assert second.num_blocks == 7 and second.table.blocks[:6] == first.table.blocks[:6]
    fleet.check(LAYERS)


def test_who_comes_back_from_the_host_waits_for_all_its_blocks() -> None:
    group = make_group(num_blocks=10)
    fleet = Fleet([group], has_prefix_cache=True)
    scheduler = Scheduler(fleet, SchedulerLimits(64, 64), make_policy(OverloadPolicy.SWAP, 0), 16)
    first, second = make_request("a", 24, 4), make_request("b", 25, 4)
    for request in (first, second):
        scheduler.waiting.append(request)
        batch = scheduler.schedule(group, [group], 0)
        assert batch is not None
        commit(scheduler, group, batch)
        fleet.computed(request, group)
    assert second.table.blocks[:6] == first.table.blocks[:6]
    assert scheduler.swapped.begin_out(group, second)
    scheduler.end_swap(scheduler.swapped.take_begun()[0])
    assert list(scheduler.swapped.ready) == [second] and group.num_free < group.blocks_for(second.num_tokens)
    assert not scheduler.can_admit(group)  # its KV is copied back: what the other has is of no use
    run_steps(scheduler, group, 1)
    assert list(scheduler.swapped.ready) == [second] and group.running == [first]
    run_steps(scheduler, group, 9)
    assert first.finish_reason and [move.request for move in scheduler.swapped.take_begun()] == [second]
    fleet.check(LAYERS)
