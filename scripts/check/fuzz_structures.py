"""Ask a server for structures as nobody should, at every endpoint, while its other streams have to stay exact.

    python scripts/check/fuzz_structures.py --minutes 10 --seed 1 --kill-every 20

Starts a server of its own (or takes the one at --url, of which no process is killed). Sixteen streams, eight of them
constrained, are asked for once while nothing else happens, and again and again while `--workers` clients send made
schemas, grammars, regexes and choices (made_structures.py), and the server's health is asked for ten times a second.
With --kill-every a process of a structure is killed by hand every so many seconds, now and then their fork server.
Ends with one JSON line; exits with 1 if the server has died, an answer was 5xx other than 503 or none at all, a
stream differed from the first time, or a health check took longer than --max-health.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import made_structures
import structured_output

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from own_server import ServerProcess

from kunserve.percentiles import quantile

ANSWER_S = 180.0
DEATHS = re.compile(r'^kunserve:structure_process_deaths_total\{.*reason="(\w+)"\} (\S+)$', re.MULTILINE)


@dataclass(slots=True)
class Found:
    """What happened."""

    statuses: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)  # answers that must not be
    num_streams: int = 0
    wrong: list[str] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    num_killed: int = 0


def stream_bodies(seed: int) -> list[dict[str, Any]]:
    """Make the bodies of sixteen requests, every second one constrained."""
    bodies = []
    for i, schema in enumerate(structured_output.make_schemas(seed)[:16]):
        message = {"role": "user", "content": f"Describe {structured_output.TOPICS[i % 8]} as JSON."}
        body: dict[str, Any] = {"messages": [message], "max_tokens": 60, "seed": seed + i, "stream": True}
        body["temperature"] = 0 if i % 4 < 2 else 1
        if i % 2:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
        bodies.append(body)
    return bodies


async def read_stream(session: aiohttp.ClientSession, body: dict[str, Any]) -> str:
    """Return the text and the end of a streamed answer, or what went wrong."""
    parts: list[str] = []
    async with session.post("/v1/chat/completions", json=body) as response:
        if response.status != 200:
            return f"{response.status}: {await response.text()}"
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    return f"{''.join(parts)}: {event['error']}"
                choice = event["choices"][0]
                parts += [choice["delta"].get("content") or "", choice["finish_reason"] or ""]
    return "|".join(parts)


async def repeat_stream(session: aiohttp.ClientSession, body: dict[str, Any], expected: str, found: Found) -> None:
    while True:
        answer = await read_stream(session, body)
        found.num_streams += 1
        if answer != expected:
            found.wrong.append(f"{answer!r} instead of {expected!r}")


async def send_structures(session: aiohttp.ClientSession, rng: random.Random, found: Found) -> None:
    while True:
        path, body = made_structures.asked(rng, made_structures.make(rng))
        try:
            text = json.dumps(body)
        except RecursionError:
            continue
        try:
            async with session.post(path, data=text, headers={"Content-Type": "application/json"}) as response:
                answer = (await response.read()).decode(errors="replace")
                status = str(response.status)
        except (aiohttp.ClientError, TimeoutError) as error:
            status, answer = "none", repr(error)
        found.statuses[status] += 1
        if status == "none" or (status[0] == "5" and status != "503"):
            found.bad.append(f"{path} {status} {answer[:300]}: {text[:300]}")


_WATCH = """
import http.client, sys, time
while True:
    connection = http.client.HTTPConnection(sys.argv[1], timeout=60)
    started = time.perf_counter()
    connection.request("GET", "/health")
    connection.getresponse().read()
    print(time.perf_counter() - started, flush=True)
    connection.close()
    time.sleep(0.1)
"""


async def watch_health(url: str, found: Found) -> None:
    """Watch the server's health from a process of its own: this one is busy making structures."""
    address = url.partition("://")[2]
    watch = await asyncio.create_subprocess_exec(sys.executable, "-c", _WATCH, address, stdout=subprocess.PIPE)
    try:
        assert watch.stdout is not None
        async for line in watch.stdout:
            found.health_s.append(float(line))
        raise RuntimeError("the server's health cannot be asked for any more")
    finally:
        with contextlib.suppress(ProcessLookupError):
            watch.kill()
        await watch.wait()


def children_of(pid: int) -> list[int]:
    """Return the ids of a process's children, those of its threads included."""
    found: list[int] = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/children") as file:
            found += map(int, file.read().split())
    return found


async def kill_processes(pid: int, every_s: float, rng: random.Random, found: Found) -> None:
    while True:
        await asyncio.sleep(every_s)
        try:
            fork_servers = children_of(pid)
            processes = [child for parent in fork_servers for child in children_of(parent)]
            victims = rng.sample(processes, min(3, len(processes))) if rng.random() < 0.8 else fork_servers
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
                found.num_killed += 1
        except OSError:  # it has ended meanwhile
            continue


async def fuzz(url: str, args: argparse.Namespace, pid: int | None) -> dict[str, Any]:
    found, bodies = Found(), stream_bodies(args.seed)
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        expected = await asyncio.gather(*(read_stream(session, body) for body in bodies))
        work: list[Coroutine[Any, Any, None]] = [watch_health(url, found)]
        work += [repeat_stream(session, body, text, found) for body, text in zip(bodies, expected, strict=True)]
        work += [send_structures(session, random.Random(f"{args.seed} {i}"), found) for i in range(args.workers)]
        if pid is not None and args.kill_every:
            work.append(kill_processes(pid, args.kill_every, random.Random(args.seed), found))
        tasks = [asyncio.create_task(each) for each in work]
        done, _ = await asyncio.wait(tasks, timeout=60 * args.minutes, return_when=asyncio.FIRST_EXCEPTION)
        failures = [repr(task.exception()) for task in done]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with session.get("/metrics") as response:
            deaths = {reason: float(count) for reason, count in DEATHS.findall(await response.text())}
    for text in (*found.bad[:20], *found.wrong[:20], *failures):
        print(text, file=sys.stderr)
    health = sorted(found.health_s)
    return {
        "minutes": args.minutes,
        "seed": args.seed,
        "structures": sum(found.statuses.values()),
        "by_status": dict(sorted(found.statuses.items())),
        "bad_answers": len(found.bad),
        "streams": found.num_streams,
        "wrong_streams": len(found.wrong),
        "health_checks": len(health),
        "slowest_health_s": round(health[-1], 3) if health else None,
        "p99_health_s": round(quantile(health, 0.99), 3) if health else None,
        "killed_by_hand": found.num_killed,
        "process_deaths": deaths,
        "failures": failures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server (default: starts one)")
    parser.add_argument("--model", default="smollm2-135m", help="of the server that it starts")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=8, help="clients that send structures")
    parser.add_argument("--kill-every", type=float, default=0.0, metavar="S", help="seconds; 0: kill nothing")
    parser.add_argument("--max-health", type=float, default=0.2, metavar="S")
    args = parser.parse_args()
    if args.url is not None:
        result = asyncio.run(fuzz(args.url.rstrip("/"), args, None))
    else:
        with ServerProcess(args.model, "--disable-access-log") as server:
            result = asyncio.run(fuzz(server.url, args, server.pid))
            result["is_alive"] = server.is_running
            if not server.is_running:
                print(server.log[-4000:], file=sys.stderr)
    print(json.dumps(result))
    is_good = not (result["bad_answers"] or result["wrong_streams"] or result["failures"])
    sys.exit(not (is_good and result["slowest_health_s"] <= args.max_health and result.get("is_alive", True)))


if __name__ == "__main__":
    main()
