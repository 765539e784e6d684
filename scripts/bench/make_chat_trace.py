#!/usr/bin/env python3
"""Write a made trace of chats in Mooncake's format: requests of a chat begin with all that was said in it before.

    python scripts/bench/make_chat_trace.py --chats 600 --seconds 300 > chats.jsonl
    kunserve simulate --workload chats.jsonl --enable-prefix-caching

Chats begin at random moments, twice as often in the middle third; each has one of a few system prompts, and turns whose
lengths are log-normal. The last line, on stderr, is the share of input tokens that the ids allow to be found.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from itertools import count, takewhile

BLOCK = 512  # tokens that an id stands for


def parse_arguments() -> argparse.Namespace:
    """Read the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=600)
    parser.add_argument("--turns", type=int, default=6, help="of each chat, at most")
    parser.add_argument("--seconds", type=float, default=300.0, help="in which chats begin")
    parser.add_argument("--think", type=float, default=20.0, metavar="S", help="mean time between the turns of a chat")
    parser.add_argument("--systems", type=int, default=8, help="system prompts")
    parser.add_argument("--system-len", type=int, default=2048, help="tokens of each")
    parser.add_argument("--input-len", type=int, default=600, help="median tokens of what a user says")
    parser.add_argument("--output-len", type=int, default=250, help="median tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def begin_s(rng: random.Random, seconds: float) -> float:
    """Draw when a chat begins."""
    place = rng.random() * 4  # quarters: the middle third has two
    return seconds * (place / 3 if place < 1 else (1 + (place - 1) / 2) / 3 if place < 3 else (place - 1) / 3)


def make_rows(args: argparse.Namespace) -> list[dict[str, object]]:
    """Return the requests in the order in which they come."""
    rng, ids = random.Random(args.seed), count()
    systems = [[next(ids) for _ in range(args.system_len // BLOCK)] for _ in range(args.systems)]
    rows: list[dict[str, object]] = []
    for _ in range(args.chats):
        at_s, known = begin_s(rng, args.seconds), list(rng.choice(systems))
        num_tokens = len(known) * BLOCK
        for _ in range(rng.randint(1, args.turns)):
            num_tokens += max(1, round(args.input_len * rng.lognormvariate(0, 1)))
            output = max(1, round(args.output_len * rng.lognormvariate(0, 0.8)))
            known += [next(ids) for _ in range(num_tokens // BLOCK - len(known))]
            shown = known + ([next(ids)] if num_tokens % BLOCK else [])  # the last, in part: nobody else's
            row = {"timestamp": round(1000 * at_s), "input_length": num_tokens, "output_length": output}
            rows.append({**row, "hash_ids": shown})
            num_tokens += output
            at_s += rng.expovariate(1 / args.think)
    return sorted(rows, key=lambda row: row["timestamp"])  # type: ignore[arg-type, return-value]


def main() -> None:
    """Write the rows, and what their ids allow."""
    rows, seen = make_rows(parse_arguments()), set[int]()
    num_found = 0
    for row in rows:
        print(json.dumps(row))
        hashes: list[int] = row["hash_ids"]  # type: ignore[assignment]
        num_found += BLOCK * len(list(takewhile(seen.__contains__, hashes)))
        seen.update(hashes)
    total = sum(int(str(row["input_length"])) for row in rows)
    print(f"{len(rows)} requests, {total} input tokens, of which {num_found / total:.4f} can be found", file=sys.stderr)


if __name__ == "__main__":
    main()
