"""The overload policies that can be simulated: the engine's own, and two more to compare with."""

from __future__ import annotations

from dataclasses import replace

from kunserve.config import EngineConfig
from kunserve.policies import OverloadPolicy

PIPELINE = "pipeline"  # chains of two from the start, and `recompute` on them
PLENTY = "plenty"  # `recompute` with memory that never runs out: what any policy could reach at best
POLICIES = (*OverloadPolicy, PIPELINE, PLENTY)
PLENTY_TIMES = 16  # how many times its memory each GPU has under `PLENTY`


def with_policy(config: EngineConfig, policy: str) -> EngineConfig:
    """Return the configuration for one of `POLICIES`."""
    if policy == PIPELINE:
        return replace(config, overload_policy=OverloadPolicy.RECOMPUTE, pipeline_parallel_size=2)
    if policy == PLENTY:
        return replace(config, overload_policy=OverloadPolicy.RECOMPUTE)
    return replace(config, overload_policy=OverloadPolicy(policy))
