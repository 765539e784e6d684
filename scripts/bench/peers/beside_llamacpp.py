"""Speed of KunServe's servers beside llama.cpp's, by turns in one sitting, through HTTP. Starts no server.

    python scripts/bench/peers/beside_llamacpp.py llamacpp=http://127.0.0.1:8301 q4=http://127.0.0.1:8000 [...]

All servers are ready and idle, with the same model; a prompt is so many token ids, none like another, and answers go on
to their last token (`ignore_eos`). Of each server, in each round: one stream (milliseconds of a token after the first
one), `--streams` at once (tokens a second from the first request to the last token), and one long prompt (its tokens a
second, to the first token of the answer). Shown are medians of rounds, and the best. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import aiohttp

from kunserve.loadgen.client import first_model

FIRST_TOKEN, LAST_TOKEN = 1000, 40_000  # ids that models of the measurements have, none of them special
ROWS = {"ms_per_token": min, "tokens_per_s": max, "prompt_tokens_per_s": max}  # which value of a row is the best


@dataclass(frozen=True, slots=True)
class Answer:
    """When a streamed answer came, in seconds of the clock."""

    started: float
    first: float
    last: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Target:
    """A server, by the name that its figures get."""

    name: str
    url: str
    model: str


async def ask(session: aiohttp.ClientSession, target: Target, prompt: Sequence[int], num_tokens: int) -> Answer:
    """Stream a greedy answer; raise ValueError unless it has exactly `num_tokens`."""
    body = {"model": target.model, "prompt": list(prompt), "max_tokens": num_tokens, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "cache_prompt": False, "stream_options": {"include_usage": True}}
    started, times, found = time.perf_counter(), [], -1
    async with session.post(f"{target.url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event: dict[str, Any] = json.loads(line[6:])
            if any(choice.get("finish_reason") is None for choice in event.get("choices", ())):
                times.append(time.perf_counter())
            if event.get("usage"):
                found = event["usage"]["completion_tokens"]
    if found != num_tokens or not times:
        raise ValueError(f"{target.name} gave {found} tokens instead of {num_tokens}")
    return Answer(started, times[0], time.perf_counter(), num_tokens)


async def measure(session: aiohttp.ClientSession, target: Target, args: argparse.Namespace, seed: str) -> list[float]:
    """Return a figure of each of ROWS."""
    numbers = random.Random(seed)

    def prompt(length: int) -> list[int]:
        return [numbers.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(length)]

    one = await ask(session, target, prompt(args.prompt), args.tokens)
    many = await asyncio.gather(*(ask(session, target, prompt(args.prompt), args.tokens) for _ in range(args.streams)))
    long = await ask(session, target, prompt(args.long_prompt), 2)
    all_s = max(answer.last for answer in many) - min(answer.started for answer in many)
    return [
        1000 * (one.last - one.first) / (one.num_tokens - 1),
        sum(answer.num_tokens for answer in many) / all_s,
        args.long_prompt / (long.first - long.started),
    ]


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds, servers by turns; the first round only warms up, with short answers."""
    found: dict[str, list[list[float]]] = {}
    timeout = aiohttp.ClientTimeout(total=args.timeout)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True)
    ) as session:
        targets = [Target(name, url, await first_model(url, {})) for name, url in args.servers]
        for target in targets:
            await ask(session, target, [FIRST_TOKEN] * 8, 8)
        for i in range(args.rounds):
            for target in targets:
                figures = await measure(session, target, args, f"{i} {target.name}")
                found.setdefault(target.name, []).append(figures)
                print(f"{target.name:12}", *(f"{figure:9.1f} {row}" for figure, row in zip(figures, ROWS, strict=True)))
    return {
        name: {
            row: {"median": round(median(values), 2), "best": round(best(values), 2)}
            for (row, best), values in zip(ROWS.items(), zip(*rounds, strict=True), strict=True)
        }
        for name, rounds in found.items()
    }


def named_server(text: str) -> tuple[str, str]:
    """Read NAME=URL."""
    name, equals, url = text.partition("=")
    if not (name and equals and url.startswith("http")):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=URL")
    return name, url.rstrip("/")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", type=named_server, metavar="NAME=URL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--streams", type=int, default=16, help="at once")
    parser.add_argument("--long-prompt", type=int, default=1024, help="tokens of the prompt that is measured by itself")
    parser.add_argument("--timeout", type=float, default=120, help="seconds that one answer may take")
    args = parser.parse_args()
    print(json.dumps({"bench": "beside_llamacpp", "rounds": args.rounds, "servers": asyncio.run(run(args))}))


if __name__ == "__main__":
    main()
