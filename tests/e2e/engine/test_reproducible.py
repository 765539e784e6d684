"""A request's tokens are its own: whatever else runs, however memory is fought over, whoever leaves."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest

from e2e.engines import (
    LAYOUTS,
    assert_idle,
    generate,
    generate_all,
    greedy,
    new_request,
    running_engine,
)
from e2e.tiny import WIDE_KV, TinyModels, random_prompt
from kunserve.engine.engine import Engine
from kunserve.engine.request import Output
from kunserve.policies import OverloadPolicy
from kunserve.sampling import FinishReason, SamplingParams

SAMPLED = SamplingParams(max_tokens=48, temperature=0.9, top_p=0.95, top_k=50, seed=7, ignore_eos=True)
PENALISED = replace(SAMPLED, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1, min_p=0.01)


@pytest.mark.parametrize("name", LAYOUTS)
async def test_a_seed_decides_whatever_else_runs(name: str, tiny_models: TinyModels) -> None:
    layout, prompt = LAYOUTS[name], random_prompt(40)
    folder = tiny_models.folder("llama")
    async with running_engine(folder, **layout.settings, num_blocks_override=512, max_num_batched_tokens=48) as served:
        engine = served.engine
        alone = [await generate(engine, prompt, params) for params in (SAMPLED, PENALISED)]
        assert alone[0] != alone[1] != await generate(engine, prompt, greedy(48))
        others = [
            asyncio.create_task(generate(engine, random_prompt(5 + 7 * i), replace(SAMPLED, seed=None)))
            for i in range(20)
        ]
        crowded = [await generate(engine, prompt, params) for params in (SAMPLED, PENALISED)]
        await asyncio.gather(*others)
        assert crowded == alone
        assert await generate(engine, prompt, replace(SAMPLED, seed=8)) != alone[0]
        await assert_idle(engine)


@pytest.mark.parametrize("policy", [OverloadPolicy.RECOMPUTE, OverloadPolicy.QUEUE])
@pytest.mark.parametrize("name", LAYOUTS)
async def test_scarce_memory_changes_no_token(name: str, policy: OverloadPolicy, tiny_models: TinyModels) -> None:
    layout, folder = LAYOUTS[name], tiny_models.folder("llama", **WIDE_KV)
    settings: dict[str, Any] = {**layout.settings, "max_num_batched_tokens": 64, "max_model_len": 256}
    prompts = [random_prompt(20 + 3 * i) for i in range(12)]
    choices = (greedy(90), replace(SAMPLED, max_tokens=90), replace(PENALISED, max_tokens=90))
    params = [choices[i % 3] for i in range(len(prompts))]

    async def run(engine: Engine) -> list[list[int]]:
        return await asyncio.gather(*map(generate, [engine] * len(prompts), prompts, params))

    async with running_engine(folder, **settings, num_blocks_override=512) as served:
        expected = await run(served.engine)
        assert served.engine.scheduler.num_preemptions == 0
    async with running_engine(folder, **settings, num_blocks_override=32, overload_policy=policy) as served:
        engine = served.engine
        assert sum(group.num_blocks for group in engine.groups) < 12 * 8  # each request needs 7 to 9 in the end
        assert await run(engine) == expected
        assert (engine.scheduler.num_preemptions > 0) is (policy is OverloadPolicy.RECOMPUTE)
        await assert_idle(engine)


@pytest.mark.parametrize("name", LAYOUTS)
async def test_streams_that_are_cut_at_random_leave_nothing_behind(name: str, tiny_models: TinyModels) -> None:
    """200 at once, a third aborted, in memory for a part of them; the invariants hold after every output."""
    layout, folder = LAYOUTS[name], tiny_models.folder("llama", **WIDE_KV)
    settings: dict[str, Any] = {"max_num_batched_tokens": 256, "max_model_len": 256, "num_blocks_override": 64}
    settings["overload_policy"] = OverloadPolicy.RECOMPUTE
    rng = random.Random(name)
    async with running_engine(folder, **layout.settings, **settings) as served:
        engine = served.engine
        patient = random_prompt(30)
        params = replace(SAMPLED, max_tokens=24)
        expected = await generate(engine, patient, params)

        async def leave_early(num_outputs: int) -> None:
            request = new_request(random_prompt(rng.randrange(1, 120)), greedy(40))
            stream = engine.submit(request)
            finals, expected = list[Output](), FinishReason.LENGTH
            async for output in stream:
                if num_outputs == 0:
                    expected = request.finish_reason or FinishReason.ABORT  # it may have ended before a slow reader
                    engine.abort(request.request_id)
                    engine.abort(request.request_id)  # idempotent
                num_outputs -= 1
                finals += [output] if output.finish_reason is not None else []
            assert [output.finish_reason for output in finals] == [request.finish_reason]
            assert request.finish_reason is expected
            engine.check()

        async def stay() -> None:
            assert await generate(engine, patient, params) == expected
            engine.check()

        async with asyncio.TaskGroup() as tasks:
            for i in range(200):
                tasks.create_task(leave_early(rng.randrange(30)) if i % 3 == 0 else stay())
        await assert_idle(engine)


async def test_a_request_aborted_before_it_ran_never_runs(tiny_models: TinyModels) -> None:
    async with running_engine(tiny_models.folder("llama"), num_blocks_override=512) as served:
        engine = served.engine
        requests = [new_request(random_prompt(9), greedy(9)) for _ in range(3)]
        streams = [engine.submit(request) for request in requests]
        for request in requests:
            engine.abort(request.request_id)
        outputs = [[output async for output in stream] for stream in streams]
        assert outputs == [[Output(finish_reason=FinishReason.ABORT)]] * 3
        assert (await generate_all(engine, [random_prompt(9)], greedy(9)))[0]
        await assert_idle(engine)
