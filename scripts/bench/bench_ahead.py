"""What planning the next step while the current one runs saves: the gap between steps, with and without, by turns.

    python scripts/bench/bench_ahead.py [--model smollm2-135m] [--devices cpu:2] [--streams 16] [--rounds 5]

One engine, in this process and without HTTP; every round decodes the same streams twice. A step is what a device's
thread computes, a gap what it waits for the next while there is one to come. Probes are short prompts that come in at
odd moments. Shown are medians over all steps, and of rounds: the speed of a shared core varies. The prefix cache is
off, as the same prompts come again. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

from kunserve.config import EngineConfig, parse_devices
from kunserve.engine.engine import Engine
from kunserve.engine.launch.launch import launch
from kunserve.engine.request import Request
from kunserve.sampling import SamplingParams

PROMPT_TOKENS, PROBES, PROBE_EVERY_S = 32, 4, 0.37


@dataclass(slots=True)
class Steps:
    """When a device's thread computed: (begin, end) of each step, in seconds."""

    times: list[tuple[float, float]] = field(default_factory=list)

    def watch(self, device: Any) -> None:
        """Note every piece of work on the device's compute queue."""
        run = device.run

        def timed(work: Callable[[], Any]) -> Any:
            begin = time.perf_counter()
            try:
                return work()
            finally:
                self.times.append((begin, time.perf_counter()))

        device.run = lambda work: run(partial(timed, work))

    def seconds(self) -> tuple[list[float], list[float]]:
        """Return the seconds of steps, and of the gaps between them."""
        gaps = [later[0] - earlier[1] for earlier, later in zip(self.times, self.times[1:], strict=False)]
        return [end - begin for begin, end in self.times], gaps


@dataclass(slots=True)
class Found:
    """Measurements of one way."""

    steps: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        """Return medians; times in milliseconds."""
        return {
            "step_ms": round(1e3 * median(self.steps), 3),
            "gap_ms": round(1e3 * median(self.gaps), 3),
            "tokens_per_s": round(median(self.tokens_per_s), 1),
            "probe_ttft_ms": round(1e3 * median(self.ttft), 1),
        }


async def read(engine: Engine, name: str, num_tokens: int) -> float:
    """Submit a request and read it to its end; return the seconds to its first token."""
    prompt = [100 + (7 * i + sum(name.encode())) % 1000 for i in range(PROMPT_TOKENS)]
    submitted = time.perf_counter()
    first = 0.0
    async for output in engine.submit(
        Request(name, prompt, SamplingParams(num_tokens, temperature=0, ignore_eos=True))
    ):
        first = first or (time.perf_counter() - submitted if output.token_ids else 0.0)
    return first


async def decode(engine: Engine, args: argparse.Namespace, found: Found) -> None:
    """Measure one round of streams, and probes between."""
    watched = [Steps() for _ in engine.memories]
    plain = [memory.device.run for memory in engine.memories]
    for steps, memory in zip(watched, engine.memories, strict=True):
        steps.watch(memory.device)
    begun = time.perf_counter()
    streams = [asyncio.create_task(read(engine, f"s{i}", args.tokens)) for i in range(args.streams)]
    for i in range(args.probes):
        await asyncio.sleep(PROBE_EVERY_S)
        found.ttft.append(await read(engine, f"p{i}", 1))
    await asyncio.gather(*streams)
    found.tokens_per_s.append(args.streams * args.tokens / (time.perf_counter() - begun))
    for steps, memory, run in zip(watched, engine.memories, plain, strict=True):
        memory.device.run = run  # type: ignore[method-assign]
        of_steps, gaps = steps.seconds()
        found.steps += of_steps
        found.gaps += gaps


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds, on and off by turns."""
    config = EngineConfig(
        args.model,
        devices=parse_devices(args.devices),
        pipeline_parallel_size=args.pipeline_parallel_size,
        num_blocks_override=args.streams * (2 + (PROMPT_TOKENS + args.tokens) // 16),
        is_pinned=True,
        enable_prefix_caching=False,
    )
    served = await launch(config, "bench", lambda text, share: None)
    engine = served.engine
    found = {False: Found(), True: Found()}
    try:
        await engine.start()
        await decode(engine, args, Found())  # warms up
        for i in range(2 * args.rounds):
            is_ahead = (i % 2 == 0) != (i // 2 % 2 == 0)  # off, on, on, off, ...
            engine.scheduler.limits = replace(engine.scheduler.limits, num_ahead=int(is_ahead))
            await decode(engine, args, found[is_ahead])
    finally:
        await engine.stop()
        await served.close()
    on, off = found[True].row(), found[False].row()
    return {"devices": args.devices, "streams": args.streams, "rounds": args.rounds, "off": off, "on": on}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--devices", default="cpu:2")
    parser.add_argument("--pipeline-parallel-size", type=int)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--probes", type=int, default=PROBES)
    result = asyncio.run(run(parser.parse_args()))
    for name in ("off", "on"):
        print(f"{name:3}  " + "  ".join(f"{key} {value}" for key, value in result[name].items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
