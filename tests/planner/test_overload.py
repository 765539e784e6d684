from __future__ import annotations

import pytest

from kunserve.planner.demand import RequestView
from kunserve.planner.overload import GroupLoad, Relaxation, Thresholds, growth, is_overloaded, surely_freed

THRESHOLDS = Thresholds(drop_watermark=0.95, restore_watermark=0.5, hold_s=5.0, horizon_steps=16, patience_steps=4)
LONG = RequestView(num_tokens=160, num_output_tokens=20, max_tokens=500, num_blocks=10)
ENDING = RequestView(num_tokens=156, num_output_tokens=496, max_tokens=500, num_blocks=10)


def overloaded(
    head: int | None, groups: list[GroupLoad], demand: int = 600, mapped: int = 512, waiting: int | None = None
) -> bool:
    waiting = waiting or head or 0
    return is_overloaded(head, waiting, groups, lambda: groups, lambda: demand, mapped, THRESHOLDS, block_size=16)


def test_head_that_fits_nowhere_under_high_demand() -> None:
    assert overloaded(5, [GroupLoad(4, [LONG]), GroupLoad(0, [LONG])])


def test_nothing_waits() -> None:
    assert not overloaded(None, [GroupLoad(0, [ENDING])])


def test_head_fits_somewhere() -> None:
    assert not overloaded(5, [GroupLoad(4, [LONG]), GroupLoad(5, [LONG])])


@pytest.mark.parametrize(("demand", "expected"), [(486, False), (487, True)])
def test_watermark_of_what_is_mapped(demand: int, expected: bool) -> None:
    assert overloaded(5, [GroupLoad(4, [LONG])], demand=demand) is expected  # 0.95 * 512 = 486.4


def test_running_requests_free_enough_soon() -> None:
    assert not overloaded(10, [GroupLoad(0, []), GroupLoad(1, [LONG, ENDING])])


def test_what_is_freed_must_be_enough_in_one_group() -> None:
    assert overloaded(12, [GroupLoad(1, [ENDING]), GroupLoad(1, [ENDING])])


def test_growth_of_the_others_is_not_free() -> None:
    assert surely_freed([ENDING, LONG, LONG], 4, 16) == 10 - 2
    assert overloaded(11, [GroupLoad(2, [ENDING, LONG, LONG])])
    assert not overloaded(10, [GroupLoad(2, [ENDING, LONG, LONG])])


def test_what_comes_free_soon_must_be_enough_for_all_that_wait() -> None:
    groups = [GroupLoad(2, [ENDING, LONG, LONG])] * 2  # ten blocks soon, each
    assert not overloaded(10, groups, waiting=20)
    assert overloaded(10, groups, waiting=21)


def test_growth_is_counted_before_anybody_ends() -> None:
    assert growth([LONG, LONG], 16, 16) == 2
    assert growth([ENDING], 16, 16) == 0  # four tokens more fit into its last block
    assert overloaded(None, [GroupLoad(1, [ENDING, LONG, LONG])])
    assert not overloaded(None, [GroupLoad(2, [ENDING, LONG, LONG])])


def test_one_full_group_is_no_overload_while_others_have_room() -> None:
    full = GroupLoad(1, [ENDING, LONG, LONG])  # a block too few
    assert not overloaded(None, [full, GroupLoad(9, [])])
    assert not overloaded(None, [full, GroupLoad(3, [LONG, LONG])])
    assert overloaded(None, [full, GroupLoad(2, [LONG, LONG])])  # none of what it lacks


def test_relaxed_only_after_the_hold_time() -> None:
    state = Relaxation().observed(10.0, 100, 512, THRESHOLDS)
    assert not state.is_over(14.9, THRESHOLDS)
    state = state.observed(14.9, 255, 512, THRESHOLDS)
    assert state.is_over(15.0, THRESHOLDS)


@pytest.mark.parametrize("demand", [256, 400])
def test_a_busy_moment_starts_the_hold_time_again(demand: int) -> None:
    state = Relaxation().observed(10.0, 100, 512, THRESHOLDS).observed(14.0, demand, 512, THRESHOLDS)
    assert not state.is_over(99.0, THRESHOLDS)
    state = state.observed(14.5, 100, 512, THRESHOLDS)
    assert not state.is_over(19.4, THRESHOLDS)
    assert state.is_over(19.5, THRESHOLDS)


def test_what_a_drop_adds_does_not_undo_it() -> None:
    """Just over the drop's watermark of 512 blocks: the demand is not low, however much is mapped now."""
    demand = 487
    assert overloaded(5, [GroupLoad(0, [])], demand)
    assert not Relaxation().observed(0.0, demand, 512, THRESHOLDS).is_over(1e9, THRESHOLDS)


def test_running_requests_that_outgrow_their_group_overload_it_though_nothing_waits() -> None:
    growing = [RequestView(num_tokens=64, num_output_tokens=0, max_tokens=500, num_blocks=4)] * 10
    assert overloaded(None, [GroupLoad(9, growing)], 300, 100)  # 10 blocks in 16 steps
    assert not overloaded(None, [GroupLoad(10, growing)], 300, 100)
    assert not overloaded(None, [GroupLoad(9, growing)], 90, 100)
