"""The names of the overload policies. What each does is in `engine/schedule/policy.py`."""

from __future__ import annotations

import enum


class OverloadPolicy(enum.StrEnum):
    """Values of `--overload-policy`."""

    DROP = "drop"
    RECOMPUTE = "recompute"
    RETRACT = "retract"
    SWAP = "swap"
    MIGRATE = "migrate"
    QUEUE = "queue"
