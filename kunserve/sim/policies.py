"""The overload policies that can be simulated: the engine's own, and one more to compare with."""

from __future__ import annotations

from dataclasses import replace

from kunserve.config import EngineConfig
from kunserve.policies import OverloadPolicy

PIPELINE = "pipeline"  # chains of two from the start, requests recomputed: not a policy of the engine
POLICIES = (*OverloadPolicy, PIPELINE)


def with_policy(config: EngineConfig, policy: str) -> EngineConfig:
    """Return the configuration for one of `POLICIES`."""
    if policy == PIPELINE:
        return replace(config, overload_policy=OverloadPolicy.RECOMPUTE, pipeline_parallel_size=2)
    return replace(config, overload_policy=OverloadPolicy(policy))
