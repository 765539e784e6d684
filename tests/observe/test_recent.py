from __future__ import annotations

from kunserve.observe.recent import HISTORY, Recent, quantile


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


def test_quantiles() -> None:
    ascending = [float(i) for i in range(100)]
    assert (quantile(ascending, 0.5), quantile(ascending, 0.99)) == (50.0, 99.0)
    assert quantile([1.0], 0.99) == quantile([1.0], 0.0) == 1.0
