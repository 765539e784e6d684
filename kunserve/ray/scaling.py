"""How many replicas there are: so many that their KV would hold what is asked of them without any drop.

Ongoing requests say little: a replica that has dropped weights runs more of them than it could otherwise, and looks
less full (KV usage falls when the pools grow). `kunserve:demand_over_undropped` has the queue and what running requests
will still grow by, over the capacity without drops: a drop buys the time in which another replica starts.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

DEMAND = "demand_over_undropped"
TARGET = 0.8  # of a replica's undropped capacity, in use
SLACK = 0.15  # of the target, that demand must fall below it before a replica goes


def wanted(demands: list[float], num_running: int, num_asked: int, target: float = TARGET) -> int:
    """Return how many replicas `demands` ask for, each a share of one replica's undropped capacity; all are alike.

    Of the `num_running` replicas, those that tell no demand count with the mean of the others. Without any demand it is
    `num_asked`: the replicas asked for so far, some of which may still start.
    """
    if not demands:
        return num_asked
    total = sum(demands) / len(demands) * max(num_running, len(demands))
    up, down = ceil(total / target), ceil(total / (target * (1 - SLACK)))
    return max(up, 1) if up > num_asked else min(num_asked, max(down, 1))


def by_demand(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Return the number of replicas, as Serve's autoscaler asks for it (an autoscaling policy)."""
    demands = list((context.aggregated_metrics or {}).get(DEMAND, {}).values())
    number = wanted(demands, context.current_num_replicas, context.target_num_replicas)
    bounds = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(bounds[0], min(number, bounds[1])), {}
