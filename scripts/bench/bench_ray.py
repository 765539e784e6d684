"""What the way through Ray Serve costs: the same streams to one replica direct and through the front, by turns.

The server is the same in both cases: direct, clients ask it on the replica's own Unix socket. So the figures differ by
Serve's proxy and the front alone. First all streams come at once: how many tokens a second each way carries at most.
Then the same requests come at half of what the direct way carries, whether or not the ones before have ended: how long
first tokens take there, and how many tokens a second arrive while requests do.

Where cores are shared, the most that the front's way carries says how many cores there are: all that it costs is taken
from the server. What a token costs each process is said, too. Needs the extra `ray`. Ends with one line of JSON.
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
    """One round: how long first tokens took, how many tokens came in the seconds that count, and what they cost."""

    ttfts_s: list[float]
    num_tokens: int
    seconds: float
    cpu_s: dict[str, float]

    @property
    def tokens_per_s(self) -> float:
        """Return the throughput."""
        return self.num_tokens / self.seconds


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
    """Send as many streams at once as there are; with a rate, streams come for `--seconds`, Poisson.

    With a rate, tokens count that come while requests do, without the seconds in which the first ones fill the server.
    """
    chance, times = random.Random(seed), [0.0] * args.streams
    if rate:
        times = [chance.expovariate(rate)]
        while times[-1] < args.seconds:
            times.append(times[-1] + chance.expovariate(rate))
    prompts = [[chance.randrange(256) for _ in range(64)] for _ in times]
    seen: list[tuple[float, int]] = []  # when events came, and how many tokens they brought

    async def one(i: int) -> float:
        await asyncio.sleep(times[i])
        body = {"prompt": prompts[i], "max_tokens": args.tokens, "ignore_eos": True}
        options = {"include_usage": True, "continuous_usage_stats": True}
        sent, ttft_s, num_tokens = time.perf_counter(), 0.0, 0
        asked = {"model": NAME, **body, "stream": True, "stream_options": options}
        async with session.post(f"{url}/v1/completions", json=asked) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    now, known = time.perf_counter(), json.loads(line[6:])["usage"]["completion_tokens"]
                    ttft_s = ttft_s or now - sent
                    seen.append((now - started, known - num_tokens))
                    num_tokens = known
        if num_tokens != args.tokens:
            raise RuntimeError(f"{num_tokens} tokens instead of {args.tokens}")
        return ttft_s

    started, before = time.perf_counter(), cpu_seconds()
    ttfts_s = await asyncio.gather(*map(one, range(len(times))))
    seconds, after = time.perf_counter() - started, cpu_seconds()
    spent = {kind: after[kind] - before[kind] for kind in after}
    first, last = (args.fill, args.seconds) if rate else (0.0, seconds)
    return Run(ttfts_s, sum(n for at_s, n in seen if first <= at_s <= last), last - first, spent)


async def measure(args: argparse.Namespace, url: str, socket: str) -> dict[str, Any]:
    """Return the figures of both ways, each the median of rounds that alternate."""
    direct = aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket, limit=0))
    through = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    ways = {"direct": (direct, "http://kunserve"), "front": (through, url)}
    async with direct, through:

        async def rounds(rate: float) -> dict[str, list[Run]]:
            runs: dict[str, list[Run]] = {name: [] for name in ways}
            for i in range(args.rounds):
                for name in list(ways)[:: -1 if i % 2 else 1]:
                    runs[name].append(await round_of(*ways[name], args, rate, i))
                    told = runs[name][-1]
                    ttft_ms = 1000 * statistics.median(told.ttfts_s)
                    print(f"{name} {rate:.1f}/s: {told.tokens_per_s:.0f} tokens/s, {ttft_ms:.1f} ms", flush=True)
            return runs

        for way in ways.values():  # what is compiled or cached at the first request
            await round_of(*way, args, 0.0, -1)
        full = await rounds(0.0)
        rate = statistics.median(run.tokens_per_s for run in full["direct"]) / args.tokens / 2
        half = await rounds(rate)
    return {
        "requests_per_s_at_half_load": round(rate, 2),
        "half_load": figures_of(half),
        "full_load": figures_of(full),
        "cpu_us_a_token_at_full_load": {name: cpu_of(runs) for name, runs in full.items()},
    }


def figures_of(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Return throughput and time to the first token of both ways, and what the front's has less and more of."""
    speeds = {name: statistics.median(run.tokens_per_s for run in found) for name, found in runs.items()}
    ttfts = {
        name: 1000 * statistics.median(ttft for run in found for ttft in run.ttfts_s) for name, found in runs.items()
    }
    return {
        "tokens_per_s": {name: round(speed) for name, speed in speeds.items()},
        "throughput_less_percent": round(100 * (1 - speeds["front"] / speeds["direct"]), 1),
        "ttft_p50_ms": {name: round(ttft, 1) for name, ttft in ttfts.items()},
        "ttft_more_ms": round(ttfts["front"] - ttfts["direct"], 1),
    }


def cpu_of(runs: list[Run]) -> dict[str, float]:
    """Return the CPU microseconds that a token costs each kind of process."""
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
    parser.add_argument("--streams", type=int, default=32, help="at once, at full load")
    parser.add_argument("--tokens", type=int, default=64, help="of one answer")
    parser.add_argument("--seconds", type=float, default=12.0, help="in which requests come at half load")
    parser.add_argument("--fill", type=float, default=2.0, help="of these, seconds that throughput does not count")
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or make_model(Path(folder) / NAME)
        with application(4, model=model, flags=args.flags or f"{FLAGS} {NAME}") as url:
            print(json.dumps(asyncio.run(run(args, url, f"{Path(model).name}-0"))))


if __name__ == "__main__":
    main()
