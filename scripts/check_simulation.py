#!/usr/bin/env python3
"""Compare the simulation with the live server, on workloads that its constants were not fitted on.

    python scripts/fit_cost_model.py --devices cpu:2 && python scripts/check_simulation.py

A server on two virtual CPU devices answers a steady load, a burst under drop, and the same burst under recompute; the
same requests are simulated with the constants that scripts/fit_cost_model.py left on this machine. What the server's
process adds to each step (--step-overhead; scheduling, streaming, the client beside it) is taken from a load of its own
unless it is given. Bounds: output tokens per second and mean TTFT within 15 %, P99 TTFT within 25 %, as many
transitions. Needs a machine with nothing else to do. Ends with 1 if a bound is missed; the last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from load import report
from load.client import Recording, Target, first_model, run
from load.server import running_server
from load.workload import Job, Span, draw_lengths, make_jobs, poisson_arrivals, stream_of

from kunserve.config import EngineConfig
from kunserve.engine.placement import budget_chunks, model_shape
from kunserve.gpu.kv_memory import KVShape
from kunserve.log import set_up_logging
from kunserve.model.card import load_card
from kunserve.model.costs import cost_model
from kunserve.planner.snapshot import DeviceView
from kunserve.sim.links import TimedLinks
from kunserve.sim.machine import SimMachine
from kunserve.sim.simulation import Simulation, with_policy
from kunserve.sim.traces import TraceRow

MODEL, NUM_DEVICES = "smollm2-135m", 2
COPY_BYTES_PER_S = 4e9  # between virtual CPU devices
BOUNDS = {"output_tokens_per_s": 0.15, "mean_ttft_s": 0.15, "p99_ttft_s": 0.25}


@dataclass(frozen=True, slots=True)
class Case:
    """A workload: Poisson arrivals, lengths uniform."""

    policy: str
    num_requests: int
    rate: float
    prompt: Span
    output: Span
    num_blocks: int

    def jobs(self, seed: int) -> list[Job]:
        """What is sent when."""
        times = poisson_arrivals(self.rate, self.num_requests, stream_of(seed, 0))
        lengths = draw_lengths(self.prompt, self.output, len(times), stream_of(seed, 1))
        return make_jobs(times, lengths, (None, None), 0.0, stream_of(seed, 2))


BURST = Case("drop", 60, 16.0, Span(48, 96), Span(160, 256), 256)
CALIBRATION = Case("drop", 24, 2.0, Span(64, 192), Span(24, 48), 1024)
CASES = {
    "steady": Case("drop", 60, 3.0, Span(32, 256), Span(32, 96), 1024),
    "burst, drop": BURST,
    "burst, recompute": replace(BURST, policy="recompute"),
}


async def serve(case: Case, jobs: Sequence[Job]) -> dict[str, float]:
    """What the live server does with it."""
    flags = ("--model", MODEL, "--devices", f"cpu:{NUM_DEVICES}", "--num-gpu-blocks-override", str(case.num_blocks))
    async with running_server(*flags, "--overload-policy", case.policy) as server:
        recording = Recording.of(jobs, (server.url,))
        target = Target((server.url,), await first_model(server.url, {}), extra_body={"ignore_eos": True})
        await run(recording, target)
        state = await server.state()
    summary = report.summarize(recording)
    if summary["completed"] < len(jobs):
        raise SystemExit(f"the live server failed: {summary['failures']}")
    return figures(summary, "p99", sum(t["started_s"] < state["now_s"] for t in state["transitions"]))


def figures(summary: dict[str, Any], p99: str, num_transitions: int) -> dict[str, float]:
    """What is compared."""
    ttft = summary["ttft_s"]
    return {
        "output_tokens_per_s": summary["output_tokens_per_s"],
        "mean_ttft_s": ttft["mean"],
        "p99_ttft_s": ttft[p99],
        "transitions": num_transitions,
    }


def predict(case: Case, jobs: Sequence[Job], step_overhead_s: float) -> dict[str, float]:
    """What the simulation says."""
    model = load_card(MODEL).config
    cost, _ = cost_model(MODEL, model, "cpu")
    cost = replace(cost, stage_s=cost.stage_s + step_overhead_s)
    config = with_policy(EngineConfig(MODEL, num_blocks_override=case.num_blocks), case.policy)
    shape = model_shape(model, KVShape.of(model, config.block_size, torch.float32), config.chunk_bytes)
    budget = budget_chunks(shape, None, case.num_blocks, 0)
    views = [DeviceView(i, budget) for i in range(NUM_DEVICES)]
    links = TimedLinks(lambda source, destination: COPY_BYTES_PER_S, 0.0)
    machine = SimMachine(model, cost, links, views, torch.float32, config.chunk_bytes, "cpu", shares_head=True)
    rows = [TraceRow(job.at_s, job.num_prompt_tokens, job.num_output_tokens) for job in jobs]
    found = Simulation(machine, model, config, rows, model.max_position_embeddings).run()
    return figures(found, "p99", found["num_transitions"])


def fit_overhead(case: Case, jobs: Sequence[Job], live: dict[str, float]) -> float:
    """Seconds per step beside the devices' with which a load's mean TTFT comes out right: by bisection."""
    low, high = 0.0, 0.05
    for _ in range(12):
        middle = (low + high) / 2
        is_low = predict(case, jobs, middle)["mean_ttft_s"] < live["mean_ttft_s"]
        low, high = (middle, high) if is_low else (low, middle)
    return low


def compare(live: dict[str, float], simulated: dict[str, float]) -> dict[str, Any]:
    """Deviations, and which of them are out of bounds."""
    deviations = {name: simulated[name] / live[name] - 1 for name in BOUNDS}
    missed = [name for name, bound in BOUNDS.items() if abs(deviations[name]) > bound]
    if simulated["transitions"] != live["transitions"]:
        missed.append("transitions")
    return {"live": live, "simulated": simulated, "deviations": deviations, "missed": missed}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step-overhead", type=float, help="seconds per stage of a step, instead of measuring it")
    args = parser.parse_args()
    set_up_logging("error", as_json=False)
    results: dict[str, Any] = {}
    overhead_s = args.step_overhead
    if overhead_s is None:
        jobs = CALIBRATION.jobs(args.seed + 1)
        live = await serve(CALIBRATION, jobs)
        overhead_s = await asyncio.to_thread(fit_overhead, CALIBRATION, jobs, live)
    for name, case in CASES.items():
        jobs = case.jobs(args.seed)
        live = await serve(case, jobs)
        results[name] = compare(live, await asyncio.to_thread(predict, case, jobs, overhead_s))
        for key, value in results[name]["deviations"].items():
            print(f"{name:18} {key:20} live {live[key]:8.3f}  deviation {100 * value:+6.1f} %", file=sys.stderr)
    print(json.dumps({"step_overhead_s": overhead_s, "cases": results}))
    if any(result["missed"] for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    asyncio.run(main())
