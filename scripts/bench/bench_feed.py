#!/usr/bin/env python3
"""What viewers of /kunserve/events cost: the event loop's time, and the throughput of a burst. Ends in one JSON line.

First, in this process: an engine of `--devices` whose state changes at every look, and viewers in another process. The
event loop's thread is measured with and without them; the difference is all that the feed costs, sockets included.
Then, with `--rounds N`: burst A of `make bench-overload` against a server, in turns without and with viewers; the
prefix cache is off, as the burst comes again and again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from statistics import median
from typing import Any

import aiohttp
import uvloop
from aiohttp import web
from compare_policies import BURSTS, SETTLE_S, measure
from own_server import free_port, running_server

from kunserve.api.app import create_app
from kunserve.api.operate.feed import FEED
from kunserve.api.wire.backend import ApiSettings, ModelInfo
from kunserve.config import EngineConfig, parse_devices
from kunserve.engine.blocks.block_pool import BlockPool
from kunserve.engine.launch.launch import launch


async def view(url: str, num_viewers: int) -> None:
    """Watch with so many connections until the server ends them; print a line when all are open."""
    num_here = 0

    async def one(session: aiohttp.ClientSession) -> None:
        nonlocal num_here
        async with session.get(f"{url}/kunserve/events") as response:
            num_here += 1
            if num_here == num_viewers:
                print("all are here", flush=True)
            async for _ in response.content.iter_any():
                pass

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await asyncio.gather(*(one(session) for _ in range(num_viewers)), return_exceptions=True)


@asynccontextmanager
async def viewers(url: str, number: int) -> AsyncIterator[None]:
    """Run so many viewers in a process of their own."""
    if not number:
        yield
        return
    arguments = (__file__, "--view", url, "--viewers", str(number))
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        if not await process.stdout.readline():
            raise SystemExit("the viewers could not watch")
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def loop_cost(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the share of a core that the event loop takes with and without viewers."""
    config = EngineConfig(args.model, parse_devices(args.devices), num_blocks_override=args.blocks)
    served = await launch(config, "bench", lambda text, share: None)
    engine, port = served.engine, free_port()
    await engine.start()
    info = ModelInfo(("bench",), engine.limits.max_model_len, "bench", 0)
    app = create_app(engine, served.tokenizer, None, info, served.metrics, ApiSettings(logs_access=False))
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    feed = app[FEED]

    taken: dict[BlockPool, list[int]] = {}

    async def change() -> None:
        while True:  # a busy server's figures change at every look: every pool, every counter
            await asyncio.sleep(0.05)
            engine.scheduler.num_preemptions += 1
            for pool in engine.fleet.pools.values():
                held = taken.pop(pool, None)
                if held is None:
                    taken[pool] = pool.alloc(1) or []
                else:
                    pool.free(held)
            served.metrics.generation_tokens(7)
            served.metrics.inter_tokens([0.01 + engine.scheduler.num_preemptions % 7 / 1000])

    changing = asyncio.create_task(change())
    shares: dict[int, list[float]] = {0: [], args.viewers: []}
    for _ in range(args.turns):
        for number, seen in shares.items():
            async with viewers(f"http://127.0.0.1:{port}", number):
                started_s, used_s = time.perf_counter(), time.thread_time()
                await asyncio.sleep(args.seconds)
                seen.append((time.thread_time() - used_s) / (time.perf_counter() - started_s))
    changing.cancel()
    await runner.cleanup()
    await engine.stop()
    await served.close()
    alone, watched = median(shares[0]), median(shares[args.viewers])
    return {
        "devices": len(engine.memories),
        "loop_share_alone": round(alone, 5),
        "loop_share_watched": round(watched, 5),
        "feed_share_of_a_core": round(watched - alone, 5),
        "tick_ms": round(feed.cpu_s / feed.num_ticks * 1e3, 4),
        "num_ticks": feed.num_ticks,
    }


async def throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Measure tokens per second of a burst without and with viewers, in turns on one server."""
    flags = ("--model", args.model, "--devices", args.devices, "--num-gpu-blocks-override", str(args.blocks))
    rates: dict[int, list[float]] = {0: [], args.viewers: []}
    async with running_server(*flags, "--no-enable-prefix-caching") as server:
        for turn in range(args.rounds):
            order = sorted(rates, reverse=turn % 2 == 1)  # neither always goes first
            for number in order:
                async with viewers(server.url, number):
                    result = await measure((server.url,), BURSTS["A"], args.seed)
                    rates[number].append(result["summary"]["output_tokens_per_s"])
                    print(f"{number} viewers: {rates[number][-1]:.1f} tokens/s", file=sys.stderr)
                    await asyncio.sleep(SETTLE_S)
    alone, watched = max(rates[0]), max(rates[args.viewers])
    return {"tokens_per_s": {str(k): v for k, v in rates.items()}, "best_watched_over_best_alone": watched / alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--viewers", type=int, default=20)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--devices", default="cpu:2")
    parser.add_argument("--blocks", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one measurement of the event loop")
    parser.add_argument("--turns", type=int, default=3, help="of it, without and with viewers")
    parser.add_argument("--rounds", type=int, default=0, help="of the burst, without and with viewers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--view", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.view:
        uvloop.run(view(args.view, args.viewers))
        return
    result = uvloop.run(loop_cost(args))
    if args.rounds:
        result |= uvloop.run(throughput(args))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
