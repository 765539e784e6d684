"""How many servers an autoscaler wants: the arithmetic of Kubernetes' HPA, which KEDA drives. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LOOK_EVERY_S = 15.0  # between two looks at the metric: the HPA's period
TOLERANCE = 0.1  # share by which the metric has to miss its target before anything is changed: the HPA's default


@dataclass(frozen=True, slots=True)
class Scaler:
    """Starts servers while `kunserve:demand_over_undropped` asks for them.

    It never stops one: the HPA waits five minutes before it does, which is longer than the bursts that are looked at.
    """

    target: float  # of the gauge, for each server
    start_s: float  # until a new server takes requests
    most: int

    def num_wanted(self, demands: Sequence[float], num_started: int) -> int:
        """Return how many servers there should be, from the gauge of each that serves.

        `num_started` counts those that do not serve yet as well: they have been asked for.
        """
        ratio = sum(demands) / (self.target * len(demands))
        if ratio <= 1 + TOLERANCE:
            return num_started
        # A millionth: 1.2 / 0.4 is three servers, although it is a little more than 3 in binary.
        return max(num_started, min(self.most, math.ceil(sum(demands) / self.target - 1e-6)))
