"""Groups, requests and schedulers without any device, and what the engine does after a step."""

from __future__ import annotations

import random

import torch

from kunserve.engine.batch import Microbatch
from kunserve.engine.blocks.block_pool import BlockPool
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group, Stage
from kunserve.engine.launch.placement import model_shape
from kunserve.engine.request import Request
from kunserve.engine.schedule.policy import make_policy
from kunserve.engine.schedule.scheduler import Scheduler, SchedulerLimits
from kunserve.gpu.kv_memory import KVShape
from kunserve.model.card import load_card
from kunserve.planner.snapshot import DeviceView, ModelShape
from kunserve.policies import OverloadPolicy
from kunserve.sampling import FinishReason, SamplingParams

LAYERS = 8


def shape_of(card: str, dtype: torch.dtype = torch.bfloat16, chunk_bytes: int = 2 << 20) -> ModelShape:
    """The sizes of a card's model, with blocks of 16 tokens."""
    config = load_card(card).config
    return model_shape(config, KVShape.of(config, 16, dtype), chunk_bytes)


def views(num_devices: int, budget_bytes: float, shape: ModelShape) -> list[DeviceView]:
    """Devices that are all alike."""
    return [DeviceView(i, int(budget_bytes) // shape.chunk_bytes) for i in range(num_devices)]


def make_group(group_id: int = 0, num_stages: int = 1, num_blocks: int = 16, block_size: int = 4) -> Group:
    per_stage = LAYERS // num_stages
    stages = [
        Stage(10 * group_id + i, i * per_stage, (i + 1) * per_stage, BlockPool(num_blocks + i))
        for i in range(num_stages)
    ]
    return Group(group_id, tuple(stages), block_size)


def make_request(name: str, num_prompt: int, max_tokens: int) -> Request:
    request = Request(name, list(range(1, num_prompt + 1)), SamplingParams(max_tokens=max_tokens, temperature=0))
    request.max_num_tokens = num_prompt + max_tokens
    return request


def make_scheduler(
    *groups: Group,
    policy: OverloadPolicy = OverloadPolicy.RECOMPUTE,
    budget: int = 12,
    watermark: float = 0,
    num_host_blocks: int = 0,
    num_ahead: int = 0,
) -> Scheduler:
    limits = SchedulerLimits(max_num_batched_tokens=budget, max_num_seqs=64, num_ahead=num_ahead)
    return Scheduler(Fleet(groups), limits, make_policy(policy, watermark), num_host_blocks)


def commit(scheduler: Scheduler, group: Group, batch: Microbatch, stops: float = 0.0) -> list[Request]:
    """What the engine does after a step, with token ids that do not matter; returns who finished.

    `stops`: how many tokens end their request, which nobody could know before.
    """
    scheduler.commit(group, batch)
    finished = []
    for span in batch.spans:
        request = span.request
        if span.samples and request.finish_reason is None:
            request.token_ids.append(7)
            assert request.num_tokens <= request.max_num_tokens
            if request.num_tokens == request.max_num_tokens or random.Random(request.num_tokens).random() < stops:
                request.finish_reason = FinishReason.LENGTH
                finished.append(request)
        if request.finish_reason is not None and request.num_in_flight == 0:
            scheduler.fleet.release(request)
    return finished


def check(groups: list[Group]) -> None:
    for group in groups:
        group.check(LAYERS)
        for i, stage in enumerate(group.stages):
            stage.pool.check([r.block_tables[i] for r in group.running if r.block_tables])
