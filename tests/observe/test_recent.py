from __future__ import annotations

import pytest

from kunserve.observe.recent import HISTORY, NUM_PROMPTS, Recent


def test_first_tokens_of_the_last_seconds() -> None:
    recent = Recent()
    for at_s, ttft_s in ((1.0, 9.0), (2.0, 0.5), (3.0, 0.1)):
        recent.first_token(at_s, ttft_s)
    assert recent.ttfts(2.0) == [0.1, 0.5]
    assert recent.ttfts(4.0) == []
    assert recent.last_first_token_s == 3.0
    for i in range(2 * HISTORY):
        recent.first_token(5.0, float(i))
    assert len(recent.ttfts(0.0)) == HISTORY


def test_before_the_first_token_there_is_no_last_one() -> None:
    assert Recent().last_first_token_s is None


def test_the_longest_gap_is_told_once() -> None:
    recent = Recent()
    recent.gap_s = 0.5
    assert recent.take_gap() == 0.5
    assert recent.take_gap() == 0.0


def test_the_share_that_the_prefix_cache_had_is_that_of_the_newest_prompts() -> None:
    recent = Recent()
    assert Recent().prefix_hit_rate is None
    recent.prompt(1000, 0)
    assert recent.prefix_hit_rate == 0.0
    recent.prompt(1000, 500)
    assert recent.prefix_hit_rate == 0.25
    for _ in range(NUM_PROMPTS - 1):
        recent.prompt(10, 9)
    assert recent.prefix_hit_rate == pytest.approx((500 + 9 * (NUM_PROMPTS - 1)) / (1000 + 10 * (NUM_PROMPTS - 1)))
    recent.prompt(10, 9)
    assert recent.prefix_hit_rate == 0.9
