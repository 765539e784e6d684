"""The policies' rules and constants as plain functions of values; then retract in an engine."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest
from crowd import PLENTY, make_crowd, make_request, read_all, serving
from groups import commit

from kunserve.engine.blocks.block_pool import BlockPool
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group, Stage
from kunserve.engine.request import Request
from kunserve.engine.schedule.policy import (
    INIT_NEW_TOKEN_RATIO,
    MIN_NEW_TOKEN_RATIO,
    Drop,
    Freeness,
    Migrate,
    Queue,
    Recompute,
    Retract,
    Swap,
    make_policy,
    pair_groups,
    ratio_after_retraction,
    remaining_steps,
    shortest_running,
)
from kunserve.engine.schedule.scheduler import Scheduler, SchedulerLimits
from kunserve.policies import OverloadPolicy


def make_group(num_blocks: int = 100, num_stages: int = 1, group_id: int = 0) -> Group:
    stages = [Stage(i, i, i + 1, BlockPool(num_blocks)) for i in range(num_stages)]
    return Group(group_id, tuple(stages), block_size=4)


def decoding(group: Group, name: str, num_prompt: int, num_output: int, max_tokens: int = 100) -> Request:
    """A running request that has generated `num_output` tokens; its next step writes the last one's KV."""
    request = make_request(name, num_prompt, max_tokens)
    request.token_ids += [7] * num_output
    request.num_computed_tokens = request.num_scheduled_tokens = request.num_tokens - 1
    return join(group, request)


def prefilling(group: Group, name: str, num_prompt: int, max_tokens: int = 100) -> Request:
    return join(group, make_request(name, num_prompt, max_tokens))


def join(group: Group, request: Request) -> Request:
    request.group_id = group.group_id
    group.running.append(request)
    is_prefilling = request.num_output_tokens == 0
    num_tokens = request.num_tokens if is_prefilling else request.num_computed_tokens
    assert Fleet([group]).allocate(request, group, num_tokens)
    return request


def names(requests: list[Request]) -> list[str]:
    return [request.request_id for request in requests]


def test_every_flag_names_a_policy_with_its_watermark() -> None:
    made = {policy: make_policy(policy, 0.0) for policy in OverloadPolicy}
    assert {policy: type(it) for policy, it in made.items()} == {
        OverloadPolicy.DROP: Drop,
        OverloadPolicy.RECOMPUTE: Recompute,
        OverloadPolicy.RETRACT: Retract,
        OverloadPolicy.SWAP: Swap,
        OverloadPolicy.MIGRATE: Migrate,
        OverloadPolicy.QUEUE: Queue,
    }
    swap, recompute = made[OverloadPolicy.SWAP], made[OverloadPolicy.RECOMPUTE]
    assert isinstance(swap, Swap) and swap.watermark == 0.01
    assert isinstance(recompute, Recompute) and recompute.watermark == 0.0
    assert [policy for policy, it in made.items() if it.is_requeued_last] == [OverloadPolicy.RETRACT]


# --- retract --------------------------------------------------------------------------------------------------------


def test_the_ratio_starts_at_seven_tenths_and_falls_to_its_floor_in_600_decode_steps() -> None:
    assert INIT_NEW_TOKEN_RATIO == 0.7 and pytest.approx(0.098) == MIN_NEW_TOKEN_RATIO
    policy, group = Retract(), make_group()
    assert policy.ratio(group) == 0.7
    prompt = prefilling(group, "prompt", 4)
    assert policy.make_way(group, 0) == [] and policy.ratio(group) == 0.7  # no decode step
    decoding(group, "a", 4, 1)
    policy.make_way(group, 0)
    assert policy.ratio(group) == pytest.approx(0.7 - 0.602 / 600)
    for _ in range(598):
        policy.make_way(group, 0)
    assert policy.ratio(group) > MIN_NEW_TOKEN_RATIO
    for _ in range(5):
        policy.make_way(group, 0)
    assert policy.ratio(group) == MIN_NEW_TOKEN_RATIO
    Fleet([group]).release(prompt)
    Fleet([group]).release(group.running[0])
    policy.make_way(group, 0)
    assert policy.ratio(group) == 0.7  # idle


def test_a_decode_step_of_a_chain_is_one_microbatch_per_stage() -> None:
    policy, chain = Retract(), make_group(num_stages=2)
    decoding(chain, "a", 4, 1)
    policy.make_way(chain, 0)
    policy.make_way(chain, 0)
    assert policy.ratio(chain) == pytest.approx(0.7 - 0.602 / 600)


def test_retraction_takes_the_fewest_generated_tokens_and_of_equals_the_longest_prompt() -> None:
    policy, group = Retract(), make_group(num_blocks=8)
    decoding(group, "old", 4, 5)  # two blocks, the third is missing
    decoding(group, "short", 3, 2)  # one, the second is missing
    decoding(group, "long", 11, 2)  # three, the fourth is missing
    prefilling(group, "prompt", 8)  # two, and no victim: it does not decode
    assert group.num_free == 0
    victims = policy.make_way(group, 0)
    assert names(victims) == ["long"]
    # 7 decoded and 20 steps for each of the two that stay, of at most 200
    assert policy.ratio(group) == pytest.approx((7 + 2 * 20) / 201)


def test_retraction_goes_on_until_the_rest_fits_and_one_stays() -> None:
    group = make_group(num_blocks=3)
    for name in "abc":
        decoding(group, name, 4, 1)
    assert names(Retract().make_way(group, 0)) == ["a", "b"]
    lonely = make_group(num_blocks=1)
    decoding(lonely, "a", 4, 1)
    assert Retract().make_way(lonely, 0) == []


def test_who_is_in_flight_or_moving_is_not_retracted() -> None:
    policy, group = Retract(), make_group(num_blocks=3)
    a, b, _ = (decoding(group, name, 4, 1) for name in "abc")
    a.num_in_flight, b.is_moving = 1, True
    assert policy.make_way(group, 0) == []


def test_the_ratio_after_a_retraction_is_at_most_one() -> None:
    group = make_group()
    assert ratio_after_retraction([decoding(group, "a", 4, 10, max_tokens=15)]) == 1.0
    assert ratio_after_retraction([decoding(group, "b", 4, 10, max_tokens=99)]) == pytest.approx(30 / 100)
    assert ratio_after_retraction([]) == 0.0


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "is_admitted"),
    [
        (20, 74, True),  # 20 + 74 + 4 < 98.4
        (20, 75, False),
        (20, 5000, False),  # clipped to 4,096, which is too much still
    ],
)
def test_admission_leaves_room_for_what_the_running_may_still_generate(
    num_prompt: int, max_tokens: int, is_admitted: bool
) -> None:
    policy, group = Retract(), make_group(num_blocks=50)  # 200 tokens
    decoding(group, "a", 5, 8, max_tokens=56)  # 12 tokens of KV; 48 * 0.7 = 33.6 are reserved
    prefilling(group, "p", 8, max_tokens=48)  # 8 tokens, and 48 in full
    assert policy.may_admit(group, make_request("r", num_prompt, max_tokens)) is is_admitted


def test_reservations_are_clipped_and_an_empty_group_takes_whatever_input_fits() -> None:
    policy, group = Retract(), make_group(num_blocks=10_000)
    assert policy.may_admit(make_group(num_blocks=2), make_request("r", 8, 5000))
    assert not policy.may_admit(make_group(num_blocks=2), make_request("r", 9, 1))
    decoding(group, "a", 5, 8, max_tokens=100_000)  # 12 of 40,000 tokens; 4,096 * 0.7 = 2,867.2 are reserved
    assert policy.may_admit(group, make_request("r", 33_020, 5000))  # 33,020 + 4,096 + 4 < 37,120.8
    assert not policy.may_admit(group, make_request("r", 33_021, 5000))


async def test_retract_changes_no_token(six_layers: Path) -> None:
    """Outputs longer than the estimate: those that the ratio let in do not all fit in the end."""
    crowd, again = ([make_request(f"r{i}", 4, 40, 0.8 * (i % 2)) for i in range(24)] for _ in range(2))
    async with serving(six_layers, PLENTY, overload_policy=OverloadPolicy.RETRACT) as served:
        expected = await read_all(served.engine, crowd)
        assert served.engine.scheduler.num_preemptions == 0
    async with serving(six_layers, 40, overload_policy=OverloadPolicy.RETRACT) as served:
        assert await read_all(served.engine, again) == expected
        assert served.engine.state()["requests"]["preemptions"] > 0
        assert max(request.num_preemptions for request in again) > 0


async def test_retract_finishes_a_mixed_crowd(six_layers: Path) -> None:
    async with serving(six_layers, 40, overload_policy=OverloadPolicy.RETRACT) as served:
        tokens = await read_all(served.engine, crowd := make_crowd())
        assert {r.request_id: r.params.max_tokens for r in crowd} == {name: len(ids) for name, ids in tokens.items()}


# --- swap -----------------------------------------------------------------------------------------------------------


def test_swap_takes_the_tail_unless_enough_is_leaving_already() -> None:
    policy, group = Swap(), make_group(num_blocks=3)
    for name in "abc":
        decoding(group, name, 4, 1)  # each holds one block and needs another
    assert names(policy.make_way(group, 0)) == ["c", "b"]
    assert names(policy.make_way(group, 1)) == ["c"]
    assert policy.make_way(group, 3) == []
    group.running[-1].is_moving = True
    assert names(policy.make_way(group, 1)) == ["b"]
    assert policy.victim(group, group.running[0]) is None


# --- migrate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_host_faster", "on_host"), [(True, 1), (False, 0)])
def test_below_a_drop_whoever_makes_way_goes_the_quicker_way(is_host_faster: bool, on_host: int) -> None:
    group, asked = make_group(num_blocks=6), list[tuple[int, int]]()

    def answer(num_tokens: int, num_kept: int) -> bool:
        asked.append((num_tokens, num_kept))
        return is_host_faster

    policy = Drop(0.0, answer)
    scheduler = Scheduler(Fleet([group]), SchedulerLimits(64, 64), policy, num_host_blocks=100)
    for name in "ab":
        decoding(group, name, 10, 3)  # both hold three blocks, and need a fourth for their next token
    scheduler.schedule(group, [group], 0)
    assert asked == [(12, 0)]  # of the last: the KV of all but its newest token
    assert scheduler.swapped.num_swaps == on_host and scheduler.num_preemptions == 1 - on_host


def test_what_others_keep_of_a_request_need_not_be_computed_again() -> None:
    group, asked = make_group(num_blocks=9), list[tuple[int, int]]()

    def answer(num_tokens: int, num_kept: int) -> bool:
        asked.append((num_tokens, num_kept))
        return True

    policy = Drop(0.0, answer)
    fleet = Fleet([group], has_prefix_cache=True)
    scheduler = Scheduler(fleet, SchedulerLimits(64, 64), policy, num_host_blocks=100)
    for name in "ab":  # alike but for the last four tokens
        scheduler.waiting.append(request := make_request(name, 12, 40))
        request.prompt_token_ids[:] = request.token_ids[:] = [*range(1, 9), *[ord(name)] * 4]
        batch = scheduler.schedule(group, [group], 0)
        assert batch is not None
        commit(scheduler, group, batch)
        fleet.computed(request, group)
    while not asked:
        batch = scheduler.schedule(group, [group], 0)
        assert batch is not None
        commit(scheduler, group, batch)
    [(num_tokens, num_kept)] = asked
    assert num_kept == 8 < num_tokens


def test_admission_below_a_drop_leaves_a_hundredth_free_and_control_is_told() -> None:
    group = make_group(num_blocks=200)
    policy = make_policy(OverloadPolicy.DROP, 0.0)
    assert policy.num_reserved(group) == 0  # nobody runs
    decoding(group, "a", 10, 3)
    assert policy.num_reserved(group) == 2
    assert make_policy(OverloadPolicy.DROP, 0.25).num_reserved(group) == 50
    assert make_policy(OverloadPolicy.QUEUE, 0.25).num_reserved(group) == 0


def test_remaining_steps() -> None:
    assert remaining_steps(30, 3) == 10.0
    assert remaining_steps(30, 3, waiting_blocks=6, num_waiting=1) == 6.0
    assert remaining_steps(4, 1, waiting_blocks=12, num_waiting=1) == -4.0
    assert remaining_steps(30, 0) == inf


def test_the_group_with_most_remaining_steps_is_the_least_loaded() -> None:
    policy, few, many = Migrate(), make_group(num_blocks=20), make_group(num_blocks=100)
    decoding(few, "a", 4, 1)
    for name in "bc":
        decoding(many, name, 4, 1)
    assert policy.load(few) == -19.0 and policy.load(many) == -49.0
    assert policy.load(make_group()) < policy.load(many) < policy.load(few)


def test_the_most_loaded_is_paired_with_the_least_loaded() -> None:
    groups = [
        Freeness(0, 2.0, 0),  # below the threshold
        Freeness(1, 50.0, 0),  # free
        Freeness(2, -1.0, 0),  # the most loaded
        Freeness(3, inf, 0),  # empty: the least loaded
        Freeness(4, 3.0, 0),  # neither
        Freeness(5, 40.0, 1),  # has preempted: a source although it has room
    ]
    assert pair_groups(groups) == [(2, 3), (0, 1)]
    assert pair_groups(groups[4:]) == []
    assert pair_groups([groups[5], groups[1]]) == [(5, 1)]


def test_the_shortest_decoding_request_migrates() -> None:
    group = make_group()
    assert shortest_running(group) is None
    prefilling(group, "prompt", 2)
    assert shortest_running(group) is None
    decoding(group, "long", 9, 1)
    moving = decoding(group, "moving", 2, 1)
    moving.is_moving = True
    short = decoding(group, "short", 2, 2)
    assert shortest_running(group) is short


def test_the_last_priority_makes_room_first() -> None:
    group = make_group(num_blocks=7)  # all in use, and all three need one more
    for name, priority in (("a", 0), ("low", 5), ("b", 0)):
        decoding(group, name, 8, 1).priority = priority
    assert Recompute().victim(group, group.running[2]) is group.running[1]
    assert names(Swap().make_way(group, 0)) == ["low"]
    assert names(Retract().make_way(group, 0)) == ["low"]
