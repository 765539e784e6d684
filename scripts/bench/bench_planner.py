"""How long planning takes: drops of many one-device groups, and demand of many requests. Ends in one JSON line.

Usage: python scripts/bench/bench_planner.py [--groups 1024] [--requests 4096] [--runs 30]
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from statistics import median
from time import perf_counter

from kunserve.planner.demand import OutputLengthEstimate, RequestView, measure_demand
from kunserve.planner.drop import plan_drop
from kunserve.planner.snapshot import DeviceView, GroupView, ModelShape, Snapshot, StageView

SMOLLM2 = ModelShape(
    num_layers=30,
    layer_chunks=7,
    embed_chunks=55,
    head_chunks=0,
    tied=True,
    kv_block_bytes=24_576,
    chunk_bytes=2 << 20,
    block_size=16,
    head_time=8.0,
)


def snapshot(num_groups: int, seed: int, budgets: tuple[int, ...]) -> Snapshot:
    rng = random.Random(seed)
    devices = tuple(DeviceView(i, rng.choice(budgets), island=i // 8) for i in range(num_groups))
    stages = [(StageView(i, 0, SMOLLM2.num_layers),) for i in range(num_groups)]
    groups = tuple(GroupView(i, stages[i], used_blocks=rng.randrange(256)) for i in range(num_groups))
    return Snapshot(1, SMOLLM2, devices, groups)


def median_ms(run: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        start = perf_counter()
        result = run()
        times.append(perf_counter() - start)
        del result
    return round(median(times) * 1e3, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=1024)
    parser.add_argument("--requests", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=30)
    args = parser.parse_args()

    even = snapshot(args.groups, 0, (365,))
    uneven = snapshot(args.groups, 0, (365, 395, 425, 485))
    capacity, most = even.capacity_blocks(), 1 << 60
    views = [RequestView(300 + i % 700, i % 200, 256, 20) for i in range(args.requests)]
    half, estimate = args.requests // 2, OutputLengthEstimate()
    report = {
        "bench": "planner",
        "groups": args.groups,
        "drop_few_ms": median_ms(lambda: plan_drop(even, capacity * 21 // 20), args.runs),
        "drop_pairs_ms": median_ms(lambda: plan_drop(even, capacity * 2), args.runs),
        "drop_all_ms": median_ms(lambda: plan_drop(even, most), args.runs),
        "drop_all_uneven_ms": median_ms(lambda: plan_drop(uneven, most), args.runs),
        "requests": args.requests,
        "demand_ms": median_ms(lambda: measure_demand(views[:half], views[half:], estimate, 16), args.runs),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
