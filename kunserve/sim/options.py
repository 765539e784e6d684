"""One simulation as its options name it: which cluster, model, trace and policy; and how it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from numpy.random import default_rng

from kunserve.config import EngineConfig
from kunserve.engine.schedule.scheduler import Scheduler
from kunserve.errors import ConfigError
from kunserve.model.card import find_config
from kunserve.sim.cluster import GIB, Cluster, Instances, parse_cluster
from kunserve.sim.nodes.router import make_router
from kunserve.sim.nodes.scaler import Scaler
from kunserve.sim.policies import PLENTY, PLENTY_TIMES, VLLM, with_policy
from kunserve.sim.traces import TraceRow, read_rows, stretch, upscale
from kunserve.sim.workload import WORKLOADS, Arrivals, synthesize

# Of the main thread for each streamed token, measured with 64 clients of a one-layer model on a quiet machine.
HOST_TOKEN_S = 46e-6
KV_DTYPE_HELP = (
    "dtype of KV, as the server's on GPUs: auto: that of the weights, bfloat16; fp8 (also fp8_e4m3): half as many "
    "bytes, with answers that differ from those of 16 bits (default %(default)s)"
)
NEVER = 1e-9  # a watermark below which demand never is
MOST_REQUESTS = 1_000_000  # of one simulation


@dataclass(frozen=True, slots=True)
class Options:
    """What is simulated. Rates per second of all servers together, times in seconds."""

    cluster: str = "8xA800"
    model: str = "qwen2.5-14b"
    kv_cache_dtype: str = "auto"  # one of the server's KV_DTYPES
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
    windowed_kv_share: float | None = None  # None: it follows the requests, as the server's does
    is_running_ahead: bool = False  # a microbatch more in flight than stages, as the live server has it
    host_step_s: float = 0.0  # of the one thread that serves all GPUs and clients, for a microbatch
    host_token_s: float = 0.0  # and for each token that it streams
    overlap: float | None = None  # of reading weights and multiplying (planner/cost.py); None: what GPUs are assumed to
    is_coordinated: bool = True
    is_looking_ahead: bool = True
    is_restoring: bool = True
    restore_hold_s: float = 5.0
    has_prefix_cache: bool = False
    nodes: int = 1  # servers, of as many GPUs as `cluster` says, when the load begins
    router: str = "least"  # one of ROUTERS
    pod_start_s: float | None = None  # until a server that was asked for takes requests; None: none is ever started
    scale_at: float = 0.8  # demand over undropped capacity, for each server, that the autoscaler aims at
    most_nodes: int | None = None  # None: twice `nodes`


def rows_of(options: Options) -> list[TraceRow]:
    """Read or draw the trace that the options name, scaled. ValueError if it cannot be read."""
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
    """Return the rate of a workload on a cluster; ConfigError where none is known."""
    cluster = parse_cluster(options.cluster)
    try:
        return RATES[cluster.kind, options.model][options.workload] * cluster.num_gpus * options.nodes
    except KeyError:
        raise ConfigError(f"no default rate for {options.model} on {cluster.kind}: give --rate") from None


def cluster_of(options: Options) -> Cluster:
    """Return the cluster that the options name. ConfigError if there is none."""
    cluster = parse_cluster(options.cluster)
    if options.memory_gib is not None:
        cluster = replace(cluster, memory_bytes=int(options.memory_gib * GIB))
    return cluster


def scaler_of(options: Options) -> Scaler | None:
    """Return the autoscaler that the options ask for. ConfigError if they contradict each other."""
    if options.router == "prefix" and not options.has_prefix_cache:
        raise ConfigError(
            "--router prefix: there is nothing to find; give --enable-prefix-caching and a Mooncake trace"
        )
    if options.pod_start_s is not None and options.policy == VLLM:
        raise ConfigError(f"--pod-start: with --policy {VLLM} each GPU's copy is a server, and none is ever started")
    if options.pod_start_s is None:
        if options.most_nodes is not None:
            raise ConfigError("--most-nodes: no server is ever started without --pod-start")
        return None
    most = 2 * options.nodes if options.most_nodes is None else options.most_nodes
    if most <= options.nodes:
        raise ConfigError(f"--most-nodes {most}: there are {options.nodes} already when the load begins")
    return Scaler(options.scale_at, options.pod_start_s, most)


def config_of(options: Options) -> EngineConfig:
    """Return how each server is set up, but for its policy."""
    config = EngineConfig(
        options.model,
        block_size=options.block_size,
        kv_cache_dtype=options.kv_cache_dtype,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_seqs=options.max_num_seqs,
        max_num_queued_reqs=1 << 30,
        swap_space_bytes=64 << 30,
        watermark=options.watermark,
        windowed_kv_share=options.windowed_kv_share,
        restore_hold_s=options.restore_hold_s,
        enable_prefix_caching=options.has_prefix_cache,
        async_scheduling=options.is_running_ahead,  # off, as the host takes no time here that this would hide
    )
    if not options.is_restoring:
        config = replace(config, restore_watermark=NEVER)
    if not options.is_looking_ahead:
        config = replace(config, microbatching="tokens")
    return config


def simulate(options: Options, rows: Sequence[TraceRow] | None = None) -> dict[str, Any]:
    """Simulate what the options say, and return the report. `rows` instead of those that the options name.

    No policy knows how long an answer will be: every request asks for as many tokens as the longest answer has.
    ConfigError or ValueError if the options cannot be met.
    """
    model = find_config(options.model)
    # With torch: options are judged without.
    from kunserve.sim.machine import HostTime, SimMachine, kv_dtype_on_gpus, kv_token_bytes
    from kunserve.sim.published import PrefillFirst, as_published
    from kunserve.sim.simulation import Simulation

    cluster, config, num_nodes = cluster_of(options), with_policy(config_of(options), options.policy), options.nodes
    kv_dtype = kv_dtype_on_gpus(options.kv_cache_dtype, model)
    scaler, is_published = scaler_of(options), options.policy == VLLM
    if options.policy == PLENTY:
        cluster = replace(cluster, memory_times=PLENTY_TIMES)
    if is_published:
        instances = Instances.of(model, cluster)
        cluster, num_nodes = replace(cluster, num_gpus=instances.gpus), num_nodes * instances.num_devices
        config = as_published(config, model.max_position_embeddings)
    make_machine = partial(
        SimMachine.of_gpus,
        model,
        cluster,
        options.block_size,
        kv_dtype=kv_dtype,
        is_coordinated=options.is_coordinated,
        host=HostTime(options.host_step_s, options.host_token_s, is_apart=True),
        overlap=options.overlap,
        scheduler=PrefillFirst if is_published else Scheduler,
    )
    rows = rows_of(options) if rows is None else rows
    if not rows:
        raise ValueError("nothing arrives: give a longer --duration or a higher --rate")
    simulation = Simulation(
        make_machine,
        model,
        config,
        rows,
        model.max_position_embeddings,
        num_nodes=num_nodes,
        router=make_router(options.router, options.seed),
        scaler=scaler,
        max_tokens=max(row.num_output_tokens for row in rows),
    )
    report = simulation.run()
    what: dict[str, Any] = {"cluster": options.cluster, "model": options.model, "workload": options.workload}
    if options.kv_cache_dtype != "auto":
        what |= {"kv_cache_dtype": options.kv_cache_dtype, "kv_token_bytes": kv_token_bytes(model, kv_dtype)}
    return what | {"policy": options.policy, "seed": options.seed, "rate": len(rows) / (rows[-1].at_s or 1.0)} | report
