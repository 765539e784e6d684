"""What the way through Ray Serve costs: the same streams to one replica direct and through the front, by turns.

The server is the same in both cases: direct, clients ask it on the replica's own Unix socket. So the figures differ by
Serve's proxy and the front alone. Where cores are shared, what counts is what a token costs each process: that is said,
too. Needs the extra `ray`. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from ray_replicas import APP, FLAGS, NAME, application, make_model

# Processes by what is in their command lines; those of Ray have titles.
KINDS = {"front": "ServeReplica:kunserve:front", "replica": "ServeReplica:kunserve:", "server": "--uds"}
KINDS |= {"proxy": "haproxy", "proxy of Ray": "ProxyActor"}
CLIENT = "client"


@dataclass(frozen=True, slots=True)
class Run:
    """One round: how long first tokens took, how many tokens came in how long, and what each process spent."""

    ttfts_s: list[float]
    num_tokens: int
    seconds: float
    cpu_s: dict[str, float]


def cpu_seconds() -> dict[str, float]:
    """Return the CPU seconds of all processes so far, by kind; what they have lost to others does not count."""
    found = dict.fromkeys((CLIENT, *KINDS), 0.0)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().decode(errors="replace")
            times = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
        except OSError:  # it has ended
            continue
        own = CLIENT if int(folder.name) == os.getpid() else None
        kind = own or next((kind for kind, part in KINDS.items() if part in title), None)
        if kind is not None:
            found[kind] += sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
    return found


async def round_of(session: aiohttp.ClientSession, url: str, args: argparse.Namespace, rate: float, seed: int) -> Run:
    """Send streams at a rate, Poisson; at rate 0 as many at once as there are."""
    chance, at_s, times = random.Random(seed), 0.0, list[float]()
    for _ in range(args.streams):
        at_s += chance.expovariate(rate) if rate else 0.0
        times.append(at_s)

    async def one(i: int) -> tuple[float, int]:
        await asyncio.sleep(times[i])
        body = {"prompt": [chance.randrange(256) for _ in range(64)], "max_tokens": args.tokens, "ignore_eos": True}
        usage: dict[str, int] = {}
        started, ttft_s = time.perf_counter(), 0.0
        asked = {"model": NAME, **body, "stream": True, "stream_options": {"include_usage": True}}
        async with session.post(f"{url}/v1/completions", json=asked) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    ttft_s = ttft_s or time.perf_counter() - started
                    usage = json.loads(line[6:])["usage"] or usage
        return ttft_s, usage["completion_tokens"]

    started, before = time.perf_counter(), cpu_seconds()
    told = await asyncio.gather(*map(one, range(args.streams)))
    seconds, after = time.perf_counter() - started, cpu_seconds()
    spent = {kind: after[kind] - before[kind] for kind in after}
    return Run([ttft for ttft, _ in told], sum(n for _, n in told), seconds, spent)


async def measure(args: argparse.Namespace, url: str, socket: str) -> dict[str, Any]:
    """Return the figures of both ways, each the median of rounds that alternate."""
    direct = aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket, limit=0))
    through = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    ways = {"direct": (direct, "http://kunserve"), "front": (through, url)}
    async with direct, through:
        full = {name: list[Run]() for name in ways}
        half = {name: list[float]() for name in ways}
        for i in range(args.rounds + 1):  # the first warms up
            for name, way in ways.items():
                run = await round_of(*way, args, 0.0, i)
                full[name] += [run] if i else []
        speeds = {name: statistics.median(run.num_tokens / run.seconds for run in runs) for name, runs in full.items()}
        rate = speeds["direct"] / args.tokens / 2
        for i in range(args.rounds):
            for name, way in ways.items():
                half[name].append(statistics.median((await round_of(*way, args, rate, 100 + i)).ttfts_s))
    tokens = {name: round(speed) for name, speed in speeds.items()}
    ttfts = {name: round(1000 * statistics.median(values), 1) for name, values in half.items()}
    return {
        "requests_per_s_at_half_load": round(rate, 2),
        "ttft_p50_ms": ttfts,
        "tokens_per_s_at_full_load": tokens,
        "cpu_us_a_token": {name: cpu_of(runs) for name, runs in full.items()},
        "ttft_more_ms": round(ttfts["front"] - ttfts["direct"], 1),
        "throughput_less_percent": round(100 * (1 - tokens["front"] / tokens["direct"]), 1),
    }


def cpu_of(runs: list[Run]) -> dict[str, float]:
    """Return the CPU microseconds that a token costs each kind of process, at full load."""
    num_tokens = sum(run.num_tokens for run in runs)
    spent = {kind: 1e6 * sum(run.cpu_s[kind] for run in runs) / num_tokens for kind in runs[0].cpu_s}
    return {kind: round(us, 1) for kind, us in spent.items() if us >= 0.1}


async def run(args: argparse.Namespace, url: str, deployment: str) -> dict[str, Any]:
    """Find the replica's socket, and measure."""
    from ray import serve

    socket = await serve.get_deployment_handle(deployment, APP).socket.remote()
    return await measure(args, url, socket)


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: a tiny one with random weights")
    parser.add_argument("--flags", default=None, help="of the server, if not those of the tiny model")
    parser.add_argument("--streams", type=int, default=32, help="of one round")
    parser.add_argument("--tokens", type=int, default=64, help="of one answer")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or make_model(Path(folder) / NAME)
        with application(4, model=model, flags=args.flags or f"{FLAGS} {NAME}") as url:
            print(json.dumps(asyncio.run(run(args, url, f"{Path(model).name}-0"))))


if __name__ == "__main__":
    main()
