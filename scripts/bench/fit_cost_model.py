"""Measure stages on the devices at hand and fit the constants of the cost model (kunserve/planner/cost.py).

    python scripts/bench/fit_cost_model.py --model smollm2-135m --devices cpu:2

Random microbatches (decode, prompts in spans, both) run on parts of the model and on all of it, through the executor
that serves. One part comes after the other, and nothing counts that runs there for the first time: a decode step of
few rows is recorded then, and made again by one call. All devices run the same one at once: they share the memory's
bandwidth, and in serving all decode or all are busy with prompts at the same time. A third of the microbatches is
held out and says how good the prediction is. The constants go to a file where the server finds them: the cache
folder, or `--out`. The prefix cache is off, and has no part in it: microbatches are made here, not by requests that
could find each other's KV.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kunserve.config import EngineConfig, parse_devices
from kunserve.engine.batch import Microbatch, Span
from kunserve.engine.blocks.block_pool import BlockPool
from kunserve.engine.engine import Engine
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group, Stage
from kunserve.engine.launch.launch import launch
from kunserve.engine.request import Request
from kunserve.engine.step.microbatch import step_inputs
from kunserve.errors import ConfigError
from kunserve.gpu.host import HostDevice
from kunserve.log import set_up_logging
from kunserve.model.card import list_cards, load_card
from kunserve.model.costs import cost_file, cost_folder, derive, device_kind, device_rates, write_costs
from kunserve.planner.cost import CostModel, TokenSpan, Work
from kunserve.planner.cost_fit import Measurement, fit, relative_errors
from kunserve.sampling import SamplingParams

MOST_PREFIX = 1500
MOST_ROWS = 48


@dataclass(frozen=True, slots=True)
class Trial:
    """A stage that holds layers `[0, num_layers)`, and the microbatch that passes it."""

    num_layers: int
    spans: tuple[TokenSpan, ...]
    is_last: bool

    def measured(self, seconds: float) -> Measurement:
        """Return the trial with the time it took."""
        return Measurement(self.num_layers, Work.of(self.spans), True, self.is_last, seconds)


def draw_trial(rng: random.Random, num_layers: int, most_tokens: int) -> Trial:
    """Draw decode, a prompt's span, or both; on a sixth or half of the model, or on all of it with the head."""
    is_last = rng.random() < 1 / 3
    layers = num_layers if is_last else max(1, num_layers // rng.choice((2, 6)))
    kind = rng.choice(("decode", "prefill", "mixed"))
    spans: list[TokenSpan] = []
    room = most_tokens
    if kind != "decode":
        for _ in range(rng.choice((1, 1, 2, 3))):
            num_tokens = round(2 ** rng.uniform(3, 8))
            prefix = rng.choice((0, rng.randrange(MOST_PREFIX)))
            if room >= prefix + num_tokens:
                spans.append(TokenSpan(prefix, num_tokens, int(is_last and rng.random() < 0.3)))
                room -= prefix + num_tokens
    if kind != "prefill" or not spans:
        longest = rng.randrange(16, MOST_PREFIX)
        for _ in range(round(2 ** rng.uniform(0, np.log2(MOST_ROWS)))):
            prefix = rng.randrange(longest // 2, longest)
            if room > prefix:
                spans.append(TokenSpan(prefix, 1, int(is_last)))
                room -= prefix + 1
    return Trial(layers, tuple(spans), is_last)


def microbatch_of(token_spans: Sequence[TokenSpan], group: Group, vocab_size: int) -> Microbatch:
    """Make a microbatch that computes these spans, each of a request of its own with blocks of the group."""
    fleet, spans = Fleet([group]), []
    for i, (prefix, num_tokens, num_samples) in enumerate(token_spans):
        end = prefix + num_tokens
        token_ids = [(7 * i + j) % vocab_size for j in range(end + 1 - num_samples)]
        request = Request(f"trial-{i}", token_ids, SamplingParams(max_tokens=1, temperature=0))
        assert fleet.allocate(request, group, end), "trials are drawn to fit"
        spans.append(Span(request, prefix, end, samples=num_samples == 1))
    return Microbatch(group.group_id, 0, tuple(spans))


async def clock(engine: Engine, device: int) -> float:
    """Return the seconds on a device's clock: on a virtual CPU device, the CPU seconds of its thread."""
    memory = engine.memories[device]
    return await memory.device.run(
        time.thread_time if isinstance(memory.device.inner, HostDevice) else time.perf_counter
    )


async def run_trial(engine: Engine, device: int, trial: Trial) -> float:
    """Return the seconds for one stage on one device, as the executor runs it."""
    whole = next(s for g in engine.groups for s in g.stages if s.device == device)
    stage = Stage(device, 0, trial.num_layers, BlockPool(whole.pool.num_blocks))  # nobody else runs
    group = Group(device, (stage,), engine.groups[0].block_size)
    batch = microbatch_of(trial.spans, group, engine.model.vocab_size)
    inputs = step_inputs(batch, group.block_size, ())
    started = await clock(engine, device)
    await engine.executor.execute(group, inputs)
    return await clock(engine, device) - started


async def measure_all(
    engine: Engine, devices: Sequence[int], trials: Sequence[Trial], seconds: float
) -> list[Measurement]:
    """Run the trials for so long in all, each at least twice; return the median of each, without its first time."""
    parts = sorted({trial.num_layers for trial in trials})
    times: dict[Trial, list[float]] = {trial: [] for trial in trials}
    for num_layers in parts:
        until = time.monotonic() + seconds / len(parts)
        mine = [trial for trial in times if trial.num_layers == num_layers]
        for trial in mine:
            await run_on_all(engine, devices, trial)
        while time.monotonic() < until or not times[mine[-1]]:
            for trial in mine:
                times[trial] += await run_on_all(engine, devices, trial)
                if time.monotonic() > until and times[mine[-1]]:
                    break
    return [trial.measured(float(np.median(times[trial]))) for trial in trials]


async def run_on_all(engine: Engine, devices: Sequence[int], trial: Trial) -> list[float]:
    """Return the seconds of a trial on each device, all at once."""
    return await asyncio.gather(*(run_trial(engine, device, trial) for device in devices))


@dataclass(frozen=True, slots=True)
class Measured:
    """Steps to fit to and steps held out, of one model on one kind of device."""

    model: str
    kind: str
    num_devices: int  # that ran at once
    steps: Sequence[Measurement]
    held_out: Sequence[Measurement]


async def measure(args: argparse.Namespace) -> Measured:
    """Run the trials on all devices."""
    config = EngineConfig(
        model=args.model,
        devices=parse_devices(args.devices),
        num_blocks_override=args.blocks,
        load_format="dummy",
        pipeline_parallel_size=1,
        max_model_len=2 * MOST_PREFIX,
        enable_prefix_caching=False,
    )
    served = await launch(config, args.model, lambda text, share: None)
    try:
        engine = served.engine
        devices = [stage.device for group in engine.groups for stage in group.stages]
        rng = random.Random(args.seed)
        layers, tokens = engine.model.num_layers, args.blocks * config.block_size // 2
        trials = [draw_trial(rng, layers, tokens) for _ in range(args.trials)]
        steps = await measure_all(engine, devices, trials, args.seconds)
    finally:
        await served.close()
    held_out = args.trials // 3
    return Measured(
        served.files.name,
        device_kind(served.machine.device_name),
        len(devices),
        steps[held_out:],
        steps[:held_out],
    )


def errors_of(model: CostModel, steps: Sequence[Measurement]) -> dict[str, float]:
    """Return the median and the 90th percentile of the relative error."""
    errors = relative_errors(model, steps)
    return {"median": round(float(np.median(errors)), 4), "p90": round(float(np.quantile(errors, 0.9)), 4)}


def write_derived(folder: Path) -> None:
    """Write the constants of all cards on all GPUs whose rates we know."""
    for kind, rates in device_rates().items():
        for name in list_cards():
            if kind != "cpu":
                source = f"derived from rates: {rates.source}"
                write_costs(cost_file(name, folder), kind, derive(load_card(name).config, rates), source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="as for the server; its weights are not needed")
    parser.add_argument("--devices", default="cpu:2", help="as for the server")
    parser.add_argument("--seconds", type=float, default=50.0, help="how long to measure")
    parser.add_argument("--trials", type=int, default=120, help="microbatches drawn")
    parser.add_argument("--blocks", type=int, default=1024, help="KV blocks of each device")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--derive", action="store_true", help="measure nothing: derive the GPUs' from their datasheets")
    parser.add_argument("--out", type=Path, help="folder for the constants instead of the cache folder")
    args = parser.parse_args()
    set_up_logging("warning", False)
    if args.derive:
        write_derived(args.out or cost_folder())
        return
    try:
        measured = asyncio.run(measure(args))
    except ConfigError as error:
        sys.exit(f"fit_cost_model: {error.message}")
    fitted = fit(measured.steps)
    path = cost_file(measured.model, args.out or cost_folder())
    write_costs(path, measured.kind, fitted, f"measured, {measured.num_devices} devices at once")
    report = {
        "model": measured.model,
        "kind": measured.kind,
        "devices": measured.num_devices,
        "file": str(path),
        "constants": fitted.to_dict(),
        "held_out": errors_of(fitted, measured.held_out),
        "held_out_sum": errors_of(fit(measured.steps, (1.0,)), measured.held_out),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
