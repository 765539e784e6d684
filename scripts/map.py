#!/usr/bin/env python3
"""Where a drop wins: simulated loads, chosen by how much KV they need, and what every policy makes of them.

    python scripts/map.py --quick      # 12 points, two seeds, four policies
    python scripts/map.py              # 24 points, three seeds, five policies
    python scripts/map.py --only "sharegpt 40 GB" --quick --overlap 1,2,4 --published

A point is a distribution of lengths, GPUs with 40 or 80 GB, with or without the time of the host, and a need: the most
KV that `plenty` (the same GPUs with memory without end) uses at once, over what is mapped without a drop. The burst of
each point is made as long as it has to be for that. --overlap sweeps how far reading weights and multiplying overlap;
--published adds a row: vLLM 0.6.3 with a queue for each GPU, which is compared, but is not one of the baselines that
are judged. Every simulation is kept in --out by its options and the code that ran it: a run that was interrupted goes
on, and one of the same code has nothing to do. Written there: map.md, a table of medians over the seeds with their
ranges, and map.json. Ends with one JSON line: what was wanted, and what came out. Times follow from data sheets;
nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from kept_runs import kept_run

from kunserve.model.card import find_config
from kunserve.model.costs import OVERLAP
from kunserve.percentiles import quantile
from kunserve.sim.options import HOST_TOKEN_S, Options, cluster_of
from kunserve.sim.plan.capacity import Capacity
from kunserve.sim.policies import PLENTY, VLLM

BASELINES = ("recompute", "swap", "queue")
QUICK_BASELINES = ("recompute", "swap")
NEEDS = ((0.9, 1.2), (0.8, 1.4), (1.1, 1.75), (1.0, 2.0))  # of points with the same lengths, one after the other
# Requests per second and GPU before the burst, and in it; four GPUs, whose chains then have up to four stages.
RATES = {
    (80, "burstgpt"): (4.0, 8.0),
    (80, "sharegpt"): (1.6, 3.0),
    (80, "longbench"): (0.4, 0.75),
    (40, "burstgpt"): (3.0, 5.8),
    (40, "sharegpt"): (1.0, 2.0),
    (40, "longbench"): (0.22, 0.45),
}
NUM_GPUS = 4
BEFORE_S, AFTER_S = 45.0, 60.0  # of the burst
USUAL_S, LONGEST_S, MOST_TRIES = 60.0, 600.0, 5  # bursts that are tried: the first, the longest, how many
KEPT = ("ttft_s", "tpot_s", "longest_gap_s", "output_tokens_per_s", "output_tokens_per_s_while_arriving", "preemptions")


@dataclass(frozen=True, slots=True)
class Point:
    """One place on the map."""

    workload: str
    memory_gb: int
    has_host: bool
    need: float
    overlap: float = OVERLAP

    @property
    def name(self) -> str:
        """Return what a table calls it."""
        host = ", host" if self.has_host else ""
        overlap = "" if self.overlap == OVERLAP else f", overlap {self.overlap:g}"
        return f"{self.workload} {self.memory_gb} GB{host}, need {self.need:g}{overlap}"

    def load(self, burst_s: float, seed: int) -> Options:
        """Return the options with a burst of so long."""
        rate, burst_rate = (NUM_GPUS * each for each in RATES[self.memory_gb, self.workload])
        duration_s = BEFORE_S + burst_s + AFTER_S
        height = burst_rate / rate
        return Options(
            cluster=f"{NUM_GPUS}xA800",
            workload=self.workload,
            seed=seed,
            duration_s=duration_s,
            rate=rate * (1 + (height - 1) * burst_s / duration_s),
            burst_height=height,
            burst_s=burst_s,
            memory_gib=float(self.memory_gb),
            max_num_batched_tokens=2048,
            is_running_ahead=True,
            host_token_s=HOST_TOKEN_S if self.has_host else 0.0,
            overlap=self.overlap,
        )


def points(*, is_quick: bool, overlaps: Sequence[float] = (OVERLAP,)) -> list[Point]:
    """Return all points, or every second one of each kind; each with every overlap."""
    found = []
    for i, (memory_gb, workload) in enumerate(RATES):
        for has_host in (False, True):
            needs = NEEDS[(2 * i + has_host) % len(NEEDS)]
            chosen = product(needs[1:] if is_quick else needs, overlaps)
            found += [Point(workload, memory_gb, has_host, need, overlap) for need, overlap in chosen]
    return found


class Run(NamedTuple):
    """What is kept of a simulation."""

    p99_s: float
    tokens_per_s: float
    peak_tokens: float  # of KV in use at once
    num_drops: int
    freed: float  # most KV that was mapped, over what was before


def run(options: Options, out: Path) -> Run:
    """Simulate one point, unless it has been done."""
    report = kept_run(options, out, _keep)
    p99_s, rate = report["ttft_s"]["p99"], report["output_tokens_per_s"]
    return Run(p99_s, rate, report["peak_tokens"], report["num_drops"], report["freed"])


def _keep(report: dict[str, Any]) -> dict[str, Any]:
    memory = report["memory"]
    kinds = [transition["kind"] for transition in report["transitions"]]
    return {name: report[name] for name in KEPT} | {
        "peak_tokens": memory["peak_usage_of_undropped"] * memory["kv_tokens"],
        "freed": memory["most_kv_tokens"] / memory["kv_tokens"],
        "num_drops": kinds.count("drop"),
    }


def need_of(point: Point, burst_s: float, seed: int, out: Path) -> float:
    """Return the need of a burst: `plenty`'s peak over what is mapped without a drop."""
    load = point.load(burst_s, seed)
    return run(replace(load, policy=PLENTY), out).peak_tokens / capacity(load).kv_tokens


def most_freed(point: Point) -> float:
    """Return the KV after the largest drop, over what is mapped without one."""
    found = capacity(point.load(USUAL_S, 0))
    return found.dropped_kv_tokens / found.kv_tokens


def capacity(load: Options) -> Capacity:
    """Return what the GPUs of a load hold."""
    return Capacity.of(find_config(load.model), cluster_of(load), load.block_size)


def burst_for(point: Point, seed: int, out: Path, burst_s: float = USUAL_S) -> float:
    """Return how long a burst lasts that needs what the point says, to a twentieth if that is found: by secants.

    `burst_s` is tried first.
    """
    low, high = (0.0, 0.25), (LONGEST_S, inf)  # bursts and their needs; before a burst about a quarter is in use
    for _ in range(MOST_TRIES):
        need = need_of(point, burst_s, seed, out)
        if abs(need - point.need) < 0.05 * point.need:
            break
        if need < point.need:
            low = (burst_s, need)
        else:
            high = (burst_s, need)
        known = high if high[1] < inf else (burst_s, need)
        before = low if high[1] < inf else (0.0, 0.25)
        per_s = max(1e-3, (known[1] - before[1]) / (known[0] - before[0]))
        burst_s = round(min(LONGEST_S, before[0] + (point.need - before[1]) / per_s), 1)
    return burst_s


def explore(job: tuple[Point, Sequence[int], Sequence[str], Path]) -> list[dict[str, Any]]:
    """Run one point with all seeds under all policies; in a process of its own.

    A burst that fits one seed is tried first with the next.
    """
    point, seeds, policies, out = job
    found, burst_s = list[dict[str, Any]](), USUAL_S
    for seed in seeds:
        burst_s = burst_for(point, seed, out, burst_s)
        load = point.load(burst_s, seed)
        runs = {policy: run(replace(load, policy=policy), out) for policy in policies}
        need = need_of(point, burst_s, seed, out)
        print(f"{point.name}, seed {seed}: burst of {burst_s:g} s, need {need:.2f}", file=sys.stderr, flush=True)
        found.append({"point": point, "seed": seed, "need": need, "burst_s": burst_s, "runs": runs})
    return found


def rows_of(
    found: Sequence[dict[str, Any]], policies: Sequence[str], baselines: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the medians over the seeds of each point, with the figures that are judged."""
    for point in dict.fromkeys(result["point"] for result in found):
        same = [result for result in found if result["point"] == point]

        def middle(policy: str, field: str, same: Sequence[dict[str, Any]] = same) -> float:
            return float(median(getattr(result["runs"][policy], field) for result in same))

        def ends(policy: str, field: str, same: Sequence[dict[str, Any]] = same) -> list[float]:
            values = [getattr(result["runs"][policy], field) for result in same]
            return [round(min(values), 3), round(max(values), 3)]

        p99 = {policy: middle(policy, "p99_s") for policy in policies}
        rate = {policy: middle(policy, "tokens_per_s") for policy in policies}
        best_s = min(p99[policy] for policy in baselines)
        yield {
            "point": point.name,
            "need": [round(result["need"], 2) for result in same],
            "p99_s": {policy: round(seconds, 3) for policy, seconds in p99.items()},
            "range_s": {policy: ends(policy, "p99_s") for policy in policies},
            "tokens_per_s": {policy: round(each) for policy, each in rate.items()},
            "tokens_range": {policy: ends(policy, "tokens_per_s") for policy in policies},
            "num_drops": [result["runs"]["drop"].num_drops for result in same],
            "can_free": round(most_freed(point), 2),
            "freed": round(middle("drop", "freed"), 2),
            "ceiling": round(best_s / p99[PLENTY], 2),
            "recompute_over_drop": round(p99["recompute"] / p99["drop"], 2),
            "recompute_over_plenty": round(p99["recompute"] / p99[PLENTY], 2),
            "gap": round((p99["drop"] - p99[PLENTY]) / (best_s - p99[PLENTY]), 3) if best_s > p99[PLENTY] else None,
            "p99_over_best": round(p99["drop"] / best_s, 3),  # of the others
            "p99_of_best": round(p99["drop"] / min(best_s, p99["drop"]), 3),
            "rate_of_best": round(rate["drop"] / max(rate[policy] for policy in ("drop", *baselines)), 3),
        }


def judge(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what was wanted of the map and what it shows."""
    gaps = sorted(row["gap"] for row in rows if row["ceiling"] >= 1.5 and median(row["need"]) <= row["can_free"])
    beyond = [row for row in rows if 1.1 <= median(row["need"]) / row["can_free"] <= 1.3]
    return {
        "gap: median <= 0.10, p90 <= 0.30": [
            round(median(gaps), 3) if gaps else None,
            quantile(gaps, 0.9) if gaps else None,
            f"{len(gaps)} points",
        ],
        "P99 <= 1.05 of the best, worst 1.15": [
            round(median(row["p99_of_best"] for row in rows), 3),
            max(row["p99_of_best"] for row in rows),
        ],
        "tokens/s >= 0.98 of the best, worst 0.95": [
            round(median(row["rate_of_best"] for row in rows), 3),
            min(row["rate_of_best"] for row in rows),
        ],
        "need of 1.1 to 1.3 of what can be freed: P99 <= 0.85 of the best, tokens/s >= 0.97": [
            (row["point"], row["p99_over_best"], row["rate_of_best"]) for row in beyond
        ],
        "need < 0.95 without a drop": [
            row["point"] for row in rows if max(row["need"]) < 0.95 and any(row["num_drops"])
        ],
    }


def table_of(rows: Sequence[dict[str, Any]], policies: Sequence[str]) -> list[str]:
    """Return a table in Markdown: a row for each policy at each point, medians with ranges over the seeds."""
    lines = ["| point | need | policy | P99 TTFT, s | tokens/s | drops | freed |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        needs = row["need"]
        need = f"{median(needs):.2f} ({min(needs):.2f} to {max(needs):.2f}), {row['can_free']:.2f} can be freed"
        for policy in policies:
            (low_s, high_s), (least, most) = row["range_s"][policy], row["tokens_range"][policy]
            is_drop = policy == "drop"
            cells = [
                row["point"] if policy == policies[0] else "",
                need if policy == policies[0] else "",
                policy,
                f"{row['p99_s'][policy]:.2f} ({low_s:.2f} to {high_s:.2f})",
                f"{row['tokens_per_s'][policy]:,} ({least:,.0f} to {most:,.0f})",
                ", ".join(map(str, row["num_drops"])) if is_drop else "",
                f"{row['freed']:.2f}" if is_drop else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="12 points, two seeds, four policies")
    parser.add_argument("--out", type=Path, default=Path("bench/map"))
    parser.add_argument("--only", default="", help="points whose name contains this")
    parser.add_argument("--seeds", type=int, help="how many (default: 3; 2 with --quick)")
    parser.add_argument("--jobs", type=int, default=2, help="simulations at a time")
    parser.add_argument(
        "--overlap", default=f"{OVERLAP:g}", help="1 or more, several with commas (default %(default)s)"
    )
    parser.add_argument("--published", action="store_true", help=f"compare with {VLLM}, too")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    overlaps = [float(text) for text in args.overlap.split(",")]
    chosen = [point for point in points(is_quick=args.quick, overlaps=overlaps) if args.only in point.name]
    if not chosen:
        raise SystemExit(
            f"no point has {args.only!r} in its name, which are like {Point('burstgpt', 40, True, 1.2).name!r}"
        )
    baselines = QUICK_BASELINES if args.quick else BASELINES
    seeds = range(args.seeds or (2 if args.quick else 3))
    policies = (PLENTY, "drop", *baselines, *([VLLM] if args.published else []))
    jobs = [(point, seeds, policies, args.out) for point in chosen]
    with ProcessPoolExecutor(args.jobs) as processes:
        found = [result for results in processes.map(explore, jobs) for result in results]
    rows = list(rows_of(found, policies, baselines))
    for row in rows:
        print(json.dumps(row))
    (args.out / "map.json").write_text(json.dumps(rows, indent=1))
    (args.out / "map.md").write_text("\n".join(table_of(rows, policies)) + "\n")
    print(json.dumps(judge(rows)))


if __name__ == "__main__":
    main()
