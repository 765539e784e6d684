"""Who may join a microbatch: prefixes that are being computed are waited for, and who is suspected goes alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from groups import LAYERS, commit, make_group, make_request

from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.schedule.policy import make_policy
from kunserve.engine.schedule.scheduler import Scheduler, SchedulerLimits
from kunserve.policies import OverloadPolicy
from kunserve.sampling import FinishReason


def sharing_scheduler(budget: int, *groups: Group) -> Scheduler:
    return Scheduler(
        Fleet(groups, has_prefix_cache=True), SchedulerLimits(budget, 64), make_policy(OverloadPolicy.DROP, 0)
    )


def run_step(scheduler: Scheduler, group: Group) -> list[str]:
    """Schedule, compute and commit one step; who was in it."""
    batch = scheduler.schedule(group, [group], 0)
    assert batch is not None
    commit(scheduler, group, batch)
    for span in batch.spans:
        if span.request.finish_reason is None:
            scheduler.fleet.computed(span.request, group)
    scheduler.fleet.check(LAYERS)
    return [span.request.request_id for span in batch.spans]


def test_a_prefix_that_is_being_computed_is_waited_for() -> None:
    scheduler = sharing_scheduler(16, group := make_group(num_blocks=60))
    first, second, other = make_request("a", 41, 9), make_request("b", 41, 9), make_request("c", 41, 9)
    other.token_ids = [9, *other.token_ids[1:]]
    scheduler.waiting.extend([first, second, other])
    steps = [run_step(scheduler, group) for _ in range(4)]
    assert steps == [["a"], ["a"], ["a"], ["a", "b", "c"]]  # the third has room for others, but not yet for b
    assert second.num_cached_tokens == 40 and other.num_cached_tokens == 0


@pytest.mark.parametrize("end", ["leaves", "moves"])
def test_nobody_waits_for_a_prefix_that_does_not_come(end: str) -> None:
    scheduler = sharing_scheduler(16, group := make_group(num_blocks=60))
    first, second = make_request("a", 41, 9), make_request("b", 41, 9)
    scheduler.waiting.extend([first, second])
    batch = scheduler.schedule(group, [group], 0)
    assert batch is not None and [span.request for span in batch.spans] == [first]
    if end == "leaves":
        first.finish_reason = FinishReason.ABORT
    else:
        scheduler.fleet.suspend(first)
    late = scheduler.schedule(group, [group], 0)
    assert late is not None and [span.request for span in late.spans] == [second]


def test_who_asks_for_logprobs_of_the_prompt_waits_for_nobody() -> None:
    scheduler = sharing_scheduler(64, group := make_group(num_blocks=60))
    second = make_request("b", 21, 9)
    second.params = replace(second.params, num_prompt_logprobs=1)
    scheduler.waiting.extend([make_request("a", 21, 9), second])
    assert run_step(scheduler, group) == ["a", "b"]


def test_a_suspected_request_goes_alone_by_turns_with_all_others() -> None:
    scheduler = sharing_scheduler(8, group := make_group(num_blocks=60))
    requests = [make_request(name, 20, 4) for name in "abc"]
    for i, request in enumerate(requests):
        request.token_ids = [20 * i + token for token in request.token_ids]
    requests[1].suspect_until = 20
    scheduler.waiting.extend(requests)
    steps = [run_step(scheduler, group) for _ in range(6)]
    # Once b has passed all of its 20 tokens, which takes three steps, it goes with the others.
    assert list(map(sorted, steps)) == [["a"], ["b"], ["a"], ["b"], ["a", "c"], ["b"]]
    assert sorted(run_step(scheduler, group)) == ["a", "b", "c"]


def test_who_may_have_ended_a_device_goes_with_others_but_only_one_of_them() -> None:
    scheduler = sharing_scheduler(32, group := make_group(num_blocks=60))
    requests = [make_request(name, size, 20) for name, size in (("a", 8), ("b", 8), ("x", 6), ("y", 6), ("z", 6))]
    for i, request in enumerate(requests):
        request.token_ids = [20 * i + token for token in request.token_ids]
    scheduler.waiting.extend(requests[:2])
    assert run_step(scheduler, group) == ["a", "b"]
    for request in requests[2:]:
        request.suspect_until, request.num_killed = 6, 1
    scheduler.waiting.extend(requests[2:])
    steps = [run_step(scheduler, group) for _ in range(4)]
    assert steps == [["x"], ["a", "b", "x", "y"], ["z"], ["a", "b", "x", "y", "z"]]


def test_others_come_to_their_turn_however_many_go_first() -> None:
    scheduler = sharing_scheduler(8, group := make_group(num_blocks=60))
    running, suspect = make_request("a", 2, 40), make_request("b", 60, 4)
    scheduler.waiting.append(running)
    assert run_step(scheduler, group) == ["a"]
    suspect.suspect_until = 60
    scheduler.waiting.append(suspect)
    assert [run_step(scheduler, group) for _ in range(8)] == [["b"], ["a"]] * 4  # no stream misses two microbatches


def test_streams_whose_device_is_gone_are_computed_again_by_turns_with_all_others() -> None:
    scheduler = sharing_scheduler(8, group := make_group(num_blocks=60))
    running, begun, new = make_request("a", 2, 40), make_request("b", 18, 4), make_request("c", 6, 4)
    begun.token_ids = [50 + token for token in begun.token_ids]
    scheduler.waiting.append(running)
    assert run_step(scheduler, group) == ["a"]
    begun.is_hurried = True
    scheduler.waiting.extend([begun, new])
    steps = [run_step(scheduler, group) for _ in range(4)]
    assert steps == [["b"], ["a", "b"], ["b", "a", "c"], ["a", "b", "c"]] and not begun.is_hurried


def test_a_stream_that_makes_way_for_others_is_hurried_no_more() -> None:
    scheduler = sharing_scheduler(8, group := make_group(num_blocks=5))  # of four tokens each
    running, begun = make_request("a", 8, 16), make_request("b", 12, 4)
    begun.token_ids = [50 + token for token in begun.token_ids]
    scheduler.waiting.append(running)
    assert run_step(scheduler, group) == ["a"]
    begun.is_hurried = True
    scheduler.waiting.append(begun)
    assert run_step(scheduler, group) == ["b"]
    while begun.group_id is not None:
        assert run_step(scheduler, group)[0] == "a"
    assert begun in scheduler.waiting
    assert not begun.is_hurried


def test_a_request_goes_where_no_step_has_failed_if_it_can() -> None:
    groups = [make_group(i, num_blocks=20) for i in range(2)]
    scheduler = sharing_scheduler(64, *groups)
    request = make_request("a", 8, 4)
    request.avoids = 0
    scheduler.waiting.append(request)
    assert not scheduler.can_admit(groups[0]) and scheduler.can_admit(groups[1])
    request.avoids = None
    scheduler.fleet.mark(groups[1].stages[0].device, is_suspect=True, is_lost=False)
    assert scheduler.can_admit(groups[0]) and not scheduler.can_admit(groups[1])
    request.avoids = 0  # one is as bad as the other
    assert scheduler.can_admit(groups[0]) and scheduler.can_admit(groups[1])


@pytest.mark.parametrize("is_suspect", [False, True])
def test_only_where_step_after_step_fails_nobody_goes_while_others_are_full(is_suspect: bool) -> None:
    groups = [make_group(i, num_blocks=20) for i in range(2)]
    scheduler = sharing_scheduler(80, *groups)
    scheduler.waiting.append(make_request("full", 80, 1))
    assert scheduler.schedule(groups[1], [groups[1]], 0) is not None and not groups[1].num_free
    request = make_request("a", 8, 4)
    request.token_ids = [9, *request.token_ids[1:]]
    request.avoids = 0
    scheduler.fleet.mark(groups[0].stages[0].device, is_suspect=is_suspect, is_lost=False)
    scheduler.waiting.append(request)
    assert scheduler.can_admit(groups[0]) is not is_suspect
    assert not scheduler.can_admit(groups[1])


def test_an_idle_group_does_not_wait_for_a_prefix_that_another_one_computes() -> None:
    groups = [make_group(i, num_blocks=60) for i in range(2)]
    scheduler = sharing_scheduler(16, *groups)
    first, second = make_request("a", 41, 9), make_request("b", 41, 9)
    scheduler.waiting.append(first)
    batch = scheduler.schedule(groups[0], groups, 0)
    assert batch is not None
    commit(scheduler, groups[0], batch)
    scheduler.fleet.computed(first, groups[0])
    scheduler.waiting.append(second)
    assert scheduler.schedule(groups[1], groups[1:], 0) is not None
    assert second.group_id == 1 and second.num_cached_tokens == 0
