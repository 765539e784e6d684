"""Serve adds a replica while demand asks for it, and takes it away while it has streams: all must be right.

Needs the extra `ray`: `make test-ray`. Ends with one line of JSON, and with status 1 if a stream is wrong or lost, or
if no replica came or went.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
from ray_replicas import APP, FLAGS, NAME, STREAM_S, Job, Said, application, make_model, problem_of, stream, undisturbed

MANY_STREAMS, FEW_STREAMS = 64, 5  # streams at once: while another replica is wanted, and while one is too many
LOOK_EVERY_S = 0.5
WAIT_S = 150.0  # at most, for a replica to come or to go


def jobs_of(num_tokens: int) -> Iterator[Job]:
    """Yield streams without end, greedy and seeded by turns."""
    i = 0
    while True:
        chosen = {"seed": i, "temperature": 1.0} if i % 2 else {"temperature": 0}
        body = {"model": NAME, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, **chosen}
        yield Job("/v1/completions", {**body, "prompt": f"{i} times", "max_tokens": num_tokens}, 0.0, None)
        i += 1


async def keep(
    url: str,
    num: int,
    jobs: Iterator[Job],
    done: list[tuple[Job, Said | BaseException]],
    is_over: Callable[[int], bool],
) -> float:
    """Keep `num` streams running until `is_over` is true of the number of replicas; return the seconds that took."""
    over, started = asyncio.Event(), time.monotonic()

    async def streams(session: aiohttp.ClientSession) -> None:
        while not over.is_set():
            job = next(jobs)
            try:
                async with asyncio.timeout(STREAM_S):
                    done.append((job, await stream(session, url, job)))
            except Exception as error:
                done.append((job, error))
                return

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        running = [asyncio.create_task(streams(session)) for _ in range(num)]
        try:
            async with asyncio.timeout(WAIT_S):
                while not is_over(await num_replicas()):
                    await asyncio.sleep(LOOK_EVERY_S)
        finally:
            over.set()
            await asyncio.gather(*running)
    return time.monotonic() - started


async def num_replicas() -> int:
    """Return how many replicas serve; those that drain do not."""
    from ray import serve

    status = await asyncio.to_thread(serve.status)
    number: int = status.applications[APP].deployments[f"{NAME}-0"].replica_states.get("RUNNING", 0)
    return number


async def check(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """Run everything; returns the figures."""
    from ray import serve

    done: list[tuple[Job, Said | BaseException]] = []
    scaling = {"max_replicas": 2, "upscale_delay_s": 1.0, "downscale_delay_s": 3.0, "drain_s": args.drain_s}
    with application(5, model=model, flags=f"{FLAGS} {NAME}", **scaling) as url:
        jobs = jobs_of(args.tokens)
        up_s = await keep(url, MANY_STREAMS, jobs, done, lambda number: number >= 2)
        down_s = await keep(url, FEW_STREAMS, jobs, done, lambda number: number < 2)
        counts = await serve.get_deployment_handle("front", APP).counts.remote()
    expected = await undisturbed({NAME: model}, [job for job, _ in done])
    problems = [problem_of(job, said, wanted) for (job, said), wanted in zip(done, expected, strict=True)]
    for problem in filter(None, problems):
        print(problem[:500], file=sys.stderr)
    figures = {"streams": len(done), "came_after_s": round(up_s, 1), "went_after_s": round(down_s, 1)}
    return {**figures, **counts, "wrong": sum(problem is not None for problem in problems)}


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=600, help="of one answer")
    parser.add_argument("--drain-s", type=float, default=0.5, help="that streams have before they go on elsewhere")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(check(args, make_model(Path(folder) / NAME)))
    print(json.dumps(figures))
    sys.exit(figures["wrong"] > 0)


if __name__ == "__main__":
    main()
