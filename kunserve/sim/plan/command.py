"""`kunserve plan`: what GPUs hold of a model, how many requests that carries, and whether drops would gain anything."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from kunserve.command.command_line import OneLineParser, check_matplotlib, number_from
from kunserve.errors import ConfigError
from kunserve.log import set_up_logging
from kunserve.model.card import find_config
from kunserve.sim.machine import DTYPE, SimMachine, kv_dtype_on_gpus
from kunserve.sim.options import KV_DTYPE_HELP, Options, cluster_of, rows_of, simulate
from kunserve.sim.plan.capacity import Capacity, Lengths, RequestRates
from kunserve.sim.plan.outlook import DROP, MORE_GPUS, ROWS, WIDER, Outcome, Outlook, busiest
from kunserve.sim.policies import PLENTY
from kunserve.sim.traces import TraceRow, cut, stretch
from kunserve.sim.workload import WORKLOADS
from kunserve.sizes import format_size
from kunserve.version import add_version_flag

MOST_REQUESTS = 1000  # that are simulated, with each policy
NAMES = {PLENTY: "endless memory"}

_amount = number_from(float, 1e-6, 1e6)


def make_parser() -> OneLineParser:
    """Return the parser of the command's flags."""
    parser = OneLineParser("kunserve plan", description=__doc__)
    add_version_flag(parser)
    add = parser.add_argument
    add("--gpus", required=True, help="number and kind of GPUs, as 4xH100 or 8xL40S")
    add("--model", required=True, help="a model card, or a Hugging Face folder (its config.json is enough)")
    add("--kv-cache-dtype", default=Options().kv_cache_dtype, metavar="DTYPE", help=KV_DTYPE_HELP)
    add("--trace", type=Path, help="a trace file: its times and lengths (Azure, BurstGPT, Mooncake)")
    add("--rate", type=_amount, help="requests a second on average, of all GPUs; with --trace: its times are stretched")
    add("--workload", choices=WORKLOADS, help="lengths without a trace (default sharegpt)")
    add("--lengths", type=Path, help="draw lengths from this file instead")
    add("--burst-height", type=_amount, help="rate in a burst over that outside (default 2)")
    add(
        "--duration", dest="duration_s", type=_amount, default=120.0, help="seconds of the load, the busiest of a trace"
    )
    add(
        "--memory",
        dest="memory_gib",
        type=number_from(float, 1e-6, 1024.0),
        help="GiB of memory of each GPU, if they differ from its kind's",
    )
    add("--seed", type=number_from(int, 0, (1 << 63) - 1), default=0, help="seed of the load (default 0)")
    add("--plot", type=Path, metavar="FILE", help="draw demand for KV and TTFT over time")
    add("--json", dest="as_json", action="store_true", help="print one JSON object instead of tables")
    return parser


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line's values; exit with one line where they contradict each other."""
    parser = make_parser()
    values = parser.parse_args(arguments)
    if values.trace is None and values.rate is None:
        parser.error("how much load is it? Give --rate, or --trace with a file")
    if values.trace is not None and (values.workload or values.lengths or values.burst_height):
        parser.error("a trace has its own lengths and bursts: leave --workload, --lengths and --burst-height out")
    return values


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    values = parse_arguments(arguments)
    set_up_logging("error", as_json=False)
    try:
        if values.plot is not None:
            check_matplotlib()
        outlook, reports = look(values)
    except (ConfigError, ValueError) as error:
        sys.exit(f"kunserve plan: {str(error).replace('--cluster', '--gpus')}")
    if values.as_json:
        print(json.dumps(figures(values, outlook)))
    else:
        show(values, outlook)
    if values.plot is not None:
        from kunserve.sim.plan.plot import draw

        draw(outlook, reports, values.plot)


def look(values: argparse.Namespace) -> tuple[Outlook, dict[str, dict[str, Any]]]:
    """Return the outlook, and the report of each simulation by the name of its row."""
    options = Options(
        cluster=_cluster_name(values.gpus),
        model=values.model,
        kv_cache_dtype=values.kv_cache_dtype,
        workload=values.workload or "sharegpt" if values.trace is None else str(values.trace.absolute()),
        seed=values.seed,
        rate=values.rate,
        burst_height=values.burst_height or Options().burst_height,
        duration_s=values.duration_s if values.trace is None else 1e9,
        memory_gib=values.memory_gib,
        lengths=values.lengths,
        is_running_ahead=True,
    )
    model, cluster = find_config(options.model), cluster_of(options)
    kv_dtype = kv_dtype_on_gpus(options.kv_cache_dtype, model)
    capacity, plain = (Capacity.of(model, cluster, options.block_size, dtype) for dtype in (kv_dtype, DTYPE))
    wider = plain if plain.kv_token_bytes > capacity.kv_token_bytes else None
    found = busiest(rows_of(options), values.duration_s, MOST_REQUESTS)
    if not found:
        raise ValueError("nothing arrives: give a longer --duration or a higher --rate")
    # As all policies can serve them: where memory has no end, requests could be longer than beside one copy.
    rows = [cut(replace(row, at_s=row.at_s - found[0].at_s), capacity.max_model_len) for row in found]
    num_cut = sum(cut.num_prompt_tokens < row.num_prompt_tokens for cut, row in zip(rows, found, strict=True))
    lengths = Lengths(fmean(r.num_prompt_tokens for r in rows), fmean(r.num_output_tokens for r in rows))
    cost = SimMachine.of_gpus(model, cluster, options.block_size, kv_dtype=kv_dtype).cost
    rates = RequestRates.of(capacity, cost, model.num_layers, lengths, options.max_num_seqs)
    more = f"{cluster.num_gpus + capacity.gpus_per_copy}x{options.cluster.partition('x')[2]}"
    runs = {name: replace(options, policy=name) for name in ROWS}
    runs[MORE_GPUS] = replace(options, policy="recompute", cluster=more)
    if wider is not None:
        runs[WIDER] = replace(options, policy=DROP, kv_cache_dtype="auto")
    reports = dict(zip(runs, _simulate_all([*runs.values()], rows), strict=True))
    peak = max(reports[PLENTY]["memory"]["over_time"]["used_tokens"])
    seconds = max(rows[-1].at_s, 1.0)
    outcomes = {name: Outcome.of(report) for name, report in reports.items()}
    need = peak / capacity.kv_tokens
    return Outlook(capacity, lengths, rates, len(rows) / seconds, seconds, num_cut, need, outcomes, wider), reports


def _cluster_name(gpus: str) -> str:
    """Return `4xH100` for `4xh100`, too: people write them either way."""
    number, _, kind = gpus.partition("x")
    return f"{number}x{kind.upper()}"


def _simulate_all(runs: Sequence[Options], rows: Sequence[TraceRow]) -> list[dict[str, Any]]:
    """Run simulations side by side, each in a process of its own."""
    num_processes = min(len(runs), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as processes:
        return list(processes.map(partial(_simulate, rows=list(rows)), runs))


def _simulate(options: Options, rows: list[TraceRow]) -> dict[str, Any]:
    set_up_logging("error", as_json=False)
    return simulate(options, stretch(rows, options.time_scale))


def figures(values: argparse.Namespace, outlook: Outlook) -> dict[str, Any]:
    """Return the outlook as a JSON object; what concerns the dtype of KV only if the command line names it."""
    capacity, kv = outlook.capacity, {}
    if values.kv_cache_dtype != "auto":
        kv = {"kv_cache_dtype": values.kv_cache_dtype, "kv_token_bytes": capacity.kv_token_bytes}
    if (wider := outlook.wider) is not None:
        kv["kv_in_16_bits"] = {
            "kv_token_bytes": wider.kv_token_bytes,
            "kv_tokens": wider.kv_tokens,
            "dropped_kv_tokens": wider.dropped_kv_tokens,
        }
    return kv | {
        "verdict": outlook.verdict(),
        "copies": capacity.num_copies,
        "gpus_per_copy": capacity.gpus_per_copy,
        "weight_bytes": capacity.weight_bytes,
        "kv_tokens": capacity.kv_tokens,
        "dropped_kv_tokens": capacity.dropped_kv_tokens,
        "mean_lengths": asdict(outlook.lengths),
        "rates": asdict(outlook.rates),
        "rate": outlook.rate,
        "seconds": outlook.seconds,
        "num_cut": outlook.num_cut,
        "need": outlook.need,
        "room": outlook.room,
        "outcomes": {name: asdict(outcome) for name, outcome in outlook.outcomes.items()},
    }


def _kv_of_8_bits(values: argparse.Namespace, outlook: Outlook) -> str:
    """Return a line that compares KV of 8 bits with KV of 16; nothing where it has 16."""
    if (wider := outlook.wider) is None:
        return ""
    return (
        f"A token of KV takes {outlook.capacity.kv_token_bytes:,} bytes ({values.kv_cache_dtype}); in 16 bits it takes "
        f"{wider.kv_token_bytes:,}, and there would be {wider.kv_tokens:,} tokens, {wider.dropped_kv_tokens:,} after "
        "the largest drop.\n"
    )


def show(values: argparse.Namespace, outlook: Outlook) -> None:
    """Print the outlook for people."""
    console, capacity, rates = Console(soft_wrap=True), outlook.capacity, outlook.rates
    lengths = f"{outlook.lengths.prompt:.0f} tokens in and {outlook.lengths.output:.0f} out on average"
    copies = f"{capacity.num_copies} {'copy' if capacity.num_copies == 1 else 'copies'}"
    chains = " and ".join(f"{length}" for length, _ in capacity.chains)
    room = f" ({outlook.room:.2f} times; chains of {chains} copies)" if outlook.room > 1 else ""
    console.print(
        f"[bold]{values.model} on {values.gpus}[/]: {copies} of the weights ({format_size(capacity.weight_bytes)} on "
        f"{capacity.gpus_per_copy} GPU{'s' if capacity.gpus_per_copy > 1 else ''} each).\n"
        f"KV: {capacity.kv_tokens:,} tokens; {capacity.dropped_kv_tokens:,} after the largest drop"
        f"{room}.\n"
        f"{_kv_of_8_bits(values, outlook)}"
        f"Load: {outlook.seconds:.0f} s of {outlook.rate:.2f} requests a second, {lengths}; "
        f"at the peak it needs {outlook.need:.2f} times the KV.\n"
        f"For long, KV carries about {rates.kv:.1f} requests a second, {rates.dropped_kv:.1f} after the largest drop; "
        f"compute {rates.compute:.1f}."
    )
    table = Table()
    for column in ("simulated", "TTFT p50 s", "p99 s", "longest gap s", "tokens/s", "preempted", "drops"):
        table.add_column(column, justify="left" if column == "simulated" else "right")
    for name, o in outlook.outcomes.items():
        times = (f"{value:.2f}" for value in (o.ttft_p50, o.ttft_p99, o.longest_gap))
        table.add_row(NAMES.get(name, name), *times, f"{o.tokens_per_s:.0f}", str(o.num_preempted), str(o.num_drops))
    if outlook.num_cut:
        console.print(
            f"{outlook.num_cut} prompts are longer than the {capacity.max_model_len:,} tokens that a request can have "
            "here: they are cut to that.",
            style="yellow",
        )
    console.print(table)
    console.print(outlook.verdict())
    console.print("Times are predicted from data sheets: compare rows, and measure before you buy.", style="dim")
