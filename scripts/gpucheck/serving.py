"""GPU check: the real engine on logical devices of one GPU. Regrouping under load, and a burst under each policy.

`open_engine` is the one place that knows how an engine is launched; drop and restore are the operators' calls.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from kunserve.config import DeviceSpec, EngineConfig
from kunserve.engine.engine import Engine
from kunserve.engine.launch import launch
from kunserve.engine.policy import OverloadPolicy
from kunserve.engine.request import Request, SamplingParams
from kunserve.errors import KunServeError

STEADY_S = 5.0  # of each of three measurements


@dataclass(slots=True)
class Answer:
    """One request: when it was sent, and when tokens came."""

    sent_s: float
    token_ids: list[int] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.at_s[0] - self.sent_s if self.at_s else float("inf")

    @property
    def longest_gap_s(self) -> float:
        """Longest wait between tokens."""
        return max((b - a for a, b in zip(self.at_s, self.at_s[1:], strict=False)), default=0.0)


@asynccontextmanager
async def open_engine(config: EngineConfig) -> AsyncIterator[Engine]:
    """An engine that serves."""
    served = await launch(config, "gpu-check", lambda text, share: None)
    try:
        await served.engine.start()
        yield served.engine
    finally:
        await served.engine.stop()
        await served.engine.close()


async def ask(engine: Engine, name: str, prompt: list[int], num_tokens: int, temperature: float = 0.0) -> Answer:
    """Send one request and take its tokens as they come."""
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=temperature, seed=len(prompt))
    answer = Answer(time.perf_counter())
    try:
        async for output in engine.submit(Request(name, prompt, params)):
            answer.token_ids += output.token_ids
            answer.at_s += [time.perf_counter()] * len(output.token_ids)
    except KunServeError as error:
        answer.error = error.message
    return answer


def prompt_of(seed: int, length: int) -> list[int]:
    """Random token ids."""
    return [random.Random(f"{seed}/{i}").randrange(3, 30000) for i in range(length)]


async def _settled(engine: Engine) -> dict[str, Any]:
    """The last transition, once it has ended."""
    while (last := engine.state()["transitions"][-1])["outcome"] == "running":
        await engine.next_commit()
    return dict(last)


async def regroup(config: EngineConfig, *, num_requests: int, num_tokens: int) -> dict[str, Any]:
    """Drop, exchange and restore by hand while requests run; tokens must be those of an undisturbed run."""

    async def run(engine: Engine) -> list[Answer]:
        return await asyncio.gather(
            *(ask(engine, str(i), prompt_of(i, 40 + 7 * i), num_tokens, 0.8 * (i % 2)) for i in range(num_requests))
        )

    async with open_engine(config) as engine:
        expected = await run(engine)
        answers = asyncio.ensure_future(run(engine))
        while engine.num_running < num_requests:
            await engine.next_commit()
        transitions = []
        for change in (engine.drop, engine.restore):
            for _ in range(num_tokens // 8):
                await engine.next_commit()
            await change()
            transitions.append(await _settled(engine))
            engine.check()
        actual = await answers
    return {
        "same_tokens": [a.token_ids for a in actual] == [a.token_ids for a in expected],
        "errors": [a.error for a in actual if a.error],
        "longest_gap_ms": max(a.longest_gap_s for a in actual) * 1e3,
        "longest_gap_undisturbed_ms": max(a.longest_gap_s for a in expected) * 1e3,
        "transitions": transitions,
    }


async def steady(config: EngineConfig, *, num_requests: int, prompt_len: int) -> dict[str, Any]:
    """Tokens per second of running requests before, and after, two groups have become a chain."""

    async def rate(engine: Engine, answers: list[Answer]) -> float:
        before, started = sum(len(a.at_s) for a in answers), time.perf_counter()
        await asyncio.sleep(STEADY_S)
        return (sum(len(a.at_s) for a in answers) - before) / (time.perf_counter() - started)

    async with open_engine(config) as engine:
        answers: list[Answer] = []

        async def follow(i: int) -> None:
            answer = Answer(time.perf_counter())
            answers.append(answer)
            params = SamplingParams(max_tokens=engine.limits.max_model_len - prompt_len - 1, ignore_eos=True)
            async for output in engine.submit(Request(str(i), prompt_of(i, prompt_len), params)):
                answer.at_s += [time.perf_counter()] * len(output.token_ids)

        tasks = [asyncio.ensure_future(follow(i)) for i in range(num_requests)]
        while any(not a.at_s for a in answers) or len(answers) < num_requests:
            await engine.next_commit()
        scheduler, planned = engine.scheduler, engine.scheduler.limits
        scheduler.limits = replace(planned, num_ahead=0)
        without_ahead = await rate(engine, answers)
        scheduler.limits = planned
        undropped = await rate(engine, answers)
        await engine.drop()
        drop = await _settled(engine)
        dropped = await rate(engine, answers)
        for i in range(num_requests):
            engine.abort(str(i))
        await asyncio.gather(*tasks)
    return {
        "tokens_per_s": undropped,
        "tokens_per_s_planned_late": without_ahead,  # each step only when the one before is known: what is not hidden
        "tokens_per_s_dropped": dropped,
        "share": dropped / undropped,
        "drop_to_first_step_s": drop["seconds"].get("first_token"),
        "drop": drop,
    }


async def burst(
    config: EngineConfig, *, num_requests: int, rate: float, prompt_len: int, num_tokens: int, limit_s: float
) -> dict[str, Any]:
    """A Poisson burst: time to first token, longest gap, tokens per second."""
    draw = random.Random(7)
    async with open_engine(config) as engine:
        capacity = sum(group.num_blocks for group in engine.groups) * config.block_size
        await ask(engine, "warm-up", prompt_of(0, prompt_len), 8)
        started = time.perf_counter()
        tasks = []
        for i in range(num_requests):
            await asyncio.sleep(draw.expovariate(rate))
            tasks.append(asyncio.ensure_future(ask(engine, str(i), prompt_of(i, prompt_len), num_tokens)))
        _, late = await asyncio.wait(tasks, timeout=limit_s)
        for task in late:
            task.cancel()
        took = time.perf_counter() - started
        answers = [task.result() for task in tasks if task not in late]
        ttft = sorted(a.ttft_s for a in answers) + [limit_s] * len(late)
        return {
            "kv_tokens": capacity,
            "demand_tokens": num_requests * (prompt_len + num_tokens),
            "ttft_p50_s": ttft[len(ttft) // 2],
            "ttft_p99_s": ttft[min(len(ttft) - 1, len(ttft) * 99 // 100)],
            "longest_gap_s": max((a.longest_gap_s for a in answers), default=0.0),
            "tokens_per_s": sum(len(a.token_ids) for a in answers) / took,
            "unfinished": len(late),
            "errors": sum(a.error is not None for a in answers),
            "preemptions": engine.scheduler.num_preemptions,
            "transitions": [(t["kind"], t["outcome"]) for t in engine.state().get("transitions", [])],
        }


def engine_config(
    devices: DeviceSpec,
    model: str,
    *,
    memory_bytes: int | None = None,
    num_blocks: int | None = None,
    dtype: str = "auto",
    policy: OverloadPolicy = OverloadPolicy.DROP,
    num_stages: int | None = None,
    is_pinned: bool = False,
    num_batched_tokens: int = 2048,
) -> EngineConfig:
    """An engine with random weights."""
    return EngineConfig(
        model=model,
        devices=devices,
        device_memory_bytes=memory_bytes,
        num_blocks_override=num_blocks,
        dtype=dtype,
        load_format="dummy",
        max_model_len=4096,
        max_num_batched_tokens=num_batched_tokens,
        pipeline_parallel_size=num_stages,
        overload_policy=policy,
        is_pinned=is_pinned,
    )
