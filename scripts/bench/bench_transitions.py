#!/usr/bin/env python3
"""What transitions cost a server: throughput of a chain beside that of the groups it was made of, and drift.

    python scripts/bench/bench_transitions.py --rounds 3 --cycles 10
    python scripts/bench/bench_transitions.py --rounds 0 --cycles 0 --drops 50
    python scripts/bench/bench_transitions.py --rounds 0 --cycles 0 --again 20

`throughput`: a load that fits without a drop, on two groups and on the chain they make when an operator asks, by turns;
and the latency of a single request before the first drop and after the last restore. `alone`: the same load without a
server and a client, which take turns on the virtual devices' own cores: whom they keep waiting, a chain waits for.
`commits`: an engine without a server drops at random moments of its steps; by how much the time until the drop is
committed exceeds the longest step of its groups that ran then. `drift`: a burst that makes the server drop, quiet until
it has restored, and again: throughput, memory of the process and free chunks of each cycle.
The prefix cache is off: loads that come again, with equal prompts, are to be computed each time.
Needs a machine with nothing else to do. The last line of stdout is one JSON object; the rest goes to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from statistics import median
from typing import Any
from unittest.mock import patch

import psutil
from compare_policies import Burst, measure
from own_server import Server, post_json, running_server

from kunserve.config import EngineConfig, parse_devices
from kunserve.engine.engine import Engine
from kunserve.engine.group import Group
from kunserve.engine.launch.launch import Served, launch
from kunserve.engine.request import Request
from kunserve.engine.signals import loop_time
from kunserve.engine.text.stream import OutputStream
from kunserve.sampling import SamplingParams

ADMIN_KEY = "bench"
NO_CACHE = "--no-enable-prefix-caching"
ONE = Burst(1, 1000.0, 64, 64)
LOAD = Burst(40, 1000.0, 64, 128)  # all at once: 7,680 tokens of KV
BURST = Burst(48, 16.0, 64, 128)  # 9,216 tokens of KV


async def tokens_per_s(server: Server, load: Burst, seed: int) -> float:
    """Measure the output tokens per second of one load."""
    result = await measure((server.url,), load, seed)
    rate: float = result["summary"]["output_tokens_per_s"]
    return rate


async def latency(server: Server) -> dict[str, float]:
    """Measure TTFT and TPOT of one request on an idle server: medians of five."""
    results = [(await measure((server.url,), ONE, seed))["summary"] for seed in range(5)]
    return {name: median(r[name]["p50"] for r in results) for name in ("ttft_s", "tpot_s")}


async def regroup(server: Server, verb: str) -> None:
    """Drop or restore, as an operator, and wait until it is over."""
    await post_json(f"{server.url}/kunserve/{verb}", {}, ADMIN_KEY)
    while (await server.state())["transitions"][-1]["outcome"] == "running":
        await asyncio.sleep(0.2)


async def throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the tokens a second by turns: undropped, dropped."""
    flags = ("--model", args.model, "--devices", args.devices, "--num-gpu-blocks-override", str(args.blocks))
    undropped, dropped = [], []
    async with running_server(*flags, NO_CACHE, "--pin", "--admin-key", ADMIN_KEY) as server:
        await measure((server.url,), ONE, 0)
        before = await latency(server)
        for seed in range(args.rounds):
            undropped.append(await tokens_per_s(server, LOAD, seed))
            await regroup(server, "drop")
            dropped.append(await tokens_per_s(server, LOAD, seed))
            await regroup(server, "restore")
            print(f"undropped {undropped[-1]:.1f}, dropped {dropped[-1]:.1f} tokens/s", file=sys.stderr)
        after = await latency(server)
    ratios = [d / u for d, u in zip(dropped, undropped, strict=True)]
    return {
        "undropped_tokens_per_s": undropped,
        "dropped_tokens_per_s": dropped,
        "median_ratio": median(ratios),
        "idle_before": before,
        "idle_after": after,
    }


async def launched(args: argparse.Namespace) -> Served:
    """Start an engine in this process that regroups only when it is asked."""
    config = EngineConfig(
        args.model,
        parse_devices(args.devices),
        num_blocks_override=args.blocks,
        enable_prefix_caching=False,
        is_pinned=True,
    )
    served = await launch(config, "bench", lambda text, share: None)
    await served.engine.start()
    return served


def asked(engine: Engine, seed: int) -> list[OutputStream]:
    """Submit all requests of a load; return their streams."""
    rng = random.Random(seed)
    params = SamplingParams(LOAD.num_output_tokens, temperature=0, ignore_eos=True)
    most = min(40_000, engine.model.vocab_size)
    prompts = [rng.choices(range(most // 40, most), k=LOAD.num_prompt_tokens) for _ in range(LOAD.num_requests)]
    return [engine.submit(Request(f"{seed}-{i}", prompt, params)) for i, prompt in enumerate(prompts)]


async def settled(served: Served) -> None:
    """Return when no transition is under way."""
    while served.control.reconfigure.transitions.current is not None:
        await asyncio.sleep(0.05)


async def commits(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the time of drops until they commit, beyond the longest step of their groups meanwhile."""
    served, returned = await launched(args), Group.returned
    engine, rng, steps = served.engine, random.Random(0), list[tuple[float, float]]()

    def note(group: Group, launched_s: float, now_s: float) -> float:
        step_s = returned(group, launched_s, now_s)
        steps.append((now_s, step_s))
        return step_s

    committed, beyond = list[float](), list[float]()
    with patch.object(Group, "returned", note):
        for seed in range(args.drops):
            streams = asked(engine, seed)
            async for _ in streams[-1]:  # all of them have begun
                break
            await asyncio.sleep(rng.uniform(0.0, 0.5))
            decided_s = loop_time()
            committed.append((await engine.drop())["seconds"]["committed"])
            ended_s = decided_s + committed[-1]
            during = [step_s for at_s, step_s in steps if at_s > decided_s and at_s - step_s < ended_s]
            beyond.append(committed[-1] - max(during, default=0.0))
            print(f"{seed}: {1e3 * committed[-1]:.1f} ms, {1e3 * beyond[-1]:+.1f} beyond a step", file=sys.stderr)
            await settled(served)
            for i in range(LOAD.num_requests):
                engine.abort(f"{seed}-{i}")
            await engine.restore()
            await settled(served)
            steps.clear()
    await engine.stop()
    await served.close()
    return {"committed_s": spread(committed), "beyond_a_step_s": spread(beyond)}


def spread(seconds: list[float]) -> dict[str, float]:
    """Return median, ninetieth percentile and most."""
    ordered = sorted(seconds)
    return {"p50": median(ordered), "p90": ordered[int(0.9 * (len(ordered) - 1))], "max": ordered[-1]}


async def engine_throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Measure as `throughput` does, of an engine in this process."""
    served = await launched(args)
    engine, rates = served.engine, dict[str, list[float]](undropped=[], dropped=[])

    async def run(seed: int) -> float:
        started_s = time.perf_counter()
        for stream in asked(engine, seed):
            async for _ in stream:
                pass
        return LOAD.num_requests * LOAD.num_output_tokens / (time.perf_counter() - started_s)

    await run(args.rounds)
    for seed in range(args.rounds):
        rates["undropped"].append(await run(seed))
        await engine.drop()
        await settled(served)
        rates["dropped"].append(await run(seed))
        await engine.restore()
        await settled(served)
        print({name: round(values[-1], 1) for name, values in rates.items()}, file=sys.stderr)
    await engine.stop()
    await served.close()
    ratios = [d / u for d, u in zip(rates["dropped"], rates["undropped"], strict=True)]
    return {"tokens_per_s": rates, "median_ratio": median(ratios)}


async def drift(args: argparse.Namespace) -> dict[str, Any]:
    """Measure bursts with quiet between them: speed, memory and blocks after each."""
    flags = ("--model", args.model, "--devices", args.devices, "--num-gpu-blocks-override", str(args.blocks * 3 // 4))
    cycles = []
    async with running_server(*flags, NO_CACHE, "--restore-hold", "2") as server:
        process = psutil.Process(server.pid)
        num_groups = len((await server.state())["groups"])
        for seed in range(args.cycles):
            rate = await tokens_per_s(server, BURST, seed)
            while len((state := await server.state())["groups"]) < num_groups:
                await asyncio.sleep(0.5)
            cycle = {
                "tokens_per_s": rate,
                "rss_mib": process.memory_info().rss / 2**20,
                "free_chunks": [device["chunks"]["free"] for device in state["devices"]],
                "used_blocks": [group["blocks"]["used"] for group in state["groups"]],
                "transitions": len(state["transitions"]),
                "preemptions": state["requests"]["preemptions"],
            }
            print(cycle, file=sys.stderr)
            cycles.append(cycle)
    return {"cycles": cycles}


async def again(args: argparse.Namespace) -> dict[str, Any]:
    """Measure two bursts with a pause between."""
    flags = ("--model", args.model, "--devices", args.devices, "--num-gpu-blocks-override", str(args.blocks * 3 // 4))
    bursts = list[dict[str, Any]]()
    async with running_server(*flags, NO_CACHE) as server:
        await measure((server.url,), ONE, 0)
        for seed in range(2):
            await asyncio.sleep(args.again if seed else 0.0)
            before = await server.state()
            summary = (await measure((server.url,), BURST, seed))["summary"]
            new = (await server.state())["transitions"][len(before["transitions"]) :]
            burst = {
                "groups_before": len(before["groups"]),
                "p99_ttft_s": summary["ttft_s"]["p99"],
                "longest_gap_s": summary["longest_gap_s"],
                "tokens_per_s": summary["output_tokens_per_s"],
                "transitions": [
                    (t["kind"], t["started_s"] - before["now_s"], t["seconds"].get("committed")) for t in new
                ],
            }
            print(burst, file=sys.stderr, flush=True)
            bursts.append(burst)
    return {"pause_s": args.again, "bursts": bursts}


async def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--devices", default="cpu:2")
    parser.add_argument("--blocks", type=int, default=256, help="KV blocks of 16 tokens on each device")
    parser.add_argument("--rounds", type=int, default=3, help="of throughput; 0: not measured")
    parser.add_argument("--cycles", type=int, default=10, help="of drift; 0: not measured")
    parser.add_argument("--drops", type=int, default=0, help="of commits; 0: not measured")
    parser.add_argument("--again", type=float, default=0.0, help="seconds between two bursts; 0: not measured")
    args = parser.parse_args()
    report: dict[str, Any] = {}
    if args.rounds:
        report["alone"] = await engine_throughput(args)
        report["throughput"] = await throughput(args)
    if args.drops:
        report["commits"] = await commits(args)
    if args.again:
        report["again"] = await again(args)
    if args.cycles:
        report["drift"] = await drift(args)
    print(json.dumps(report))


if __name__ == "__main__":
    asyncio.run(main())
