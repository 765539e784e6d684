"""A burst that loses a device in its middle: are all answers right, and how long does anybody wait?

    python scripts/check/lose_device.py --fault lost --devices 3

The burst is 48 requests of 64 random tokens, 16 a second, answered by 256 tokens each: once on a sound server with one
device less, which says what is right and how fast that is, and once with a fault. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from own_server import running_server

VOCAB = 40_000
FLAGS = ("--model", "smollm2-135m", "--num-gpu-blocks-override", "256", "--disable-access-log")


async def ask(session: aiohttp.ClientSession, number: int, delay_s: float, output: int) -> dict[str, Any]:
    """Send one streaming request at its time; returns its text and when each part of it came."""
    await asyncio.sleep(delay_s)
    rng, times, text = random.Random(number), [time.monotonic()], ""
    body = {
        "prompt": [rng.randrange(100, VOCAB) for _ in range(64)],
        "max_tokens": output,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0.0 if number % 2 else 0.9,
        "seed": number,
    }
    async with session.post("/v1/completions", json=body) as response:
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    return {"error": event["error"]["message"], "text": text, "times": times}
                text += event["choices"][0]["text"]
                times.append(time.monotonic())
    return {"text": text, "times": times}


async def burst(devices: int, number: int, output: int, *flags: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Send a burst to a server of its own; returns the answers and the server's state at the end."""
    rng, due, delays = random.Random(7), 0.0, []
    for _ in range(number):
        delays.append(due)
        due += rng.expovariate(16)
    async with running_server(*FLAGS, "--devices", f"cpu:{devices}", *flags) as server:
        async with aiohttp.ClientSession(server.url, timeout=aiohttp.ClientTimeout(None)) as session:
            answers = await asyncio.gather(*(ask(session, i, delay, output) for i, delay in enumerate(delays)))
        return list(answers), await server.state()


def longest_gap_s(answers: list[dict[str, Any]]) -> float:
    """Return the longest time that any stream, once it had begun, was silent."""
    times = [answer["times"][1:] for answer in answers]
    gaps: list[float] = [b - a for of_one in times for a, b in pairwise(of_one)]
    return max(gaps)


def others_gap_s(answers: list[dict[str, Any]], since: float, num_lost: int) -> float:
    """Return the longest silence after a moment of any stream but those `num_lost`, whose were the longest then."""
    times = [answer["times"][1:] for answer in answers]
    longest = sorted(max((b - a for a, b in pairwise(of_one) if b >= since), default=0.0) for of_one in times)
    return longest[-num_lost - 1] if num_lost < len(longest) else 0.0


def rate(answers: list[dict[str, Any]], since: float) -> float:
    """Return parts of answers a second from a moment until the first of the last eight requests has ended."""
    times: list[float] = sorted(t for answer in answers for t in answer["times"][1:])
    until: float = sorted(answer["times"][-1] for answer in answers)[-8]
    return sum(since <= t <= until for t in times) / (until - since)


def figures(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Return how long the burst took, the longest gap, and its tokens a second."""
    begin, end = min(a["times"][0] for a in answers), max(a["times"][-1] for a in answers)
    tokens = sum(len(a["times"]) - 1 for a in answers)
    return {"seconds": end - begin, "longest_gap_s": longest_gap_s(answers), "tokens_per_s": tokens / (end - begin)}


async def run(arguments: argparse.Namespace) -> bool:
    """Run both bursts and print what came of it; returns whether all answers were right."""
    sound, _ = await burst(arguments.devices - 1, arguments.requests, arguments.output)
    faults = ("--inject-faults", f"1:{arguments.fault}@{arguments.at}s", "--device-timeout", str(arguments.timeout))
    hurt, state = await burst(arguments.devices, arguments.requests, arguments.output, *faults)
    wrong = sum(mine["text"] != its["text"] or "error" in mine for mine, its in zip(hurt, sound, strict=True))
    loses = [t for t in state["transitions"] if t["kind"] == "lose"]
    # Both on one clock: the server's is the machine's monotonic one.
    began_s = min(a["times"][0] for a in sound) + arguments.at
    after = loses[0]["started_s"] + loses[0]["seconds"]["total"] if loses else 0.0
    found = {
        "devices": arguments.devices,
        "fault": f"{arguments.fault}@{arguments.at}s",
        "timeout_s": arguments.timeout,
        "answers": len(hurt),
        "wrong": wrong,
        "states": [device["state"] for device in state["devices"]],
        "lose_s": [t["seconds"]["total"] for t in loses],
        "hurt": figures(hurt),
        "sound": figures(sound),
        "parts_per_s_after": rate(hurt, after),
        "parts_per_s_sound": rate(sound, began_s),
        "others_gap_s": others_gap_s(hurt, after, state["requests"]["preemptions"]),
        "sound_gap_s": others_gap_s(sound, began_s, 0),
        "preemptions": state["requests"]["preemptions"],
    }
    print(json.dumps(found, default=lambda value: round(value, 3)))
    return not wrong


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description="lose a device in a burst")
    parser.add_argument("--devices", type=int, default=3)
    parser.add_argument("--fault", default="lost")
    parser.add_argument("--at", type=float, default=6.0, help="seconds after the first step")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds after which a silent device is lost")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--output", type=int, default=256)
    sys.exit(0 if asyncio.run(run(parser.parse_args())) else 1)


if __name__ == "__main__":
    main()
