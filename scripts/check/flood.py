"""Flood a running server: every request gets its 200 or its 503, soon; who came in is served; nobody is starved.

    python -m kunserve.server smollm2-135m --port 8200 --max-num-queued-reqs 256 --api-key a --api-key b &
    python scripts/check/flood.py http://127.0.0.1:8200 --key a --other-key b --pid $!

10,000 requests in ten seconds, each on a connection of a pool, sent whether or not earlier ones are answered. With
`--other-key`, somebody else asks one thing after another meanwhile. With `--pid`, memory is looked at after each
flood. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from kunserve.percentiles import quantile

PAGE_BYTES = 4096


@dataclass(slots=True)
class Flood:
    """What became of the requests so far: (status, seconds)."""

    host: str
    port: int
    answers: list[tuple[str, float]] = field(default_factory=list)
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    async def ask(self, message: bytes, answers: list[tuple[str, float]]) -> None:
        """Send one request on an idle connection or a new one. The client is as bare as can be: it shares the CPUs."""
        started = time.perf_counter()
        status = "failed"
        try:
            reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection(self.host, self.port)
            writer.write(message)
            head = await reader.readuntil(b"\r\n\r\n")
            fields = head.lower().split(b"\r\n")
            length = next(int(line[16:]) for line in fields if line.startswith(b"content-length: "))
            await reader.readexactly(length)
            status = head[9:12].decode()
            if status == "503" and not any(line.startswith(b"retry-after: ") for line in fields):
                status = "503 without Retry-After"
            self.idle.append((reader, writer))
        except (OSError, asyncio.IncompleteReadError) as error:
            status = type(error).__name__
        answers.append((status, time.perf_counter() - started))

    def close(self) -> None:
        for _, writer in self.idle:
            writer.close()


def make_message(host: str, key: str | None, max_tokens: int) -> bytes:
    """Return a request as it goes over the wire."""
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": max_tokens, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    if key is not None:
        head += f"Authorization: Bearer {key}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def resident_bytes(pid: int) -> int:
    """Return the memory of a process, with the pools of its devices, which are mapped from the start."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


async def flood_once(flood: Flood, message: bytes, num_requests: int, seconds: float) -> list[tuple[str, float]]:
    """Send at an even rate; return when all are answered."""
    answers: list[tuple[str, float]] = []
    tasks: list[asyncio.Task[None]] = []
    started = time.perf_counter()
    while len(tasks) < num_requests:
        due = min(num_requests, int((time.perf_counter() - started) / seconds * num_requests) + 1)
        tasks += [asyncio.create_task(flood.ask(message, answers)) for _ in range(due - len(tasks))]
        await asyncio.sleep(0.002)
    await asyncio.gather(*tasks)
    return answers


async def ask_on(flood: Flood, message: bytes, answers: list[tuple[str, float]]) -> None:
    """Send one request after another, until cancelled."""
    while True:
        await flood.ask(message, answers)
        await asyncio.sleep(0.1)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    url = urlsplit(args.url)
    flood = Flood(url.hostname or "127.0.0.1", url.port or 80)
    message = make_message(flood.host, args.key, args.max_tokens)
    rounds, others, memory = [], list[tuple[str, float]](), []
    other = None
    if args.other_key is not None:
        other_message = make_message(flood.host, args.other_key, args.max_tokens)
        other = asyncio.create_task(ask_on(flood, other_message, others))
    for _ in range(args.rounds):
        rounds.append(await flood_once(flood, message, args.requests, args.seconds))
        if args.pid is not None:
            memory.append(resident_bytes(args.pid) >> 20)
    if other is not None:
        other.cancel()
    flood.close()
    answers = [answer for one in rounds for answer in one]
    refusals = sorted(seconds for status, seconds in answers if status == "503")
    accepted = [seconds for status, seconds in answers if status == "200"]
    return {
        "requests": len(answers),
        "by_status": dict(Counter(status for status, _ in answers)),
        "refused_median_ms": round(median(refusals or [0]) * 1e3, 1),
        "refused_p99_ms": round(quantile(refusals, 0.99) * 1e3, 1) if refusals else None,
        "refused_slowest_ms": round(max(refusals, default=0) * 1e3, 1),
        "accepted_slowest_s": round(max(accepted, default=0), 1),
        "other_by_status": dict(Counter(status for status, _ in others)),
        "other_slowest_s": round(max((seconds for _, seconds in others), default=0), 1),
        "resident_mib": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--key")
    parser.add_argument("--other-key")
    parser.add_argument("--pid", type=int)
    print(json.dumps(asyncio.run(measure(parser.parse_args()))))


if __name__ == "__main__":
    main()
