"""A moving average of what is measured again and again, and changes slowly."""

from __future__ import annotations

SMOOTHING = 0.2  # weight of the newest measurement


def smooth(average: float | None, measured: float) -> float:
    """Return the average after one more measurement; None: it is the first."""
    return measured if average is None else average + SMOOTHING * (measured - average)
