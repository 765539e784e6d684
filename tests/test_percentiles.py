from __future__ import annotations

import pytest

from kunserve.percentiles import percentiles, quantile


def test_percentiles() -> None:
    values = percentiles([float(i) for i in range(1001)])
    assert values == {
        "mean": 500.0,
        "p50": 500.0,
        "p90": 900.0,
        "p99": 990.0,
        "p99.9": pytest.approx(999.0),
        "max": 1000.0,
    }
    assert set(percentiles([2.0]).values()) == {2.0}
    assert set(percentiles([]).values()) == {None}


def test_quantiles() -> None:
    ascending = [float(i) for i in range(100)]
    assert (quantile(ascending, 0.5), quantile(ascending, 0.99)) == (50.0, 99.0)
    assert quantile([1.0], 0.99) == quantile([1.0], 0.0) == 1.0
