from __future__ import annotations

from contextlib import suppress

import pytest

from kunserve.engine.occupancy import Occupancy, Passage


def test_a_stage_without_work_while_its_chain_has_some_is_a_bubble() -> None:
    occupancy = Occupancy(2)
    occupancy.enter(0, 10.0)
    occupancy.leave(0, 12.0)
    occupancy.enter(1, 12.0)
    occupancy.enter(0, 12.5)  # the second microbatch comes late
    occupancy.leave(0, 13.0)
    occupancy.enter(1, 13.0)  # and waits for the first
    occupancy.leave(1, 14.0)
    occupancy.leave(1, 15.0)
    assert occupancy.busy_s(15.0) == (2.5, 3.0)
    assert occupancy.active_s(15.0) == 5.0
    assert occupancy.bubble_share(15.0) == pytest.approx(1 - 5.5 / 10)


def test_an_idle_chain_has_no_bubbles() -> None:
    occupancy = Occupancy(3)
    assert occupancy.bubble_share(5.0) == 0.0
    occupancy.enter(0, 7.0)
    occupancy.leave(0, 8.0)
    share = occupancy.bubble_share(8.0)
    assert occupancy.bubble_share(100.0) == share == pytest.approx(2 / 3)


def test_a_microbatch_is_work_of_a_stage_while_it_is_there() -> None:
    now_s = 1.0
    occupancy = Occupancy(2)
    passage = Passage(occupancy, lambda: now_s)
    with passage.at(0):
        now_s = 3.0
        assert occupancy.counts == (1, 0)
    with pytest.raises(AssertionError, match=r"stages \[1\]"):
        passage.check()
    with suppress(ValueError), passage.at(1):
        now_s = 4.0
        raise ValueError
    passage.check()
    assert occupancy.counts == (0, 0) and occupancy.busy_s(9.0) == (2.0, 1.0) and occupancy.active_s(9.0) == 3.0


def test_work_in_progress_counts() -> None:
    occupancy = Occupancy(1)
    occupancy.enter(0, 1.0)
    assert occupancy.busy_s(4.0) == (3.0,) and occupancy.bubble_share(4.0) == 0.0


def test_a_chain_waits_only_where_it_has_enough_to_do() -> None:
    occupancy = Occupancy(2)
    occupancy.enter(0, 1.0)  # one microbatch for two stages: nothing is lost
    occupancy.enter(0, 2.0)  # enough, and both at the first stage
    occupancy.leave(0, 5.0)
    occupancy.enter(1, 5.0)
    assert occupancy.take_waiting(7.0) == (2 * 5.0, 3.0)
    occupancy.leave(1, 8.0)  # again one
    assert occupancy.take_waiting(20.0) == (2 * 1.0, 0.0)
    assert occupancy.take_waiting(30.0) == (0.0, 0.0)
