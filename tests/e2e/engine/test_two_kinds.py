"""Where only some layers have a window their KV is freed behind it, and nothing else changes, to the bit."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

import pytest

from e2e.engines import assert_idle, generate_all, greedy, running_engine
from e2e.tiny import TinyModels, random_prompt
from kunserve.engine.engine import Engine
from kunserve.engine.kinds.mixed_group import MixedGroup
from kunserve.errors import ConflictError
from kunserve.policies import OverloadPolicy

IS_WHOLE = bool(os.environ.get("KUNSERVE_ALL_MODELS"))
FAMILIES = ("gemma2", "gemma3", "gpt-oss", "qwen2-window")
POLICIES = tuple(OverloadPolicy)
# One family for each policy in a usual run, each of them at least once.
CASES = [
    (family, policy)
    for i, policy in enumerate(POLICIES)
    for j, family in enumerate(FAMILIES)
    if IS_WHOLE or i % len(FAMILIES) == j
]
# Family, prefix cache, blocks of a device, and how KV follows its layers when groups merge that are as full as that.
TRANSITIONS = [
    ("gemma2", True, 128, "by_request"),
    ("gemma2", False, 48, "by_layer"),
    ("gemma3", True, 48, "by_layer"),
    ("gpt-oss", False, 128, "by_request"),
    ("qwen2-window", True, 128, "by_request"),
]
NUM_TOKENS = 150
# So many layers that half of a chain has a half of either kind.
SHAPE: dict[str, Any] = {
    "max_position_embeddings": 1024,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
SHAPES = {family: SHAPE | ({"num_hidden_layers": 6} if family == "gemma3" else {}) for family in FAMILIES}
SHARED = random_prompt(130, seed=9)
PROMPTS = [random_prompt(n, seed=n) for n in (5, 40, 70, 130)] + [[*SHARED, 7 + i] for i in range(3)]
# Chunks of four blocks: that of windows is told apart from that of all tokens.
KINDS: dict[str, Any] = {"windowed_kv_share": 0.3, "chunk_bytes": 64 << 10, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def expected(tiny_models: TinyModels) -> dict[str, list[list[int]]]:
    """What is generated where KV is of one kind, and everything is kept."""

    async def generated(family: str) -> list[list[int]]:
        folder = tiny_models.folder(family, **SHAPES[family])
        async with running_engine(folder, num_blocks_override=256, enable_prefix_caching=False) as served:
            assert served.engine.fleet.num_kinds == 1
            return await generate_all(served.engine, PROMPTS, greedy(NUM_TOKENS))

    return {family: asyncio.run(generated(family)) for family in FAMILIES}


def is_bounded(engine: Engine) -> bool:
    """Whether no request that decodes holds more near blocks than its window needs; all layers keep what they need."""
    for group in engine.groups:
        assert isinstance(group, MixedGroup)
        for request in group.running:
            near = request.table.near
            if not request.is_moving and near is not None and request.num_tokens - request.num_computed_tokens <= 1:
                assert len(near.blocks) <= group.near_blocks_for(max(request.num_tokens, request.num_scheduled_tokens))
                assert request.table.num_behind == 0
    return True


async def watch(engine: Engine) -> None:
    while True:
        await engine.signals.next_commit()
        engine.check()
        assert is_bounded(engine)


@pytest.mark.parametrize(("family", "policy"), CASES)
@pytest.mark.parametrize("has_cache", [True, False], ids=["cached", "uncached"])
async def test_nothing_changes(
    family: str, policy: OverloadPolicy, has_cache: bool, tiny_models: TinyModels, expected: dict[str, list[list[int]]]
) -> None:
    """With memory for hardly more than two of the seven prompts, so that they are preempted, swapped, moved."""
    settings: dict[str, Any] = {"num_blocks_override": 20, "overload_policy": policy, "max_model_len": 320}
    folder = tiny_models.folder(family, **SHAPES[family])
    async with running_engine(folder, "cpu:2", enable_prefix_caching=has_cache, **KINDS, **settings) as served:
        assert served.engine.fleet.num_kinds == 2
        watcher = asyncio.create_task(watch(served.engine))
        for _ in range(2):  # the second time with what the first has left in the cache
            assert await generate_all(served.engine, PROMPTS, greedy(NUM_TOKENS)) == expected[family]
        assert not watcher.done(), watcher.exception()
        watcher.cancel()
        await assert_idle(served.engine)


@pytest.mark.parametrize(("family", "has_cache", "num_blocks", "mode"), TRANSITIONS)
async def test_across_a_drop_and_a_restore(
    family: str,
    has_cache: bool,
    num_blocks: int,
    mode: str,
    tiny_models: TinyModels,
    expected: dict[str, list[list[int]]],
) -> None:
    """A restore comes as soon as what the chain holds fits without it."""
    folder = tiny_models.folder(family, **SHAPES[family])
    settings: dict[str, Any] = {"is_pinned": True, "num_blocks_override": num_blocks, "max_model_len": 320}
    async with running_engine(folder, "cpu:2", enable_prefix_caching=has_cache, **KINDS, **settings) as served:
        engine, control = served.engine, served.control
        answers = asyncio.create_task(generate_all(engine, PROMPTS * 2, greedy(NUM_TOKENS)))
        for _ in range(40):  # most have let go of something
            await engine.signals.next_commit()
        await engine.drop(is_forced=True)
        await asyncio.wait(control.tasks)
        engine.check()
        assert control.reconfigure.transitions.remembered[-1].exchange_mode == mode
        while len(engine.groups) == 1:
            await engine.signals.next_commit()
            with contextlib.suppress(ConflictError):
                await engine.restore()
        assert engine.num_running
        await asyncio.wait(control.tasks)
        engine.check()
        assert await answers == expected[family] * 2
        await assert_idle(engine)


async def test_more_long_requests_run_at_once(tiny_models: TinyModels) -> None:
    """Ten streams in the memory of five: nobody makes way, where with one kind of KV somebody has to."""
    folder, preempted = tiny_models.folder("gemma3", **SHAPES["gemma3"]), list[int]()
    for kinds in (KINDS, KINDS | {"windowed_kv_share": 1.0}):
        async with running_engine(folder, num_blocks_override=88, max_model_len=320, **kinds) as served:
            prompts = [random_prompt(10, seed=i) for i in range(10)]
            await generate_all(served.engine, prompts, greedy(240))
            preempted.append(served.engine.scheduler.num_preemptions + served.engine.scheduler.swapped.num_swaps)
            await assert_idle(served.engine)
    assert preempted[0] == 0 < preempted[1]
