"""Moving averages."""

from __future__ import annotations

import pytest

from kunserve.averages import smooth


def test_the_first_measurement_counts_whole_and_old_ones_are_forgotten() -> None:
    average = smooth(None, 100.0)
    assert average == 100.0
    for _ in range(40):
        before, average = average, smooth(average, 4.0)
        assert 4.0 < average < before
    assert average == pytest.approx(4.0, abs=0.05)
