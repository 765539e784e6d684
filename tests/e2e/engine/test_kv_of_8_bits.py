"""KV of 8 bits on GPUs that are not there: tokens are those of attention over rounded KV, whatever moves underneath."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpus import Gpus
from torch import Tensor
from transition_harness import patient_with_sound_devices

from e2e.engine.test_two_kinds_on_gpus import serving, settled
from e2e.engines import assert_idle, generate, generate_all, greedy
from e2e.tiny import TinyModels, random_prompt
from e2e.two_kinds import SHAPE
from kunserve.compute import torch_ops
from kunserve.engine.survive import health
from kunserve.gpu.kv_memory import E4M3
from kunserve.policies import OverloadPolicy

PROMPTS = [random_prompt(n, seed=n) for n in (5, 40, 130)] + [[*random_prompt(90, seed=9), 7 + i] for i in range(2)]
NUM_TOKENS = 40


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wait for GPUs whose arithmetic is the reference's: none of them is ill."""
    monkeypatch.setattr(health, "STEP_FLOOR_S", 60.0)
    with patient_with_sound_devices(lambda _: False):
        yield


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What 8 bits keep, in as many bits as KV has."""
    return x.clamp(-448, 448).to(E4M3).to(dtype)


async def alone(folder: Path, **settings: Any) -> list[list[int]]:
    """What each prompt is answered by itself, where KV has 32 bits unless `settings` say otherwise."""
    settings = {"num_blocks_override": 256, "windowed_kv_share": 1.0, "enable_prefix_caching": False} | settings
    async with serving(folder, "cuda:0", **settings) as served:
        return [await generate(served.engine, prompt, greedy(NUM_TOKENS)) for prompt in PROMPTS]


def with_rounded_kv(folder: Path) -> list[list[int]]:
    """What is generated if keys and values of 32 bits are rounded before they are kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_ops, "as_kv", rounded)
        return asyncio.run(alone(folder))


def dtypes_of_kv(served: Any) -> set[torch.dtype]:
    return {layer.dtype for memory in served.engine.memories for layer in memory.kv.layers}


@pytest.mark.parametrize(
    ("family", "are_peers"), [("llama", True), ("llama", False), ("gpt-oss", False), ("gemma2", True)]
)
def test_tokens_are_those_of_rounded_kv_alone_together_and_through_regroupings(
    family: str, are_peers: bool, gpus: Gpus, tiny_models: TinyModels, request: pytest.FixtureRequest
) -> None:
    """Of captured steps whose work waits in streams, on two GPUs that reach each other or do not."""
    folder = tiny_models.folder(family, **SHAPE)  # gpt-oss has sinks and windows, gemma2 soft caps and windows
    gpus.granularity = 64 << 10
    expected = with_rounded_kv(folder)
    if family != "gemma2":  # its answers say one token again and again
        assert expected != asyncio.run(alone(folder))  # so few bits are seen
    assert expected == asyncio.run(alone(folder, kv_cache_dtype="fp8_e4m3"))
    request.getfixturevalue("kernels")
    gpus.count, gpus.are_async, gpus.are_peers = 2, True, are_peers

    async def serve() -> None:
        async with serving(folder, kv_cache_dtype="fp8") as served:
            engine = served.engine
            assert dtypes_of_kv(served) == {E4M3}
            answers = asyncio.create_task(generate_all(engine, PROMPTS, greedy(NUM_TOKENS)))
            for change in (engine.drop, engine.restore):
                for _ in range(8):
                    await engine.signals.next_commit()
                assert engine.num_running
                await change()
                await settled(served)
            assert await answers == expected
            moved = [t.exchange_mode for t in served.control.reconfigure.transitions.remembered if t.kind == "drop"]
            assert moved == ["by_request"]
            assert await generate_all(engine, PROMPTS, greedy(NUM_TOKENS)) == expected  # with what the cache has
            await assert_idle(engine)

    asyncio.run(serve())


@pytest.mark.parametrize("policy", [OverloadPolicy.SWAP, OverloadPolicy.RECOMPUTE])
def test_what_makes_way_to_the_host_or_is_computed_again_changes_nothing(
    policy: OverloadPolicy, gpus: Gpus, tiny_models: TinyModels
) -> None:
    folder = tiny_models.folder("llama", **SHAPE)
    gpus.granularity = 64 << 10
    expected = with_rounded_kv(folder)

    async def serve() -> None:
        settings: dict[str, Any] = {
            "num_blocks_override": 20,
            "overload_policy": policy,
            "enable_prefix_caching": False,
        }
        async with serving(folder, "cuda:0", kv_cache_dtype="fp8", **settings) as served:
            assert await generate_all(served.engine, PROMPTS, greedy(NUM_TOKENS)) == expected
            scheduler = served.engine.scheduler
            made_way = scheduler.swapped.num_swaps if policy is OverloadPolicy.SWAP else scheduler.num_preemptions
            assert made_way > 0
            await assert_idle(served.engine)

    asyncio.run(serve())


@pytest.mark.usefixtures("kernels")
def test_the_same_memory_holds_twice_as_many_tokens(gpus: Gpus, tiny_models: TinyModels) -> None:
    folder = tiny_models.folder("llama", num_attention_heads=8, num_key_value_heads=8, head_dim=64)
    gpus.granularity = 64 << 10
    tokens, host_blocks = [], []

    async def serve(dtype: str) -> None:
        settings: dict[str, Any] = {"dtype": "bfloat16", "num_blocks_override": None, "kv_bytes": 24 << 20}
        async with serving(folder, "cuda:0", kv_cache_dtype=dtype, **settings) as served:
            memory = served.engine.memories[0]
            assert memory.weights.tensor("layers.0", "model.layers.0.input_layernorm.weight").dtype is torch.bfloat16
            assert memory.kv.shape.block_bytes == served.control.reconfigure.remap.shape.kv_block_bytes
            tokens.append(served.engine.groups[0].num_blocks * 16)
            host_blocks.append(served.engine.scheduler.swapped.num_blocks)
            assert len(await generate(served.engine, PROMPTS[1], greedy(5))) == 5

    for dtype in ("auto", "bfloat16", "fp8"):
        asyncio.run(serve(dtype))
    assert tokens[0] == tokens[1] and tokens[2] == 2 * tokens[0] and host_blocks[2] // 2 == host_blocks[0]
