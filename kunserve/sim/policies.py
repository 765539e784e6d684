"""The overload policies that can be simulated: the engine's own, and three more to compare with."""

from __future__ import annotations

from dataclasses import replace

from kunserve.config import EngineConfig
from kunserve.policies import OverloadPolicy

PIPELINE = "pipeline"  # chains of two from the start, and `recompute` on them
PLENTY = "plenty"  # `recompute` with memory that never runs out: what any policy could reach at best
VLLM = "vllm-0.6.3"  # as it was published: a queue for each copy of the weights, prompts first (published.py)
POLICIES = (*OverloadPolicy, PIPELINE, PLENTY, VLLM)
PLENTY_TIMES = 16  # how many times its memory each GPU has under `PLENTY`


def with_policy(config: EngineConfig, policy: str) -> EngineConfig:
    """Return the configuration for one of `POLICIES`, but for what `VLLM` schedules with."""
    if policy == PIPELINE:
        return replace(config, overload_policy=OverloadPolicy.RECOMPUTE, pipeline_parallel_size=2)
    if policy in (PLENTY, VLLM):
        return replace(config, overload_policy=OverloadPolicy.RECOMPUTE)
    return replace(config, overload_policy=OverloadPolicy(policy))
