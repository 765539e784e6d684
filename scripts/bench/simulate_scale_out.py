#!/usr/bin/env python3
"""A burst over several servers, simulated: what drops, an autoscaler, both and neither make of it.

    python scripts/bench/simulate_scale_out.py [--nodes 2] [--gpus 2] [--needs 1.2,1.5,2.0] [--routers random]

The load steps up at second 45 and stays up for 420 s, longer than the 180 s that a new server takes to start. How far
it steps is fixed beforehand by the need: the most KV that `plenty` (the same servers with memory without end) uses at
once, over what the servers have without a drop. Every simulation is kept in --out: a run that was interrupted goes on.
Prints a table in Markdown, and ends with one JSON line. Times follow from data sheets; nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from kept_runs import kept_run

from kunserve.model.card import find_config
from kunserve.sim.nodes.router import ROUTERS
from kunserve.sim.options import Options, cluster_of
from kunserve.sim.plan.capacity import Capacity
from kunserve.sim.policies import PLENTY

BEFORE_S, BURST_S, AFTER_S = 45.0, 420.0, 30.0
POD_START_S = 180.0
RATES = {"burstgpt": 3.0, "sharegpt": 1.0, "longbench": 0.15}  # requests per second and GPU outside the burst
FIRST_RATES = {"burstgpt": 5.0, "sharegpt": 1.8, "longbench": 0.28}  # in the burst: where the search begins
MOST_TRIES, PRECISION = 6, 0.05  # to find a load of some need, to this share of it
WAYS: dict[str, dict[str, Any]] = {
    "neither": {"policy": "recompute"},
    "autoscaling": {"policy": "recompute", "pod_start_s": POD_START_S},
    "drop": {"policy": "drop"},
    "both": {"policy": "drop", "pod_start_s": POD_START_S},
}


def load(args: argparse.Namespace, burst_rate: float) -> Options:
    """Return the options of a load of so many requests per second and GPU in the burst."""
    num_gpus, duration_s = args.nodes * args.gpus, BEFORE_S + BURST_S + AFTER_S
    base = RATES[args.workload]
    return Options(
        cluster=f"{args.gpus}xA800",
        workload=args.workload,
        seed=args.seed,
        duration_s=duration_s,
        rate=num_gpus * (base + (burst_rate - base) * BURST_S / duration_s),
        burst_height=burst_rate / base,
        burst_s=BURST_S,
        memory_gib=args.memory,
        max_num_batched_tokens=2048,
        is_running_ahead=True,
        nodes=args.nodes,
    )


def keep(report: dict[str, Any]) -> dict[str, Any]:
    """Return what is shown of a run."""
    kinds = [transition["kind"] for transition in report["transitions"]]
    return {
        "requests": report["requests"],
        "attainment": report["slo_attainment"],
        "p50_s": report["ttft_s"]["p50"],
        "p99_s": report["ttft_s"]["p99"],
        "preemptions": report["preemptions"],
        "drops": kinds.count("drop"),
        "peak_tokens": report["memory"]["peak_usage_of_undropped"] * report["memory"]["kv_tokens"],
        "added_s": [at_s for at_s in report.get("node_started_s", ()) if at_s > 0.0],
    }


def need_of(args: argparse.Namespace, rate: float) -> float:
    """Return the need of a load: `plenty`'s peak over what all servers map without a drop."""
    options = load(args, rate)
    capacity = Capacity.of(find_config(options.model), cluster_of(options), options.block_size)
    peak: float = kept_run(replace(options, policy=PLENTY), args.out, keep)["peak_tokens"]
    need = peak / (capacity.kv_tokens * options.nodes)
    print(f"{rate:g} requests/s and GPU: need {need:.2f}", file=sys.stderr, flush=True)
    return need


def find_rate(args: argparse.Namespace, need: float, known: dict[float, float]) -> float:
    """Return a rate of this need: by interpolation between the nearest ones known, which are shared by all needs."""
    for _ in range(MOST_TRIES):
        rate = min(known, key=lambda rate: abs(known[rate] - need))
        if abs(known[rate] - need) <= PRECISION * need:
            break
        below = max((r for r in known if known[r] <= need), default=0.0)
        above = min((r for r in known if known[r] > need), default=None)
        if above is None:
            rate = round(below * min(1.5, need / known[below]), 4)
        else:
            low = known.get(below, 0.0)
            rate = round(below + (above - below) * (need - low) / (known[above] - low), 4)
        known[rate] = need_of(args, rate)
    return min(known, key=lambda rate: abs(known[rate] - need))


def explore(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each need, way and router, in this order."""
    rows = []
    few = argparse.Namespace(**vars(args) | {"nodes": 2})  # a rate for a GPU is found there sooner
    first = FIRST_RATES[args.workload]
    known_of_few = {first: need_of(few, first)}
    known: dict[float, float] = {}
    for aim in args.needs:
        guess = find_rate(few, aim, known_of_few)
        known[guess] = need_of(args, guess)
        rate = find_rate(args, aim, known)
        options, need = load(args, rate), {"need": round(known[rate], 2)}
        plenty = kept_run(replace(options, policy=PLENTY), args.out, keep)
        rows.append(plenty | need | {"router": "least", "way": "endless memory"})
        routers = ("least", *args.routers)
        for router, (way, changes) in product(routers, WAYS.items()):
            report = kept_run(replace(options, router=router, **changes), args.out, keep)
            rows.append(report | need | {"router": router, "way": way})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        "| need | router | with | first token within 5 s | TTFT p50, s | p99, s | preempted | drops | servers added |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        added = f"{len(row['added_s'])}, from {min(row['added_s']):.0f} s" if row["added_s"] else "-"
        lines.append(
            f"| {row['need']:.2f} | {row['router']} | {row['way']} | {100 * row['attainment']:.1f} % | "
            f"{row['p50_s']:.2f} | {row['p99_s']:.1f} | {row['preemptions']} | {row['drops']} | {added} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=2, help="of each node")
    parser.add_argument("--workload", choices=RATES, default="longbench")
    parser.add_argument("--memory", type=float, default=40.0, help="GiB of a GPU")
    parser.add_argument("--needs", type=lambda text: [float(x) for x in text.split(",")], default=[1.2, 1.5, 2.0])
    parser.add_argument("--routers", nargs="*", choices=ROUTERS[1:], default=[], help="more routers than `least`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench/scale_out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = explore(args)
    print(table(rows))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
