"""KV of 16 bits on CPU devices: half the bytes, and the same answers whatever is beside them and whatever regroups."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from transition_harness import Answer, again, answer_while, checked_engine, make_requests, regroup_in_order

from e2e.engines import assert_idle, generate, generate_all, greedy, running_engine
from e2e.tiny import TinyModels, random_prompt
from kunserve.config import EngineConfig, parse_devices
from kunserve.engine.launch.host_machine import HostMachine
from kunserve.engine.survive import health
from kunserve.errors import ConfigError
from kunserve.model.hf_config import load_hf_config
from kunserve.policies import OverloadPolicy

DTYPES = ["float16", "bfloat16"]
FAMILIES = ["llama", "gpt-oss", "gemma2"]  # plain; sinks and windows; soft caps
NUM_TOKENS = 100
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 128}


@pytest.fixture(autouse=True)
def _slow_devices_are_no_suspects(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine they would be overdue, and no drop would merge their groups."""
    monkeypatch.setattr(health, "STEP_FLOOR_S", 60.0)


def assert_equal(answers: list[Answer], expected: list[Answer]) -> None:
    for answer, its in zip(answers, expected, strict=True):
        assert (answer.token_ids, answer.text, answer.finish) == (its.token_ids, its.text, its.finish)
        assert answer.error is its.error is None
        assert [one.logprob for one in answer.logprobs] == [one.logprob for one in its.logprobs]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
async def test_answers_are_the_same_alone_together_and_across_transitions(
    dtype: str, family: str, tiny_models: TinyModels
) -> None:
    folder, settings = tiny_models.folder(family), SETTINGS | {"kv_cache_dtype": dtype}
    requests = make_requests(24, longest_prompt=20, most_tokens=9)
    async with checked_engine(folder, "cpu:1", 640, **settings) as checked:
        kv = checked.engine.memories[0].kv
        assert {layer.dtype for layer in kv.layers} == {getattr(torch, dtype)}
        expected = [await checked.answer(request) for request in again(requests)]
        assert_equal(await checked.answer_all(again(requests)), expected)
        assert len({tuple(answer.token_ids) for answer in expected}) > 12
    async with checked_engine(folder, "cpu:2", 128, **settings) as checked:
        for seed in range(3):
            regroup = partial(regroup_in_order, checked, random.Random(seed))
            assert_equal(await answer_while(checked, again(requests), regroup), expected)
            await checked.undo_drops()
        assert checked.num_outcomes("drop", "done", "by_request") > 0
        assert checked.num_outcomes("restore", "done") > 0


@pytest.mark.parametrize("policy", [OverloadPolicy.MIGRATE, OverloadPolicy.RECOMPUTE])
async def test_what_makes_way_and_what_is_cached_changes_nothing(
    policy: OverloadPolicy, tiny_models: TinyModels
) -> None:
    """With memory for hardly more than two of the seven prompts; later with what was left in the cache."""
    folder, shared = tiny_models.folder("llama"), random_prompt(130, seed=9)
    prompts = [random_prompt(n, seed=n) for n in (5, 40, 70, 130)] + [[*shared, 7 + i] for i in range(3)]
    settings: dict[str, Any] = {"kv_cache_dtype": "float16", "max_model_len": 320, "max_num_batched_tokens": 64}
    async with running_engine(folder, num_blocks_override=256, enable_prefix_caching=False, **settings) as served:
        expected = [await generate(served.engine, prompt, greedy(NUM_TOKENS)) for prompt in prompts]
    settings |= {"num_blocks_override": 20, "overload_policy": policy, "chunk_bytes": 1 << 16}
    async with running_engine(folder, "cpu:2", **settings) as served:
        for _ in range(2):
            assert await generate_all(served.engine, prompts, greedy(NUM_TOKENS)) == expected
        scheduler = served.engine.scheduler
        assert scheduler.num_preemptions + scheduler.swapped.num_swaps > 0 or policy is OverloadPolicy.MIGRATE
        await assert_idle(served.engine)


async def test_the_same_memory_holds_twice_as_many_tokens(tiny_models: TinyModels) -> None:
    folder = tiny_models.folder("llama", num_attention_heads=8, num_key_value_heads=8, head_dim=64)
    settings: dict[str, Any] = {"kv_bytes": 24 << 20, "max_model_len": 128}
    tokens, host_blocks = [], []
    for dtype in ("auto", *DTYPES):
        async with running_engine(folder, kv_cache_dtype=dtype, **settings) as served:
            memory = served.engine.memories[0]
            assert memory.weights.tensor("layers.0", "model.layers.0.input_layernorm.weight").dtype is torch.float32
            tokens.append(served.engine.groups[0].num_blocks * 16)
            host_blocks.append(served.engine.scheduler.swapped.num_blocks)
            assert memory.kv.shape.block_bytes == served.control.reconfigure.remap.shape.kv_block_bytes
    assert tokens[1] == tokens[2] == 2 * tokens[0] and host_blocks[1] == host_blocks[2] == 2 * host_blocks[0]


def test_other_dtypes_are_refused_by_name(tiny_models: TinyModels) -> None:
    model = load_hf_config(tiny_models.folder("llama"))
    for dtype in ("fp8", "fp8_e4m3", "nvfp4", "float32"):
        refused = f"^--kv-cache-dtype {dtype} is not served on CPU devices; use one of auto, float16, bfloat16$"
        with pytest.raises(ConfigError, match=refused):
            EngineConfig("m", parse_devices("cpu:1"), kv_cache_dtype=dtype).check()
        with pytest.raises(ConfigError, match=refused):  # where --devices auto finds no GPU
            HostMachine(model, EngineConfig("m", parse_devices("cpu:1"), kv_cache_dtype=dtype))
