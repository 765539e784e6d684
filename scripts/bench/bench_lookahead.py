"""Microbatches of equal predicted time against microbatches of equally many tokens, on a live chain.

    python scripts/bench/bench_lookahead.py [--max-num-batched-tokens 128,512,2048] [--rounds 3]

Two engines with the same devices, memory and stages, one for each way, serve the same backlog by turns: all requests
come at once, prompts of 16 to 1,500 tokens (log-uniform), greedy. Shown are medians over the rounds; every answer must
be the same in both. The prefix cache is off: the same prompts come again. Ends in one JSON line.

Where other work is on the machine, the wall clock says more about that than about bubbles. So the CPU seconds of each
stage are recorded too, and those of the event loop, and "undisturbed" says how long the same microbatches take in the
same order when each device has its core to itself: a microbatch waits for its launch, its stage and the one before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import pairwise
from math import exp, log
from statistics import median
from typing import Any

from kunserve.compute.sampler import SampledToken
from kunserve.config import EngineConfig, parse_devices
from kunserve.engine.engine import Engine
from kunserve.engine.group import Group
from kunserve.engine.launch.launch import launch
from kunserve.engine.request import Request
from kunserve.engine.signals import loop_time
from kunserve.engine.step.microbatch import StepInputs
from kunserve.errors import ConfigError
from kunserve.gpu.device import Device
from kunserve.log import set_up_logging
from kunserve.sampling import SamplingParams

MODES = ("tokens", "lookahead")
SHORTEST, LONGEST = 16, 1500
number: ContextVar[int] = ContextVar("number")  # of the microbatch that a task takes through the chain


@dataclass(frozen=True, slots=True)
class Job:
    prompt: Sequence[int]
    num_output_tokens: int


@dataclass(slots=True)
class Recorder:
    """CPU seconds of whatever a microbatch does on devices, and how many had come back when it was launched."""

    works: list[list[tuple[int, float]]] = field(default_factory=list)  # by microbatch, as submitted: device, seconds
    num_done_at_launch: list[int] = field(default_factory=list)
    num_done: int = 0

    def watch(self, engine: Engine) -> None:
        """Record whatever the engine computes from now on."""
        for index, memory in enumerate(engine.memories):
            self._watch_device(index, memory.device)
        execute = engine.executor.execute

        async def recorded(group: Group, inputs: StepInputs, stage_s: list[float] | None = None) -> list[SampledToken]:
            number.set(len(self.works))
            self.works.append([])
            self.num_done_at_launch.append(self.num_done)
            try:
                return await execute(group, inputs, stage_s)
            finally:
                self.num_done += 1

        engine.executor.execute = recorded  # type: ignore[misc, method-assign]

    def _watch_device(self, index: int, device: Device) -> None:
        run = device.run

        async def recorded(work: Callable[[], Any]) -> Any:
            works = self.works[number.get()]
            works.append((index, 0.0))
            place = len(works) - 1

            def timed() -> Any:
                started = time.thread_time()
                result = work()
                works[place] = (index, time.thread_time() - started)
                return result

            return await run(timed)

        device.run = recorded  # type: ignore[method-assign]

    def clear(self) -> None:
        """Forget everything; nothing is in flight."""
        self.num_done = 0
        self.num_done_at_launch.clear()
        self.works.clear()

    def replay(self, num_stages: int, host_s: float) -> tuple[float, float]:
        """Return the elapsed seconds and the bubble share of a run without others; `host_s` passes before each launch.

        Works of a microbatch follow each other, but for those after its last layers: both ends share the head then.
        """
        free, done, active_s, now = [0.0] * num_stages, 0, 0.0, 0.0
        ready = [(host_s, i, 0) for i, after in enumerate(self.num_done_at_launch) if after == 0]
        heapify(ready)
        left = [len(works) for works in self.works]
        started, ended = [0.0] * len(left), [0.0] * len(left)
        while ready:
            at, i, place = heappop(ready)
            device, seconds = self.works[i][place]
            if place == 0:
                started[i] = at
            free[device] = end = max(at, free[device]) + seconds
            left[i], ended[i] = left[i] - 1, max(ended[i], end)
            if place + 1 < num_stages:
                heappush(ready, (end, i, place + 1))
            elif place + 1 == num_stages:
                for head in range(num_stages, len(self.works[i])):
                    heappush(ready, (end, i, head))
            if not left[i]:
                done, active_s, now = done + 1, active_s + ended[i] - max(now, started[i]), ended[i]
                for j, after in enumerate(self.num_done_at_launch):
                    if after == done:
                        heappush(ready, (now + host_s, j, 0))
        busy_s = sum(seconds for works in self.works for _, seconds in works)
        return now, 1 - busy_s / (num_stages * active_s)


@dataclass(frozen=True, slots=True)
class Result:
    """One backlog served in one way."""

    elapsed_s: float
    num_tokens: int
    bubble_share: float
    undisturbed_s: float
    undisturbed_bubble_share: float
    ttft_s: Sequence[float]
    gap_s: Sequence[float]
    answers: Sequence[Sequence[int]]


def draw_jobs(num_requests: int, outputs: Sequence[int], vocab_size: int, seed: int) -> list[Job]:
    rng = random.Random(seed)
    jobs = []
    for _ in range(num_requests):
        num_prompt = round(exp(rng.uniform(log(SHORTEST), log(LONGEST))))
        jobs.append(
            Job([rng.randrange(10, vocab_size) for _ in range(num_prompt)], rng.randint(outputs[0], outputs[1]))
        )
    return jobs


async def serve(engine: Engine, recorder: Recorder, jobs: Sequence[Job], name: str) -> Result:
    """Submit everything at once, and wait for the last token."""
    (group,) = engine.groups
    recorder.clear()
    host_s = time.thread_time()
    active_s, busy_s = group.occupancy.active_s(loop_time()), sum(group.occupancy.busy_s(loop_time()))
    started = time.perf_counter()
    times: list[list[float]] = []

    async def one(i: int, job: Job) -> list[int]:
        params = SamplingParams(max_tokens=job.num_output_tokens, temperature=0, ignore_eos=True)
        tokens: list[int] = []
        seen: list[float] = [time.perf_counter() - started]
        times.append(seen)
        async for output in engine.submit(Request(f"{name}-{i}", list(job.prompt), params)):
            tokens += output.token_ids
            seen.append(time.perf_counter() - started)
        return tokens

    answers = await asyncio.gather(*(one(i, job) for i, job in enumerate(jobs)))
    elapsed_s = time.perf_counter() - started
    host_s = (time.thread_time() - host_s) / len(recorder.num_done_at_launch)
    active_s = group.occupancy.active_s(loop_time()) - active_s
    busy_s = sum(group.occupancy.busy_s(loop_time())) - busy_s
    return Result(
        elapsed_s,
        sum(len(job.prompt) + job.num_output_tokens for job in jobs),
        1 - busy_s / (len(group.stages) * active_s),
        *recorder.replay(len(group.stages), host_s),
        [seen[1] for seen in times],
        [max(b - a for a, b in pairwise(seen[1:])) for seen in times if len(seen) > 2],
        answers,
    )


@asynccontextmanager
async def serving(args: argparse.Namespace, mode: str, budget: int) -> AsyncIterator[Engine]:
    """Start an engine: one chain on all devices, which regroups only if asked."""
    devices = parse_devices(args.devices)
    config = EngineConfig(
        model=args.model,
        devices=devices,
        num_blocks_override=args.blocks,
        load_format=args.load_format,
        max_model_len=2048,
        max_num_batched_tokens=budget,
        pipeline_parallel_size=len(devices.indices),
        microbatching=mode,
        is_pinned=True,
        enable_prefix_caching=False,
    )
    served = await launch(config, args.model, lambda text, share: None)
    try:
        await served.engine.start()
        yield served.engine
        await served.engine.stop()
    finally:
        await served.close()


def summary(results: Sequence[Result]) -> dict[str, float]:
    """Return the medians over the rounds."""
    return {
        "tokens_per_s": round(median(r.num_tokens / r.elapsed_s for r in results), 1),
        "bubble_share": round(median(r.bubble_share for r in results), 4),
        "undisturbed_tokens_per_s": round(median(r.num_tokens / r.undisturbed_s for r in results), 1),
        "undisturbed_bubble_share": round(median(r.undisturbed_bubble_share for r in results), 4),
        "ttft_p50_s": round(median(median(r.ttft_s) for r in results), 3),
        "longest_gap_s": round(median(max(r.gap_s) for r in results), 3),
    }


async def compare(args: argparse.Namespace, budget: int) -> dict[str, object]:
    """Run both ways by turns, with one warm-up each, at one token budget."""
    async with AsyncExitStack() as stack:
        engines = {mode: await stack.enter_async_context(serving(args, mode, budget)) for mode in MODES}
        vocab_size = engines[MODES[0]].model.vocab_size
        recorders = {mode: Recorder() for mode in MODES}
        results: dict[str, list[Result]] = {mode: [] for mode in MODES}
        for mode, engine in engines.items():
            recorders[mode].watch(engine)
            await serve(engine, recorders[mode], draw_jobs(2, (4, 4), vocab_size, args.seed), f"warm-up-{mode}")
        for number in range(args.rounds):
            jobs = draw_jobs(args.num_requests, args.output_len, vocab_size, args.seed + number)
            for mode in MODES if number % 2 == 0 else MODES[::-1]:
                results[mode].append(await serve(engines[mode], recorders[mode], jobs, f"{mode}-{number}"))
                print(budget, mode, summary(results[mode][-1:]), file=sys.stderr)
            assert results["tokens"][-1].answers == results["lookahead"][-1].answers, "answers differ"
        stages = [[s.first_layer, s.last_layer] for s in engines[MODES[0]].groups[0].stages]
    pairs = list(zip(results["tokens"], results["lookahead"], strict=True))
    return {
        "max_num_batched_tokens": budget,
        "stages": stages,
        **{mode: summary(results[mode]) for mode in MODES},
        "throughput_ratio": round(median(t.elapsed_s / a.elapsed_s for t, a in pairs), 3),
        "bubble_ratio": round(median(a.bubble_share / t.bubble_share for t, a in pairs), 3),
        "undisturbed_throughput_ratio": round(median(t.undisturbed_s / a.undisturbed_s for t, a in pairs), 3),
        "undisturbed_bubble_ratio": round(
            median(a.undisturbed_bubble_share / t.undisturbed_bubble_share for t, a in pairs), 3
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--load-format", default="auto", choices=("auto", "dummy"))
    parser.add_argument("--devices", default="cpu:2", help="one chain of all of them")
    parser.add_argument("--blocks", type=int, default=512, help="KV blocks of a device that holds the whole model")
    parser.add_argument("--num-requests", type=int, default=24)
    parser.add_argument("--output-len", type=int, nargs=2, default=(16, 64), metavar=("LEAST", "MOST"))
    parser.add_argument("--max-num-batched-tokens", default="128,512,2048", help="token budgets, with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_up_logging("warning", False)
    try:
        budgets = [int(text) for text in args.max_num_batched_tokens.split(",")]
        reports = [asyncio.run(compare(args, budget)) for budget in budgets]
    except (ConfigError, ValueError) as error:
        sys.exit(f"bench_lookahead: {error}")
    print(json.dumps({"bench": "lookahead", "model": args.model, "devices": args.devices, "budgets": reports}))


if __name__ == "__main__":
    main()
