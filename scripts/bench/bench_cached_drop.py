#!/usr/bin/env python3
"""What a forced drop and a restore leave of the prefix cache: hit rates of one stream of requests, before and after.

    python scripts/bench/bench_cached_drop.py --requests 200 --systems 8

Requests begin with one of a few system prompts and end in words of their own, several at a time. After two fifths of
them an operator drops, after two more restores; each counts for the phase in which it was sent. The first so many that
see a system prompt for the first time count for none. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections import Counter
from typing import Any

import aiohttp
from own_server import Server, post_json, running_server

ADMIN_KEY = "bench"
PHASES = ("before", "dropped", "restored")


def parse_arguments() -> argparse.Namespace:
    """Read the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--devices", default="cpu:2")
    parser.add_argument("--blocks", type=int, default=256, help="KV blocks of 16 tokens on each device")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--systems", type=int, default=8, help="system prompts")
    parser.add_argument("--system-len", type=int, default=320, help="tokens of each")
    parser.add_argument("--own-len", type=int, default=32, help="tokens of a request's own")
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_prompts(args: argparse.Namespace) -> list[tuple[int, list[int]]]:
    """Return the system prompt's number and the tokens of each request."""
    rng = random.Random(args.seed)
    systems = [rng.choices(range(1000, 40_000), k=args.system_len) for _ in range(args.systems)]
    numbers = [rng.randrange(args.systems) for _ in range(args.requests)]
    return [(number, systems[number] + rng.choices(range(1000, 40_000), k=args.own_len)) for number in numbers]


async def regroup(server: Server, verb: str) -> None:
    """Drop or restore, and return when it is over."""
    await post_json(f"{server.url}/kunserve/{verb}", {}, ADMIN_KEY)
    while (await server.state())["transitions"][-1]["outcome"] == "running":
        await asyncio.sleep(0.02)


async def measure(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Send the stream, and regroup in the middle of it."""
    prompts, phase, seen = make_prompts(args), 0, set[int]()
    asked, found = Counter[str](), Counter[str]()
    slots, regrouping = asyncio.Semaphore(args.concurrency), list[asyncio.Task[None]]()

    async with aiohttp.ClientSession() as session:

        async def send(system: int, prompt: list[int], its_phase: str) -> None:
            body = {"prompt": prompt, "max_tokens": args.output_len, "temperature": 0, "ignore_eos": True}
            async with session.post(f"{server.url}/v1/completions", json=body) as response:
                response.raise_for_status()
                usage = (await response.json())["usage"]
            slots.release()
            if system in seen:
                asked[its_phase] += usage["prompt_tokens"]
                found[its_phase] += usage["prompt_tokens_details"]["cached_tokens"]
            seen.add(system)

        async with asyncio.TaskGroup() as tasks:
            for number, (system, prompt) in enumerate(prompts):
                await slots.acquire()
                if number in (2 * args.requests // 5, 4 * args.requests // 5):
                    regrouping.append(tasks.create_task(regroup(server, "restore" if phase else "drop")))
                    phase += 1
                tasks.create_task(send(system, prompt, PHASES[phase]))
    rates = {name: found[name] / asked[name] for name in PHASES}
    return {"hit_rates": rates, "spread": max(rates.values()) - min(rates.values())}


async def main() -> None:
    """Measure, and print the report."""
    args = parse_arguments()
    flags = ("--model", args.model, "--devices", args.devices, "--num-gpu-blocks-override", str(args.blocks))
    async with running_server(*flags, "--pin", "--admin-key", ADMIN_KEY) as server:
        report = await measure(server, args)
        transitions = (await server.state())["transitions"]
    print(json.dumps({**report, "outcomes": [each["outcome"] for each in transitions]}))


if __name__ == "__main__":
    asyncio.run(main())
