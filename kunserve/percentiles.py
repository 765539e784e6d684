"""Sum up many times in a few figures: what the load generator and the simulation report of each kind of time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PERCENTILES = (50.0, 90.0, 99.0, 99.9)


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean, p50, p90, p99, p99.9 (linear between ranks) and max; None where there are no values."""
    names = ("mean", *(f"p{p:g}" for p in PERCENTILES), "max")
    if not values:
        return dict.fromkeys(names)
    array = np.asarray(values)
    found = (array.mean(), *np.percentile(array, PERCENTILES), array.max())
    return dict(zip(names, map(float, found), strict=True))


def quantile(ascending: Sequence[float], q: float) -> float:
    """Return the value below which a share `q` of a sorted, non-empty list lies (nearest rank)."""
    return ascending[min(len(ascending) - 1, int(q * len(ascending)))]
