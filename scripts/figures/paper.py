#!/usr/bin/env python3
"""The paper's experiments on a virtual clock: a quarter of an hour on two cores, 5 minutes with --quick.

Tables and pictures like those of KunServe (EuroSys 2026), figures 2, 12, 13, 14, 16 and 17, each beside what is
published there. Nothing is measured: times follow from datasheets; arrivals and lengths are synthetic, with published
means, and the same seed gives the same report. Besides the paper's GPUs there are some with half the memory (-40gb), as
it lists models whose weights take that much of theirs, too. Every table has a row `plenty`, the same GPUs with memory
without end: its peak over the KV that is mapped is the need of the load, and nothing is better than it; and one of
vLLM 0.6.3 as it was published. --full has windows of 640 s and all policies, --quick half of the GPUs and some
workloads. Every simulation is kept in --out by its options and the code that ran it. Written there: report.md,
report.json, and pictures. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import paper_figures as figures

sys.path.insert(0, str(Path(__file__).parents[1]))

from kept_runs import kept_run

from kunserve.sim.options import HOST_TOKEN_S, Options
from kunserve.sim.policies import PLENTY, POLICIES, VLLM

Report = dict[str, Any]
BASELINES = ("recompute", "swap", "migrate")
SYSTEMS = (*BASELINES, "pipeline", VLLM, "drop", PLENTY)

# Bursts that ask for more KV than there is, and for more computing than there is: what a drop frees holds what comes
# beyond that until the burst is over. The rates in and outside of a burst are chosen so that it is long enough to fill
# most of that, but not more. All systems plan a step ahead, as the server does.


def bursty(
    testbed: Options, workload: str, rate: float, burst_rate: float, burst_s: float, duration_s: float
) -> Options:
    """Return a workload whose rate (requests per second) rises at second 45; options have its mean."""
    burst_height = burst_rate / rate
    mean = rate * (1 + (burst_height - 1) * burst_s / duration_s)
    return replace(
        testbed, workload=workload, rate=mean, burst_height=burst_height, burst_s=burst_s, duration_s=duration_s
    )


PAPERS = Options(max_num_batched_tokens=2048, is_running_ahead=True)  # 8 A800 with 80 GB, of which weights take 34 %
SMALL = replace(PAPERS, memory_gib=40.0)  # 69 %; 34 to 75 % with the models that the paper lists
WORKLOADS = {
    "sharegpt": bursty(PAPERS, "sharegpt", 16.0, 24.0, 150.0, 240.0),
    "longbench": bursty(PAPERS, "longbench", 4.0, 5.6, 100.0, 200.0),
    "burstgpt": bursty(PAPERS, "burstgpt", 40.0, 64.0, 120.0, 200.0),
    "sharegpt-40gb": bursty(SMALL, "sharegpt", 10.0, 16.0, 60.0, 160.0),
    "longbench-40gb": bursty(SMALL, "longbench", 2.0, 3.6, 60.0, 160.0),
    "burstgpt-40gb": bursty(SMALL, "burstgpt", 24.0, 46.0, 60.0, 160.0),
}
QUICK = ("sharegpt", "longbench", "sharegpt-40gb", "burstgpt-40gb")
TWO_BURSTS = replace(
    SMALL, workload="longbench", rate=1.2, burst_height=3.0, burst_s=50.0, duration_s=640.0, host_token_s=HOST_TOKEN_S
)
ENDLESS = Options(
    cluster="16xH800",
    model="qwen2.5-72b",
    workload="longbench",
    rate=7.6,
    duration_s=240.0,
    burst_height=1.3,
    burst_s=240.0,
    max_num_batched_tokens=2048,
    is_running_ahead=True,
)
ABLATION = {
    "recompute": Options(policy="recompute"),
    "drop": Options(is_coordinated=False, is_looking_ahead=False),
    "+ coordinated exchange": Options(is_looking_ahead=False),
    "+ lookahead": Options(),
    PLENTY: Options(policy=PLENTY),
}


@dataclass(frozen=True, slots=True)
class Experiment:
    """Runs that are looked at together."""

    title: str
    runs: dict[str, Options]


def experiments(
    workloads: Sequence[str], seed: int, *, is_full: bool = False, is_quick: bool = False
) -> list[Experiment]:
    """Return all that is simulated."""
    systems = POLICIES if is_full else SYSTEMS

    def sized(options: Options) -> Options:
        options = replace(options, seed=seed)
        return replace(options, cluster="4xA800", rate=(options.rate or 0.0) / 2) if is_quick else options

    found = []
    for name in workloads:
        base = sized(WORKLOADS[name])
        base = replace(base, duration_s=640.0) if is_full else base
        found.append(Experiment(name, {policy: replace(base, policy=str(policy)) for policy in systems}))
    base = sized(WORKLOADS["longbench"])
    ablation = {
        name: replace(base, policy=o.policy, is_coordinated=o.is_coordinated, is_looking_ahead=o.is_looking_ahead)
        for name, o in ABLATION.items()
    }
    found.append(Experiment("ablation", ablation))
    twice = sized(TWO_BURSTS)
    both = {"restore": twice, "no restore": replace(twice, is_restoring=False), PLENTY: replace(twice, policy=PLENTY)}
    found.append(Experiment("restore", both))
    endless = replace(ENDLESS, seed=seed)
    found.append(Experiment("endless burst", {p: replace(endless, policy=p) for p in ("recompute", "drop", PLENTY)}))
    return found


def run(options: Options, out: Path) -> Report:
    """Run one simulation in a process of its own, unless it has been done."""
    return kept_run(options, out, lambda report: report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/paper"))
    parser.add_argument("--workloads", help=f"with commas (default: {', '.join(WORKLOADS)})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="simulations at a time")
    parser.add_argument("--only", default="", help="experiments whose title contains this, as restore or ablation")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="windows of 640 s, all policies")
    size.add_argument("--quick", action="store_true", help=f"4 GPUs, {', '.join(QUICK)} only")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    workloads = args.workloads.split(",") if args.workloads else QUICK if args.quick else tuple(WORKLOADS)
    planned = experiments(workloads, args.seed, is_full=args.full, is_quick=args.quick)
    planned = [experiment for experiment in planned if args.only in experiment.title]
    different = list(dict.fromkeys(options for experiment in planned for options in experiment.runs.values()))
    with ProcessPoolExecutor(args.jobs) as processes:
        done = dict(zip(different, processes.map(partial(run, out=args.out), different), strict=True))
    results = {e.title: {name: done[options] for name, options in e.runs.items()} for e in planned}
    lines = ["# The paper's experiments, simulated", "", (__doc__ or "").split("\n\n", 1)[1], figures.DIFFERENT, ""]
    for experiment in planned:
        lines += figures.section(experiment.title, results[experiment.title], args.out)
    (args.out / "report.md").write_text("\n".join(lines) + "\n")
    (args.out / "report.json").write_text(json.dumps(results))
    summary = {title: {name: r["ttft_s"]["p99"] for name, r in reports.items()} for title, reports in results.items()}
    elapsed_s = round(time.monotonic() - started)
    print(json.dumps({"p99_ttft_s": summary, "elapsed_s": elapsed_s, "written": str(args.out)}))


if __name__ == "__main__":
    main()
