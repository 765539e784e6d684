#!/usr/bin/env python3
"""How long a simulation takes per simulated request, and how much memory, for clusters of more and more GPUs.

    python scripts/bench/bench_simulation.py [--gpus 8,64,1024] [--seconds 20] [--cache off,on,on,off]

Each cluster gets as many requests per GPU (BurstGPT's shape, five per second and GPU), in a process of its own. With
1,024 GPUs and 20 s of arrivals they are 100,000: about seven minutes. `--cache` runs each cluster without and with a
prefix cache, in that order; nothing is shared between these requests, so that the difference is what it costs. Ends in
one JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

from kunserve.log import set_up_logging
from kunserve.sim.options import Options, simulate

RATE = 5.0  # requests per second and GPU


def measure(num_gpus: int, seconds: float, has_cache: bool) -> dict[str, float]:
    """Simulate one cluster."""
    set_up_logging("error", as_json=False)
    started, started_cpu = time.perf_counter(), time.process_time()
    load = Options(cluster=f"{num_gpus}xA800", rate=RATE * num_gpus, duration_s=seconds, has_prefix_cache=has_cache)
    report = simulate(load)
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
    return {
        "gpus": num_gpus,
        "has_cache": has_cache,
        "requests": report["requests"],
        "finished": report["finished"],
        "simulated_s": round(report["elapsed_s"], 1),
        "wall_s": round(wall_s, 1),
        "cpu_s": round(cpu_s, 1),
        "ms_per_request": round(1e3 * wall_s / report["requests"], 3),
        "us_per_token": round(1e6 * wall_s / report["output_tokens"], 3),
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="8,64,1024", help="sizes of clusters, with commas")
    parser.add_argument("--seconds", type=float, default=20.0, help="simulated seconds in which requests come")
    parser.add_argument("--cache", default="off", help="runs of each cluster, with commas: off or on")
    args = parser.parse_args()
    results = []
    for num_gpus, cache in product(map(int, args.gpus.split(",")), args.cache.split(",")):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            results.append(process.submit(measure, num_gpus, args.seconds, cache == "on").result())
        print(results[-1], file=sys.stderr)
    growth = results[-1]["ms_per_request"] / results[0]["ms_per_request"]
    print(json.dumps({"bench": "simulation", "clusters": results, "growth_per_request": round(growth, 3)}))


if __name__ == "__main__":
    main()
