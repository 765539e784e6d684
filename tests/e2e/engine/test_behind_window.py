"""Blocks behind a window that all layers have are let go, and nothing else changes: under every policy, to the bit."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from e2e.engines import assert_idle, generate_all, greedy, running_engine
from e2e.tiny import TinyModels, random_prompt
from kunserve.engine.engine import Engine
from kunserve.model.config import ModelConfig
from kunserve.policies import OverloadPolicy
from kunserve.sizes import ceil_div

IS_WHOLE = bool(os.environ.get("KUNSERVE_ALL_MODELS"))
WINDOW, BLOCK, NUM_TOKENS = 50, 16, 150
POSITIONS = {"max_position_embeddings": 1024}
MOST_HELD = ceil_div(WINDOW + BLOCK, BLOCK) + 1  # of a request that decodes: its window, a block begun at either end
SHARED = random_prompt(130, seed=9)
PROMPTS = [random_prompt(n, seed=n) for n in (5, 40, 70, 130)] + [[*SHARED, 7 + i] for i in range(3)]


@pytest.fixture(scope="module")
def folder(tiny_models: TinyModels) -> Path:
    return tiny_models.folder("mistral-window", **POSITIONS)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    """What is generated where everything is kept."""

    async def generated() -> list[list[int]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ModelConfig, "common_window", None)
            async with running_engine(folder, num_blocks_override=256, enable_prefix_caching=False) as served:
                return await generate_all(served.engine, PROMPTS, greedy(NUM_TOKENS))

    return asyncio.run(generated())


async def most_held(engine: Engine) -> int:
    """Return the most blocks that a request holds which has generated half of its tokens; runs until cancelled."""
    most = 0
    try:
        while True:
            await engine.signals.next_commit()
            engine.check()
            running = [r for group in engine.groups for r in group.running if not r.is_moving]
            most = max([most, *(r.num_blocks for r in running if r.num_output_tokens > NUM_TOKENS // 2)])
    except asyncio.CancelledError:
        return most


@pytest.mark.parametrize("policy", OverloadPolicy if IS_WHOLE else [OverloadPolicy.SWAP, OverloadPolicy.MIGRATE])
async def test_nothing_changes(policy: OverloadPolicy, folder: Path, expected: list[list[int]]) -> None:
    """With memory for hardly more than two of the seven prompts, so that they are preempted, swapped, moved."""
    settings: dict[str, Any] = {"num_blocks_override": 20, "overload_policy": policy, "max_model_len": 320}
    async with running_engine(folder, "cpu:2", max_num_batched_tokens=64, **settings) as served:
        watcher = asyncio.create_task(most_held(served.engine))
        for _ in range(2):  # the second time with what the first has left in the cache
            assert await generate_all(served.engine, PROMPTS, greedy(NUM_TOKENS)) == expected
        watcher.cancel()
        assert 0 < await watcher <= MOST_HELD
        await assert_idle(served.engine)


async def test_across_a_drop_and_a_restore(folder: Path, expected: list[list[int]]) -> None:
    async with running_engine(folder, "cpu:2", is_pinned=True, num_blocks_override=128) as served:
        engine, control = served.engine, served.control
        answers = asyncio.create_task(generate_all(engine, PROMPTS * 2, greedy(NUM_TOKENS)))
        for change in (engine.drop, engine.restore) * 2:
            for _ in range(25):  # most have let go of something
                await engine.signals.next_commit()
            await change()
            assert engine.num_running
            await asyncio.wait(control.tasks)
            engine.check()
        assert await answers == expected * 2
        await assert_idle(engine)


async def test_more_requests_run_at_once(folder: Path) -> None:
    """Ten streams in the blocks of four."""
    num_blocks, num_tokens = 60, 240
    assert 10 * num_tokens // BLOCK > 2 * num_blocks
    async with running_engine(folder, num_blocks_override=num_blocks, max_model_len=320) as served:
        await generate_all(served.engine, [random_prompt(10, seed=i) for i in range(10)], greedy(num_tokens))
        assert served.engine.scheduler.num_preemptions == 0
        await assert_idle(served.engine)
