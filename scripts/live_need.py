#!/usr/bin/env python3
"""What each policy makes of a load that needs so much KV, on a live server: longest gap, first tokens, tokens a second.

    python scripts/live_need.py --trace AzureLLMInferenceTrace_code.csv --need 1.5
    python scripts/live_need.py --lengths sharegpt_8k_filtered_stats_llama2_tokenizer.csv --need 4 --devices cpu:1

The need is the most KV that the load uses at once where there is plenty, over what is mapped without a drop. So the
load is sent to a server with plenty first; the others get as many blocks as make it that need, or a few more: memory is
in whole chunks, in each layer. `need` of the result says what it was. --trace: rows taken at
random from the whole file, as many as --requests, whose times are shrunk until all come within --seconds; --lengths:
rows of a file without times, at Poisson's. As these devices are slow, prompts and answers are divided by --shrink, and
cut where they are longer than --longest still: every device has to hold the longest request. Policies run by turns,
each with a server of its own, --rounds times; figures are medians. The prefix cache is off: every server gets the same
prompts. Needs a machine with nothing else to do. --blocks: as many on each device, as a run before told, and no server
with plenty: so that policies can be measured in runs of their own. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "bench"))

from own_server import Server, running_server

from kunserve.loadgen import report
from kunserve.loadgen.client import Recording, Target, first_model, run
from kunserve.loadgen.workload import Job, make_jobs, poisson_arrivals, stream_of
from kunserve.sim.traces import pick_rows, read_rows, sample_lengths
from kunserve.sizes import ceil_div

PLENTY = "plenty"
BLOCK_SIZE = 16
NO_CACHE = "--no-enable-prefix-caching"
POLL_S = 0.1  # how often the blocks in use are looked at


@dataclass(frozen=True, slots=True)
class Seen:
    """What a server made of the load."""

    longest_gap_s: float
    p50_ttft_s: float
    p99_ttft_s: float
    tokens_per_s: float  # of output, to the last answer
    all_tokens_per_s: float  # with those of prompts
    preemptions: float
    swaps: float
    drops: float
    peak_blocks: float  # in use at once, on all devices
    mapped_blocks: float  # before the first drop, on all devices
    unfinished: float


COLUMNS = ("longest gap s", "TTFT p50", "p99", "tokens/s", "with prompts", "preempted", "swapped", "drops")


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Return what is sent when. ValueError if the file cannot be read."""
    rng = stream_of(args.seed, 0)
    if args.trace:
        rows = read_rows(args.trace, needs_times=True)
        rows = pick_rows(rows, (0.0, float("inf")), args.requests, rng)
        first_s, last_s = rows[0].at_s, rows[-1].at_s
        per_s = args.seconds / max(last_s - first_s, 1e-9)
        times = [(row.at_s - first_s) * per_s for row in rows]
        lengths = [(row.num_prompt_tokens, row.num_output_tokens) for row in rows]
    else:
        times = poisson_arrivals(args.requests / args.seconds, args.requests, rng)
        lengths = sample_lengths(read_rows(args.lengths, needs_times=False), args.requests, stream_of(args.seed, 1))
    by_prompt, by_answer = args.shrink
    shrunk = [(round(prompt / by_prompt), round(answer / by_answer)) for prompt, answer in lengths]
    return make_jobs(times, shrunk, args.longest, 0.0, stream_of(args.seed, 2))


def blocks_of(job: Job) -> int:
    """Return the blocks that a request fills by its end."""
    return ceil_div(job.num_prompt_tokens + job.num_output_tokens, BLOCK_SIZE)


async def serve(args: argparse.Namespace, jobs: Sequence[Job], policy: str, num_blocks: int) -> Seen:
    """Return what a server of its own, with so many blocks on each device, makes of the load."""
    flags = ("--model", args.model, "--devices", args.devices, "--block-size", str(BLOCK_SIZE))
    longest = BLOCK_SIZE * max(map(blocks_of, jobs))
    memory = ("--num-gpu-blocks-override", str(num_blocks), "--max-model-len", str(longest + 1), NO_CACHE)
    async with running_server(*flags, *memory, "--overload-policy", policy) as server:
        recording = Recording.of(jobs, (server.url,))
        target = Target((server.url,), await first_model(server.url, {}), seed=args.seed)
        mapped_blocks = sum(group["blocks"]["total"] for group in (await server.state())["groups"])
        polling = asyncio.create_task(peak_blocks(server, peaks := [0]))
        await run(recording, target)
        polling.cancel()
        state = await server.state()
    found = report.summarize(recording)
    num_tokens = found["prompt_tokens"] + found["output_tokens"]
    return Seen(
        found["longest_gap_s"],
        found["ttft_s"]["p50"],
        found["ttft_s"]["p99"],
        found["output_tokens_per_s"],
        num_tokens / found["elapsed_s"],
        state["requests"]["preemptions"],
        state["requests"]["swaps"],
        sum(t["kind"] == "drop" for t in state["transitions"]),
        peaks[0],
        mapped_blocks,
        len(jobs) - found["completed"],
    )


async def peak_blocks(server: Server, peaks: list[int]) -> None:
    """Keep the most blocks in use at once in `peaks`, until cancelled."""
    while True:
        groups = (await server.state())["groups"]
        peaks[0] = max(peaks[0], sum(group["blocks"]["used"] for group in groups))
        await asyncio.sleep(POLL_S)


def blocks_for(need: float, peak: int, jobs: Sequence[Job], num_devices: int) -> int:
    """Return the blocks of each device that make a peak this need. SystemExit if they do not hold every request."""
    num_blocks, longest = max(1, round(peak / need / num_devices)), max(map(blocks_of, jobs))
    if num_blocks <= longest:
        raise SystemExit(
            f"error: a need of {need:g} leaves {num_blocks} blocks to a device, the longest request needs {longest}: "
            "give more --requests, fewer --seconds, or a smaller --longest"
        )
    return num_blocks


def middle(seen: Sequence[Seen]) -> Seen:
    """Return the median of each figure."""
    return Seen(*(median(getattr(one, name) for one in seen) for name in Seen.__slots__))


def table(found: dict[str, Seen]) -> list[str]:
    """Return the lines of a table in Markdown, a row for each policy."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for policy, seen in found.items():
        cells = [f"{getattr(seen, name):.3g}" for name in Seen.__slots__[: len(COLUMNS)]]
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return lines


async def measure(args: argparse.Namespace, policies: Sequence[str]) -> dict[str, Any]:
    """Run plenty unless the blocks are known, then all policies by turns; the medians, by policy."""
    jobs, num_devices = jobs_of(args), int(args.devices.partition(":")[2] or 1)
    rounds, num_blocks = dict[str, list[Seen]](), args.blocks
    if num_blocks is None:
        plenty = await serve(args, jobs, "recompute", sum(map(blocks_of, jobs)) + 1)
        num_blocks = blocks_for(args.need, round(plenty.peak_blocks), jobs, num_devices)
        told = f"peak {plenty.peak_blocks:.0f} blocks; a need of {args.need:g}: {num_blocks} on each device"
        print(f"{told}; {plenty}", file=sys.stderr, flush=True)
        rounds[PLENTY] = [plenty]
    rounds |= {policy: [] for policy in policies}
    for number in range(args.rounds):
        for policy in policies:
            rounds[policy].append(await serve(args, jobs, policy, num_blocks))
            print(f"round {number}, {policy}: {rounds[policy][-1]}", file=sys.stderr, flush=True)
    found = {policy: middle(seen) for policy, seen in rounds.items()}
    print(*table(found), sep="\n")
    mapped = {seen.mapped_blocks for policy, seen in found.items() if policy != PLENTY}
    return {
        "need": [round(found[PLENTY].peak_blocks / each, 3) for each in mapped] if PLENTY in found else None,
        "mapped_blocks": sorted(mapped),
        "blocks": num_blocks,
        "policies": {
            policy: {name: round(getattr(seen, name), 4) for name in Seen.__slots__} for policy, seen in found.items()
        },
    }


def pair(text: str) -> tuple[int, int]:
    """Read two numbers with a comma between. ArgumentTypeError if these are none, or not above zero."""
    try:
        first, second = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not two numbers, as 8,4") from None
    if min(first, second) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': both must be above zero")
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument("--trace", type=Path, help="a file of arrivals and lengths")
    load.add_argument("--lengths", type=Path, help="a file of lengths")
    parser.add_argument("--need", type=float, required=True)
    parser.add_argument("--blocks", type=int, help="of each device, if they are known")
    parser.add_argument("--policies", default="drop,recompute,swap", help="with commas; empty: only plenty")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--devices", default="cpu:2")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--shrink", type=pair, default=(8, 4), metavar="PROMPT,ANSWER", help="default 8,4")
    parser.add_argument("--longest", type=pair, default=(384, 128), metavar="PROMPT,ANSWER", help="default 384,128")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.need, args.requests, args.seconds, args.rounds, args.blocks or 1) <= 0:
        raise SystemExit("error: --need, --requests, --seconds, --rounds and --blocks must be above zero")
    try:
        print(json.dumps(asyncio.run(measure(args, list(filter(None, args.policies.split(",")))))))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
