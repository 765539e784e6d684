"""Scrape /metrics of a running server every 50 ms while a burst runs, as a router does: how fast, and how stale.

    python -m kunserve.server smollm2-135m --port 8200 &
    python scripts/check/scrape_metrics.py http://127.0.0.1:8200 --requests 100

Staleness of a scrape: for how long the clients together have had more tokens than `vllm:generation_tokens_total` says.
Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from bisect import bisect_right
from statistics import median
from typing import Any

import aiohttp

from kunserve.percentiles import quantile

TOKENS = re.compile(rb"^vllm:generation_tokens_total\{[^}]*\} (\S+)", re.MULTILINE)
INTERVAL_S = 0.05


async def _stream(session: aiohttp.ClientSession, body: dict[str, Any], arrivals: list[float]) -> bool:
    """Note when each token came (one event each); whether it ended well."""
    async with session.post("/v1/completions", json=body) as response:
        async for line in response.content:
            if line.startswith(b"data: {"):
                arrivals.append(time.perf_counter())
        return response.status == 200 and line_is_last(line)


def line_is_last(line: bytes) -> bool:
    """Tell whether a stream ended as it should."""
    return line in (b"\n", b"data: [DONE]\n")


async def _scrape(session: aiohttp.ClientSession) -> tuple[float, float, float]:
    """Return when the answer was asked for and when it was there, and the tokens it tells."""
    begun = time.perf_counter()
    async with session.get("/metrics") as response:
        text = await response.read()
    ended = time.perf_counter()
    found = TOKENS.search(text)
    assert response.status == 200 and found is not None
    return begun, ended, float(found[1])


async def measure(url: str, num_requests: int, num_tokens: int) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=1200)
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session,
        aiohttp.ClientSession(url) as router,
    ):
        await _scrape(router)
        _, _, before = await _scrape(router)
        arrivals: list[float] = []
        scrapes: list[tuple[float, float, float]] = []
        body = {"prompt": "Once upon a time", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        bodies = ({**body, "prompt": f"Once upon a time {i}"} for i in range(num_requests))
        burst = asyncio.gather(*(_stream(session, one, arrivals) for one in bodies))
        due = time.perf_counter()
        while not burst.done():
            due = max(due + INTERVAL_S, time.perf_counter())
            await asyncio.sleep(due - time.perf_counter())
            scrapes.append(await _scrape(router))
        ended_well = sum(await burst)
    stale_s = []
    for begun, _, value in scrapes:
        shown = round(value - before)
        had = bisect_right(arrivals, begun)
        stale_s.append(begun - arrivals[shown] if had > shown else 0.0)
    answer_s = sorted(ended - begun for begun, ended, _ in scrapes)
    return {
        "requests": num_requests,
        "ended_well": ended_well,
        "tokens": len(arrivals),
        "scrapes": len(scrapes),
        "median_ms": round(median(answer_s) * 1e3, 1),
        "p99_ms": round(quantile(answer_s, 0.99) * 1e3, 1),
        "slowest_ms": round(answer_s[-1] * 1e3, 1),
        "most_stale_ms": round(max(stale_s) * 1e3, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    print(json.dumps(asyncio.run(measure(args.url.rstrip("/"), args.requests, args.tokens))))


if __name__ == "__main__":
    main()
