"""Prices of merges: seconds that requests wait."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve.planner.price import BUBBLE, LEAST_CHAIN_S, MOST_CHAIN_S, USUAL_S, Bubbles, Change, Shortage, Trend

blocks = st.floats(0, 1000)
slopes = st.floats(-100, 100).filter(lambda slope: slope == 0 or abs(slope) > 0.01)


@given(blocks, slopes, st.floats(0, 100), st.floats(1, 50), blocks)
def test_what_is_saved_is_the_shortage_that_the_blocks_cover_over_its_time(
    short: float, slope: float, lasted_s: float, per_request: float, added: float
) -> None:
    shortage = Shortage(short, slope, per_request, lasted_s)
    steps = 20_000
    width_s = shortage.rest_s / steps
    covered = sum(min(added, max(0.0, short + slope * (i + 0.5) * width_s)) * width_s for i in range(steps))
    expected = covered / per_request
    assert shortage.saved_s(added) == pytest.approx(expected, rel=1e-3, abs=1e-3 * (1 + short * width_s))


def test_a_shortage_goes_on_as_long_as_it_has_lasted_unless_it_ends_before() -> None:
    assert Shortage(10, 1.0, 1.0, 3.0).rest_s == USUAL_S
    assert Shortage(10, 1.0, 1.0, 2 * USUAL_S).rest_s == 2 * USUAL_S
    assert Shortage(10, -5.0, 1.0, 2 * USUAL_S).rest_s == 2.0
    assert Shortage(10, -1e-6, 1.0).rest_s == USUAL_S
    assert (
        Shortage(-50, -1.0, 1.0).rest_s == 0.0
    )  # there is none: nothing is saved, and a merge never costs less than 0


def test_more_blocks_never_save_less_and_none_save_more_than_what_waits() -> None:
    for slope in (-4.0, 0.0, 4.0):
        shortage = Shortage(100, slope, 10.0)
        saved = [shortage.saved_s(added) for added in (0, 10, 50, 100, 1000, 10_000)]
        assert saved == sorted(saved) and saved[0] == 0.0
        assert saved[-1] == pytest.approx(shortage.saved_s(1e9))


def test_a_chain_costs_pauses_once_and_bubbles_for_its_time() -> None:
    change = Change(num_requests=10, boundary_s=0.1, exchange_s=1.0, added_stages=1)
    assert change.cost_s(0.0) == pytest.approx(10 * (0.1 + 0.5))
    assert change.cost_s(100.0) - change.cost_s(0.0) == pytest.approx(10 * BUBBLE * 100)
    assert Change(0, 5.0, 5.0, 4).cost_s(100.0) == 0.0  # nobody runs there


def test_a_split_pays_back_once_the_bubbles_it_ends_outweigh_its_pause() -> None:
    change = Change(num_requests=10, boundary_s=0.1, exchange_s=1.0, added_stages=1)
    even_s = (0.1 + 0.5) / BUBBLE
    assert not change.pays_back_in(0.99 * even_s) and change.pays_back_in(1.01 * even_s)
    assert Change(10, 0.1, 1.0, added_stages=2).pays_back_in(0.51 * even_s)
    assert Change(0, 5.0, 5.0, 1).pays_back_in(0.0)  # nobody runs there


def test_a_trend_is_the_slope_of_its_window() -> None:
    trend = Trend(window_s=4.0, every_s=0.5)
    assert trend.is_due(0.0) and trend.per_s == 0.0
    for i in range(40):
        now_s = i / 2
        assert trend.is_due(now_s)
        trend.sample(now_s, 100.0 - 3 * now_s if now_s < 10 else 70.0 + 2 * (now_s - 10))
        assert not trend.is_due(now_s + 0.4)
        if now_s == 9.5:
            assert trend.per_s == pytest.approx(-3)
    assert trend.per_s == pytest.approx(2)  # what was before the window is forgotten


def test_what_chains_lose_is_assumed_until_it_has_been_seen() -> None:
    bubbles = Bubbles()
    assert bubbles.share == pytest.approx(BUBBLE)
    bubbles.learn(2, LEAST_CHAIN_S, 0.1 * LEAST_CHAIN_S)  # as long as what was assumed counts
    assert bubbles.share == pytest.approx((BUBBLE + 0.1) / 2)
    for _ in range(100):
        bubbles.learn(4, 20.0, 3 * 0.05 * 20.0)  # for each of three stages beyond the first
    assert bubbles.share == pytest.approx(0.05, rel=0.01)
    bubbles.learn(2, MOST_CHAIN_S, 0.0)  # what is new counts as much as all that was
    assert bubbles.share == pytest.approx(0.025, rel=0.01)
    for _ in range(10):
        bubbles.learn(2, MOST_CHAIN_S, 0.0)
    assert bubbles.share == BUBBLE  # chains are worth leaving even so


def test_a_chain_that_loses_more_costs_more_and_is_left_sooner() -> None:
    change, slow = Change(10, 0.1, 1.0, 1), Change(10, 0.1, 1.0, 1, bubble=5 * BUBBLE)
    assert slow.cost_s(100.0) - slow.cost_s(0.0) == pytest.approx(5 * (change.cost_s(100.0) - change.cost_s(0.0)))
    even_s = 0.6 / BUBBLE
    assert slow.pays_back_in(0.21 * even_s) and not change.pays_back_in(0.21 * even_s)
