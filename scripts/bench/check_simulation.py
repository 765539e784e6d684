#!/usr/bin/env python3
"""Compare the simulation with the live server, on loads that its constants were not fitted to.

    python scripts/bench/fit_cost_model.py --devices cpu:2 && python scripts/bench/check_simulation.py

A server on two virtual CPU devices answers a steady load, a burst under drop, and the same burst under recompute; the
same requests are simulated with the constants that fit_cost_model.py left on this machine. The event loop and the
client share the devices' cores, so their time is measured as well: the CPU time of three loads of their own (few rows
in a microbatch, many rows, hardly any tokens) tells what a microbatch, a token and a request cost. Devices lose a
multiple of that, as they wait for the interpreter, too; and a machine may be a tenth faster or slower than when the
constants were fitted. Both are chosen so that the simulation predicts best how long these three loads take. Nothing is
fitted to the loads that are compared.

Bounds: output tokens per second and mean TTFT within 15 %, P99 TTFT within 25 %, as many transitions. Needs a machine
with nothing else to do, for about seven minutes. Ends with 1 if a bound is missed; the last line is a JSON object. The
prefix cache is off in both: each round sends equal prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from own_server import Server, running_server

from kunserve.config import EngineConfig
from kunserve.engine.launch.placement import budget_chunks, model_shape
from kunserve.gpu.kv_memory import KVShape
from kunserve.loadgen import report
from kunserve.loadgen.client import Recording, Target, first_model, run
from kunserve.loadgen.workload import Job, Span, draw_lengths, make_jobs, poisson_arrivals, stream_of
from kunserve.log import set_up_logging
from kunserve.model.card import load_card
from kunserve.model.costs import cost_model
from kunserve.planner.snapshot import DeviceView
from kunserve.sim.links import TimedLinks
from kunserve.sim.machine import HostTime, SimMachine
from kunserve.sim.policies import with_policy
from kunserve.sim.simulation import Simulation
from kunserve.sim.traces import TraceRow

MODEL, NUM_DEVICES = "smollm2-135m", 2
COPY_BYTES_PER_S = 4e9  # between virtual CPU devices
COUNTERS = ("vllm:iteration_tokens_total_count", "vllm:generation_tokens_total", "vllm:request_generation_tokens_count")
FACTORS = (1.0, 1.25, 1.5)  # of the host's time; three loads hardly tell it from the devices' slowness
SLOWNESS = tuple(0.8 + i / 20 for i in range(9))
FIGURES = (
    *("output_tokens_per_s", "mean_ttft_s", "p99_ttft_s", "p50_ttft_s", "p50_tpot_s"),
    *("longest_gap_s", "elapsed_s"),
)
BOUNDS = {"output_tokens_per_s": 0.15, "mean_ttft_s": 0.15, "p99_ttft_s": 0.25}


@dataclass(frozen=True, slots=True)
class Case:
    """A load with Poisson arrivals and uniform lengths, on a server with one policy."""

    policy: str
    num_requests: int
    rate: float
    prompt: Span
    output: Span
    num_blocks: int

    def jobs(self, seed: int) -> list[Job]:
        """Return the requests, each with its time."""
        times = poisson_arrivals(self.rate, self.num_requests, stream_of(seed, 0))
        lengths = draw_lengths(self.prompt, self.output, len(times), stream_of(seed, 1))
        return make_jobs(times, lengths, (None, None), 0.0, stream_of(seed, 2))


BURST = Case("drop", 60, 16.0, Span(48, 96), Span(160, 256), 256)
CALIBRATIONS = {
    "few rows": Case("recompute", 4, 100.0, Span(64, 64), Span(200, 200), 1024),
    "many rows": Case("recompute", 64, 100.0, Span(64, 64), Span(100, 100), 1024),
    "many requests": Case("recompute", 160, 40.0, Span(16, 16), Span(2, 2), 1024),
}
CASES = {
    "steady": Case("drop", 60, 3.0, Span(32, 256), Span(32, 96), 1024),
    "burst, drop": BURST,
    "burst, recompute": replace(BURST, policy="recompute"),
}


async def serve(case: Case, jobs: Sequence[Job]) -> dict[str, Any]:
    """Send a load to a live server; return its figures, its `transitions`, and CPU seconds and counts as `host`."""
    flags = ("--model", MODEL, "--devices", f"cpu:{NUM_DEVICES}", "--num-gpu-blocks-override", str(case.num_blocks))
    async with running_server(*flags, "--no-enable-prefix-caching", "--overload-policy", case.policy) as server:
        recording = Recording.of(jobs, (server.url,))
        target = Target((server.url,), await first_model(server.url, {}), extra_body={"ignore_eos": True})
        before = await spent(server)
        await run(recording, target)
        after = await spent(server)
        state = await server.state()
    summary = report.summarize(recording)
    if summary["completed"] < len(jobs):
        raise SystemExit(f"the live server failed: {summary['failures']}")
    return figures(summary) | {
        "transitions": state["transitions"],
        "host": [b - a for a, b in zip(before, after, strict=True)],
    }


async def spent(server: Server) -> tuple[float, ...]:
    """Return so far: CPU seconds of the server's event loop and this client; microbatches, tokens and requests."""
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/metrics") as response:
        page = await response.text()
    counts = [float(line.split()[-1]) for name in COUNTERS for line in page.splitlines() if line.startswith(name)]
    fields = Path(f"/proc/{server.pid}/task/{server.pid}/stat").read_text().rpartition(")")[2].split()
    loop_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return loop_s + time.process_time(), *counts


def figures(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the figures that have bounds, and others that help to see why they differ."""
    ttft, tpot = summary["ttft_s"], summary["tpot_s"]
    values = (summary["output_tokens_per_s"], ttft["mean"], ttft["p99"], ttft["p50"], tpot["p50"])
    return dict(zip(FIGURES, (*values, summary["longest_gap_s"], summary["elapsed_s"]), strict=True))


def predict(case: Case, jobs: Sequence[Job], host: HostTime, slowness: float) -> dict[str, Any]:
    """Return the same figures of a simulation of the load; `slowness`: of the devices, as a multiple of the fit's."""
    model = load_card(MODEL).config
    fitted, _ = cost_model(MODEL, model, "cpu")
    times = {name: slowness * value for name, value in fitted.to_dict().items() if name != "overlap"}
    cost = replace(fitted, **times)
    config = with_policy(
        EngineConfig(MODEL, num_blocks_override=case.num_blocks, enable_prefix_caching=False), case.policy
    )
    shape = model_shape(model, KVShape.of(model, config.block_size, torch.float32), config.chunk_bytes)
    budget = budget_chunks(shape, None, case.num_blocks, 0)
    views = [DeviceView(i, budget) for i in range(NUM_DEVICES)]
    links = TimedLinks(lambda source, destination: COPY_BYTES_PER_S, 0.0)
    machine = SimMachine(
        model, cost, links, views, torch.float32, config.chunk_bytes, "cpu", shares_head=True, host=host
    )
    rows = [TraceRow(job.at_s, job.num_prompt_tokens, job.num_output_tokens) for job in jobs]
    found = Simulation(lambda: machine, model, config, rows, model.max_position_embeddings).run()
    return figures(found) | {"transitions": found["transitions"]}


def host_time(*spent: Sequence[float]) -> HostTime:
    """Return what the host takes for a microbatch, a token and a request, by what `spent` says of three loads."""
    seconds, *counts = np.array(spent).T
    step_s, token_s, request_s = (
        max(0.0, float(each_s)) for each_s in np.linalg.solve(np.stack(counts, axis=1), seconds)
    )
    return HostTime(step_s, token_s, request_s)


def calibrated(spent: HostTime, live: dict[str, dict[str, Any]], seed: int) -> tuple[HostTime, float]:
    """Return the multiple of the host's time and the slowness of devices that predict the calibrations' times best."""

    def scaled(factor: float) -> HostTime:
        return HostTime(*(factor * each_s for each_s in asdict(spent).values()))

    def error(found: tuple[float, float]) -> float:
        factor, slowness = found
        times = [(predict(c, c.jobs(seed), scaled(factor), slowness), live[name]) for name, c in CALIBRATIONS.items()]
        return sum(math.log(found["elapsed_s"] / real["elapsed_s"]) ** 2 for found, real in times)

    factor, slowness = min(product(FACTORS, SLOWNESS), key=error)
    return scaled(factor), slowness


def compare(live: dict[str, Any], simulated: dict[str, Any]) -> dict[str, Any]:
    """Return how far the simulation is off, and which figures are out of bounds."""
    deviations = {name: simulated[name] / live[name] - 1 for name in FIGURES}
    missed = [name for name, bound in BOUNDS.items() if abs(deviations[name]) > bound]
    if len(simulated["transitions"]) != len(live["transitions"]):
        missed.append("transitions")
    return {"live": live, "simulated": simulated, "deviations": deviations, "missed": missed}


async def serve_all(seed: int, num_rounds: int) -> dict[str, dict[str, Any]]:
    """Serve all loads live. Returns figures by load: of those that are compared, the medians over the rounds."""
    live = {name: await serve(case, case.jobs(seed)) for name, case in CALIBRATIONS.items()}
    for name, case in CASES.items():
        rounds = [await serve(case, case.jobs(seed)) for _ in range(num_rounds)]
        longest = max((served["transitions"] for served in rounds), key=len)
        live[name] = {key: float(np.median([served[key] for served in rounds])) for key in FIGURES}
        live[name] |= {"transitions": longest, "rounds": rounds}
    return live


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="times that the server answers each load")
    parser.add_argument("--live", type=Path, help="keep what the server did in this file; use it if it is there")
    args = parser.parse_args()
    set_up_logging("error", as_json=False)
    if args.live and args.live.exists():
        live = json.loads(args.live.read_text())
    else:
        live = asyncio.run(serve_all(args.seed, args.rounds))
        if args.live:
            args.live.write_text(json.dumps(live))
    host, slowness = calibrated(host_time(*(live[name]["host"] for name in CALIBRATIONS)), live, args.seed)
    lost = {name: round(1e3 * seconds, 3) for name, seconds in asdict(host).items()}
    print("host, ms:", lost, "devices, of the fit's time:", slowness, file=sys.stderr)
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        results[name] = compare(live[name], predict(case, case.jobs(args.seed), host, slowness))
        for key, value in results[name]["deviations"].items():
            print(f"{name:18} {key:20} live {live[name][key]:8.3f}  deviation {100 * value:+6.1f} %", file=sys.stderr)
    print(json.dumps({"host": asdict(host), "slowness": slowness, "cases": results}))
    if any(result["missed"] for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
