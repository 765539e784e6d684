"""`python -m kunserve.sim`: an overload policy on a simulated cluster; the last line of stdout is one JSON object."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.random import default_rng

from kunserve.command.command_line import OneLineParser, number_from
from kunserve.config import EngineConfig
from kunserve.errors import ConfigError
from kunserve.log import set_up_logging
from kunserve.model.card import load_card
from kunserve.sim.cluster import GIB, parse_cluster
from kunserve.sim.policies import PLENTY, PLENTY_TIMES, POLICIES, with_policy
from kunserve.sim.traces import TraceRow, read_rows, stretch, upscale
from kunserve.sim.workload import WORKLOADS, Arrivals, synthesize
from kunserve.version import add_version_flag

NEVER = 1e-9  # a watermark below which demand never is
MOST_REQUESTS = 1_000_000  # of one simulation

# What numbers may be. Beyond these bounds a run would not end, or would fail in the middle of it.
_amount = number_from(float, 1e-6, 1e6)
_seconds = number_from(float, 0.0, 1e6)
_count = number_from(int, 1, 1_000_000)


@dataclass(frozen=True, slots=True)
class Options:
    """What is simulated. Rates per second of the whole cluster, times in seconds."""

    cluster: str = "8xA800"
    model: str = "qwen2.5-14b"
    workload: str = "burstgpt"  # or a trace file
    policy: str = "drop"
    seed: int = 0
    duration_s: float = 128.0
    rate: float | None = None  # None: what the workload's default is, or the trace's own
    scale: float = 1.0  # times as many arrivals
    time_scale: float = 1.0  # times between arrivals are so many times as long
    burst_height: float = 2.0
    burst_s: float = 20.0
    memory_gib: float | None = None  # of each GPU, instead of its own
    lengths: Path | None = None  # of this file, instead of synthetic ones
    block_size: int = 64  # tuned for vLLM in the paper
    max_num_batched_tokens: int = 1024
    max_num_seqs: int = 1024
    watermark: float = 0.0
    is_running_ahead: bool = False  # a microbatch more in flight than stages, as the live server has it
    step_overhead_s: float = 0.0  # of the host, for each stage of a microbatch
    is_coordinated: bool = True
    is_looking_ahead: bool = True
    is_restoring: bool = True
    restore_hold_s: float = 5.0
    has_prefix_cache: bool = False


def rows_of(options: Options) -> list[TraceRow]:
    """The trace that the options name, scaled. ValueError if it cannot be read."""
    rng = default_rng([options.seed, 9])
    if options.workload in WORKLOADS:
        arrivals = Arrivals.burstgpt(options.duration_s, rng, options.burst_height, options.burst_s)
        rate = options.rate or default_rate(options)
        _check_number(rate * options.scale * options.duration_s)
        lengths = read_rows(options.lengths, needs_times=False) if options.lengths else []
        pairs = [(row.num_prompt_tokens, row.num_output_tokens) for row in lengths]
        rows = synthesize(
            WORKLOADS[options.workload], arrivals, rate * options.scale, options.duration_s, options.seed, pairs
        )
    else:
        rows = read_rows(Path(options.workload), needs_times=True)
        _check_number(len(rows) * options.scale)
        rows = upscale(rows, options.scale, rng)
        if options.rate:
            rows = stretch(rows, len(rows) / (max(row.at_s for row in rows) or 1.0) / options.rate)
    rows = stretch(rows, options.time_scale)
    return [row for row in rows if row.at_s < options.duration_s * options.time_scale]


def _check_number(num_requests: float) -> None:
    if num_requests > MOST_REQUESTS:
        raise ValueError(
            f"{num_requests:,.0f} requests would come, more than {MOST_REQUESTS:,}: "
            "give a shorter --duration, a lower --rate or a lower --scale"
        )


# Requests per second and GPU at which mean demand for memory is about the paper's (51 to 58 %).
RATES = {
    ("a800", "qwen2.5-14b"): {"burstgpt": 5.0, "sharegpt": 2.1, "longbench": 0.55},
    ("h800", "qwen2.5-72b"): {"burstgpt": 5.0, "sharegpt": 2.1, "longbench": 0.55},
}


def default_rate(options: Options) -> float:
    """The rate of a workload on a cluster; ConfigError where none is known."""
    cluster = parse_cluster(options.cluster)
    try:
        return RATES[cluster.kind, options.model][options.workload] * cluster.num_gpus
    except KeyError:
        raise ConfigError(f"no default rate for {options.model} on {cluster.kind}: give --rate") from None


def simulate(options: Options) -> dict[str, Any]:
    """Run it; the report. ConfigError or ValueError if the options cannot be met."""
    model = load_card(options.model).config
    from kunserve.sim.machine import SimMachine  # with torch: options are judged without
    from kunserve.sim.simulation import Simulation

    cluster = parse_cluster(options.cluster)
    if options.memory_gib is not None:
        cluster = replace(cluster, memory_bytes=int(options.memory_gib * GIB))
    if options.policy == PLENTY:
        cluster = replace(cluster, memory_times=PLENTY_TIMES)
    config = EngineConfig(
        options.model,
        block_size=options.block_size,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_seqs=options.max_num_seqs,
        max_num_queued_reqs=1 << 30,
        swap_space_bytes=64 << 30,
        watermark=options.watermark,
        restore_hold_s=options.restore_hold_s,
        enable_prefix_caching=options.has_prefix_cache,
        async_scheduling=options.is_running_ahead,  # off, as the host takes no time here that this would hide
    )
    if not options.is_restoring:
        config = replace(config, restore_watermark=NEVER)
    if not options.is_looking_ahead:
        config = replace(config, microbatching="tokens")
    machine = SimMachine.of_gpus(model, cluster, options.block_size, is_coordinated=options.is_coordinated)
    machine.cost = replace(machine.cost, stage_s=machine.cost.stage_s + options.step_overhead_s)
    rows = rows_of(options)
    if not rows:
        raise ValueError("nothing arrives: give a longer --duration or a higher --rate")
    simulation = Simulation(machine, model, with_policy(config, options.policy), rows, model.max_position_embeddings)
    report = simulation.run()
    what = {"cluster": options.cluster, "model": options.model, "workload": options.workload}
    return what | {"policy": options.policy, "seed": options.seed, "rate": len(rows) / (rows[-1].at_s or 1.0)} | report


def parse_arguments(arguments: list[str] | None = None) -> tuple[Options, bool]:
    """The command line as options, and whether the report is to be brief."""
    default = Options()
    parser = OneLineParser("python -m kunserve.sim", description=__doc__)
    add_version_flag(parser)
    add = parser.add_argument
    add("--cluster", default=default.cluster, help="GPUs, as 8xA800 or 16xH800 (default %(default)s)")
    add("--model", default=default.model, help="a model card (default %(default)s)")
    add("--workload", default=default.workload, help=f"{', '.join(WORKLOADS)}, or a trace file (default %(default)s)")
    add("--policy", choices=POLICIES, default=default.policy)
    add("--seed", type=number_from(int, 0, (1 << 63) - 1), default=default.seed, help="same seed, same report")
    add(
        "--duration", dest="duration_s", type=_amount, default=default.duration_s, help="seconds in which requests come"
    )
    add("--rate", type=_amount, help="requests per second on average, of all GPUs (default: about the paper's demand)")
    add("--scale", type=_amount, default=default.scale, help="times as many arrivals, bursts kept")
    add("--time-scale", type=_amount, default=default.time_scale, help="times between arrivals so many times as long")
    add("--burst-height", type=_amount, default=default.burst_height, help="rate in a burst, over that outside")
    add("--burst-length", dest="burst_s", type=_seconds, default=default.burst_s, help="seconds of a burst")
    add(
        "--memory",
        dest="memory_gib",
        type=number_from(float, 1e-6, 1024.0),
        help="GiB of each GPU, instead of what it has",
    )
    add("--lengths", type=Path, help="draw lengths from this file (ShareGPT lengths, Azure, BurstGPT, Mooncake)")
    add("--block-size", type=_count, default=default.block_size)
    add("--max-num-batched-tokens", type=_count, default=default.max_num_batched_tokens)
    add("--max-num-seqs", type=_count, default=default.max_num_seqs)
    add("--watermark", type=number_from(float, 0.0, 1.0), default=default.watermark)
    add(
        "--step-overhead",
        dest="step_overhead_s",
        type=number_from(float, 0.0, 60.0),
        default=default.step_overhead_s,
        help="seconds that the host adds to each stage of a step (the paper's decode iteration of 60 ms: about 0.015)",
    )
    add("--restore-hold", dest="restore_hold_s", type=_seconds, default=default.restore_hold_s)
    add("--run-ahead", dest="is_running_ahead", action="store_true", help="plan a microbatch more, as the live server")
    add("--no-restore", dest="is_restoring", action="store_false", help="never bring weights back")
    add("--no-coordination", dest="is_coordinated", action="store_false", help="KV does not give way to activations")
    add("--no-lookahead", dest="is_looking_ahead", action="store_false", help="chains count tokens, not time")
    add(
        "--enable-prefix-caching",
        dest="has_prefix_cache",
        action="store_true",
        help="requests that begin alike share KV, by the hash ids of a Mooncake trace; the report has prefix_hit_rate",
    )
    add("--brief", action="store_true", help="without what is kept over time and the transitions")
    values = vars(parser.parse_args(arguments))
    is_brief = values.pop("brief")
    return Options(**values), is_brief


def main() -> None:
    """Entry point."""
    options, is_brief = parse_arguments()
    set_up_logging("warning", as_json=False)
    try:
        report = simulate(options)
    except (ConfigError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    report.pop("answers")
    if is_brief:
        report.pop("transitions")
        report["memory"].pop("over_time")
    print(json.dumps(report), file=sys.stdout)


if __name__ == "__main__":
    main()
