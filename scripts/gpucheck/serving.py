"""GPU check: the real engine on logical devices of one GPU. Regrouping under load, and a burst under each policy.

`open_engine` is the one place that knows how an engine is launched; drop and restore are the operators' calls.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from gpucheck.bench import BLOCK_SIZE, Bench, Placed
from gpucheck.forward import gpu_step_seconds
from gpucheck.worker import tell
from kunserve.config import DeviceSpec, EngineConfig
from kunserve.engine.engine import Engine
from kunserve.engine.launch.launch import launch
from kunserve.engine.request import Request
from kunserve.engine.step.cuda_executor import CudaExecutor
from kunserve.errors import KunServeError
from kunserve.percentiles import quantile
from kunserve.policies import OverloadPolicy
from kunserve.sampling import SamplingParams

STEADY_S = 5.0  # of each of three measurements
SHARE_HELD = 0.6  # of a burst's tokens: what the devices have room for


@dataclass(slots=True)
class Answer:
    """One request: when it was sent, and when tokens came."""

    sent_s: float
    token_ids: list[int] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Return the seconds to the first token; infinity if there is none."""
        return self.at_s[0] - self.sent_s if self.at_s else float("inf")

    @property
    def longest_gap_s(self) -> float:
        """Return the longest wait between tokens, in seconds."""
        return max((b - a for a, b in zip(self.at_s, self.at_s[1:], strict=False)), default=0.0)


@asynccontextmanager
async def open_engine(config: EngineConfig) -> AsyncIterator[Engine]:
    """Open an engine that serves."""
    served = await launch(config, "gpu-check", lambda text, share: None)
    try:
        await served.engine.start()
        yield served.engine
    finally:
        await served.engine.stop()
        await served.close()


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


def prompt_of(engine: Engine, seed: int, length: int) -> list[int]:
    """Return random token ids, the same for the same seed."""
    return [random.Random(f"{seed}/{i}").randrange(3, engine.model.vocab_size) for i in range(length)]


async def settled(engine: Engine) -> dict[str, Any]:
    """Return the last transition, once it has ended."""
    while (last := engine.state()["transitions"][-1])["outcome"] == "running":
        await engine.signals.next_commit()
    return dict(last)


async def regroup(config: EngineConfig, *, num_requests: int, num_tokens: int) -> dict[str, Any]:
    """Drop, exchange and restore by hand while requests run; tokens must be those of an undisturbed run."""

    async def run(engine: Engine) -> list[Answer]:
        return await asyncio.gather(
            *(
                ask(engine, str(i), prompt_of(engine, i, 40 + 7 * i), num_tokens, 0.8 * (i % 2))
                for i in range(num_requests)
            )
        )

    async with open_engine(config) as engine:
        expected = await run(engine)
        answers = asyncio.ensure_future(run(engine))
        while engine.num_running < num_requests:
            await engine.signals.next_commit()
        transitions = []
        for change in (engine.drop, engine.restore):
            for _ in range(num_tokens // 8):
                await engine.signals.next_commit()
            await change()
            transitions.append(await settled(engine))
            engine.check()
        actual = await answers
    return {
        "same_tokens": [a.token_ids for a in actual] == [a.token_ids for a in expected],
        "errors": [a.error for a in actual if a.error],
        "longest_gap_ms": max(a.longest_gap_s for a in actual) * 1e3,
        "longest_gap_undisturbed_ms": max(a.longest_gap_s for a in expected) * 1e3,
        "transitions": transitions,
    }


@asynccontextmanager
async def decoding(engine: Engine, num_requests: int, prompt_len: int) -> AsyncIterator[list[Answer]]:
    """Have all requests generate while the block runs; yield their answers once each has a token."""
    answers: list[Answer] = []

    async def follow(i: int) -> None:
        answer = Answer(time.perf_counter())
        answers.append(answer)
        params = SamplingParams(engine.limits.max_model_len - prompt_len - 1, temperature=0.0, ignore_eos=True)
        async for output in engine.submit(Request(str(i), prompt_of(engine, i, prompt_len), params)):
            answer.at_s += [time.perf_counter()] * len(output.token_ids)

    tasks = [asyncio.ensure_future(follow(i)) for i in range(num_requests)]
    try:
        while not (len(answers) == num_requests and all(a.at_s for a in answers)):
            await engine.signals.next_commit()
            if any(task.done() for task in tasks):
                raise RuntimeError("a request has ended before all have begun")
        yield answers
    finally:
        for i in range(num_requests):
            engine.abort(str(i))
        await asyncio.wait(tasks)
    for task in tasks:
        task.result()


async def _rate(answers: Sequence[Answer]) -> tuple[float, float]:
    """Measure tokens per second for a while, and how many each request had by the middle of it."""
    before, started = sum(len(a.at_s) for a in answers), time.perf_counter()
    await asyncio.sleep(STEADY_S)
    now, took = sum(len(a.at_s) for a in answers), time.perf_counter() - started
    return (now - before) / took, (now + before) / 2 / len(answers)


async def steady(config: EngineConfig, *, num_requests: int, prompt_len: int) -> dict[str, Any]:
    """Measure tokens per second of running requests before, and after, two groups have become a chain."""
    async with open_engine(config) as engine, decoding(engine, num_requests, prompt_len) as answers:
        undropped, _ = await _rate(answers)
        await engine.drop()
        drop = await settled(engine)
        dropped, _ = await _rate(answers)
        tell({"tokens_per_s": undropped, "tokens_per_s_dropped": dropped, "share": dropped / undropped})
    return {
        "tokens_per_s": undropped,
        "tokens_per_s_dropped": dropped,
        "share": dropped / undropped,
        "drop_to_first_step_s": drop["seconds"].get("first_token"),
        "drop": drop,
    }


async def host(bench: Bench, config: EngineConfig, *, num_requests: int, prompt_len: int) -> dict[str, Any]:
    """Divide the time of a decode step in the engine by what the GPU alone needs for one of as many sequences.

    Once with each step planned while the one before runs, as it is when serving, and once only after it: then all of
    the host's time shows (schedule, arrays, plan, launch, publish).
    """
    async with open_engine(config) as engine:
        scheduler, limits = engine.scheduler, engine.scheduler.limits
        async with decoding(engine, num_requests, prompt_len) as answers:
            scheduler.limits = replace(limits, num_ahead=0)
            late, late_tokens = await _rate(answers)
            scheduler.limits = limits
            ahead, ahead_tokens = await _rate(answers)
        while not engine.is_idle_since_last_step:
            await engine.signals.next_commit()
        assert isinstance(engine.executor, CudaExecutor)
        [memory], [decoder], [device] = engine.memories, engine.executor.decoders, engine.executor.devices
        placed = Placed(device, memory, decoder, memory.kv.num_blocks(0))
        late_gpu_s, gpu_s = [
            await asyncio.to_thread(gpu_step_seconds, bench, placed, engine.model, num_requests, prompt_len + int(n))
            for n in (late_tokens, ahead_tokens)
        ]
    step_s, host_s = num_requests / ahead, max(0.0, num_requests / late - late_gpu_s)
    exposed_s = max(0.0, step_s - gpu_s)
    return {
        "batch": num_requests,
        "context": prompt_len + int(ahead_tokens),
        "step_ms": step_s * 1e3,
        "gpu_ms": gpu_s * 1e3,
        "host_ms": host_s * 1e3,
        "hidden_share": max(0.0, 1 - exposed_s / host_s) if host_s else 1.0,
        "exposed_share": exposed_s / step_s,
    }


@dataclass(frozen=True, slots=True)
class Burst:
    """Requests that come `rate` a second on average, all alike; those that take longer than `limit_s` are given up."""

    num_requests: int
    rate: float
    prompt_len: int
    num_tokens: int
    limit_s: float

    @property
    def demand_tokens(self) -> int:
        """Return how many tokens all requests have together."""
        return self.num_requests * (self.prompt_len + self.num_tokens)

    def too_few_blocks(self, num_devices: int) -> int:
        """Return the blocks of KV on each device of which all together hold `SHARE_HELD` of the demand."""
        return int(self.demand_tokens * SHARE_HELD) // num_devices // BLOCK_SIZE


async def burst(config: EngineConfig, load: Burst) -> dict[str, Any]:
    """Measure a Poisson burst: time to first token, longest gap, tokens per second.

    RuntimeError if all of it would fit into the KV of replicas; that of a pipeline, in the same memory, is larger.
    """
    draw, num_requests, prompt_len, limit_s = random.Random(7), load.num_requests, load.prompt_len, load.limit_s
    async with open_engine(config) as engine:
        capacity = sum(group.num_blocks for group in engine.groups) * config.block_size
        if capacity >= load.demand_tokens and config.pipeline_parallel_size is None:
            raise RuntimeError(f"no overload: {capacity} tokens of KV for a demand of {load.demand_tokens}")
        await ask(engine, "warm-up", prompt_of(engine, 0, prompt_len), 8)
        started = time.perf_counter()
        tasks = []
        for i in range(num_requests):
            await asyncio.sleep(draw.expovariate(load.rate))
            tasks.append(asyncio.ensure_future(ask(engine, str(i), prompt_of(engine, i, prompt_len), load.num_tokens)))
        _, late = await asyncio.wait(tasks, timeout=limit_s)
        for task in late:
            task.cancel()
        took = time.perf_counter() - started
        answers = [task.result() for task in tasks if task not in late]
        ttft = sorted(min(a.ttft_s, limit_s) for a in answers) + [limit_s] * len(late)  # no token by then: the limit
        return tell(
            {
                "kv_tokens": capacity,
                "demand_tokens": load.demand_tokens,
                "ttft_p50_s": quantile(ttft, 0.5),
                "ttft_p99_s": quantile(ttft, 0.99),
                "longest_gap_s": max((a.longest_gap_s for a in answers), default=0.0),
                "tokens_per_s": sum(len(a.token_ids) for a in answers) / took,
                "unfinished": len(late),
                "errors": sum(a.error is not None for a in answers),
                "preemptions": engine.scheduler.num_preemptions,
                "transitions": [(t["kind"], t["outcome"]) for t in engine.state().get("transitions", [])],
            }
        )


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
    utilization: float = 0.92,
) -> EngineConfig:
    """Return the settings of an engine with random weights."""
    return EngineConfig(
        model=model,
        devices=devices,
        device_memory_bytes=memory_bytes,
        gpu_memory_utilization=utilization,
        num_blocks_override=num_blocks,
        dtype=dtype,
        load_format="dummy",
        max_model_len=4096,
        max_num_batched_tokens=num_batched_tokens,
        pipeline_parallel_size=num_stages,
        overload_policy=policy,
        is_pinned=is_pinned,
    )
