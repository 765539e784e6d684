"""`kunserve simulate`: an overload policy on simulated GPUs, of one server or several; prints one JSON object."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kunserve.command.command_line import OneLineParser, number_from, or_auto
from kunserve.errors import ConfigError
from kunserve.log import set_up_logging
from kunserve.model.costs import OVERLAP
from kunserve.sim.nodes.router import ROUTERS
from kunserve.sim.options import HOST_TOKEN_S, KV_DTYPE_HELP, Options, simulate
from kunserve.sim.policies import POLICIES
from kunserve.sim.workload import WORKLOADS
from kunserve.version import add_version_flag

# What numbers may be. Beyond these bounds a run would not end, or would fail in the middle of it.
_amount = number_from(float, 1e-6, 1e6)
_seconds = number_from(float, 0.0, 1e6)
_count = number_from(int, 1, 1_000_000)


def make_parser() -> OneLineParser:
    """Return the parser of the command's flags."""
    default = Options()
    parser = OneLineParser("kunserve simulate", description=__doc__)
    add_version_flag(parser)
    add = parser.add_argument
    add("--cluster", default=default.cluster, help="GPUs of a server, as 8xA800 or 16xH800 (default %(default)s)")
    add("--model", default=default.model, help="a model card (default %(default)s)")
    add("--kv-cache-dtype", default=default.kv_cache_dtype, metavar="DTYPE", help=KV_DTYPE_HELP)
    add("--workload", default=default.workload, help=f"{', '.join(WORKLOADS)}, or a trace file (default %(default)s)")
    add("--policy", choices=POLICIES, default=default.policy, help="what makes room (default %(default)s)")
    add("--seed", type=number_from(int, 0, (1 << 63) - 1), default=default.seed, help="same seed, same report")
    add(
        "--duration", dest="duration_s", type=_amount, default=default.duration_s, help="seconds in which requests come"
    )
    add(
        "--rate",
        type=_amount,
        help="requests per second on average, of all servers (default: about the paper's demand)",
    )
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
    _add_node_flags(parser, default)
    _add_engine_flags(parser, default)
    add("--brief", action="store_true", help="without what is kept over time and the transitions")
    return parser


def _add_node_flags(parser: OneLineParser, default: Options) -> None:
    """Add the flags of several servers."""
    add = parser.add_argument
    add("--nodes", type=number_from(int, 1, 1000), default=default.nodes, help="servers, each of such a cluster")
    add(
        "--router",
        choices=ROUTERS,
        default=default.router,
        help="who of them gets a request: the one with the fewest, any, or as llm-d scores queue, KV and prefix "
        "(default %(default)s)",
    )
    add(
        "--pod-start",
        dest="pod_start_s",
        type=_seconds,
        help="an autoscaler starts servers, which take requests so many seconds after they were asked for",
    )
    add(
        "--scale-at",
        type=_amount,
        default=default.scale_at,
        help="demand over undropped capacity that it aims at, for each server (default %(default)s)",
    )
    add("--most-nodes", type=number_from(int, 2, 1000), help="servers that it starts at most (default: twice --nodes)")


def _add_engine_flags(parser: OneLineParser, default: Options) -> None:
    """Add the flags of the simulated engine, with the server's names where it has them."""
    add = parser.add_argument
    add("--block-size", type=_count, default=default.block_size, help="tokens of a KV block")
    add("--max-num-batched-tokens", type=_count, default=default.max_num_batched_tokens, help="tokens of a step")
    add("--max-num-seqs", type=_count, default=default.max_num_seqs, help="most requests that run on one device")
    add(
        "--windowed-kv-share",
        type=or_auto(number_from(float, 0.001, 1.0)),
        default="auto",
        metavar="SHARE",
        help="KV of a layer with a window over that of one that sees all, in models with both, or auto: it follows the "
        "requests, which is the default, as of the server",
    )
    add(
        "--watermark",
        type=number_from(float, 0.0, 1.0),
        default=default.watermark,
        help="share of the KV blocks that admission leaves free",
    )
    for name, default_s, what in (
        ("step", default.host_step_s, "a step of a group"),
        ("token", default.host_token_s, f"each token that it streams (this server: about {HOST_TOKEN_S})"),
    ):
        add(
            f"--host-{name}",
            dest=f"host_{name}_s",
            type=number_from(float, 0.0, 60.0),
            default=default_s,
            help=f"seconds that the server's main thread, which all groups share, takes for {what}",
        )
    add(
        "--overlap",
        type=number_from(float, 1.0, 1e3),
        help="how far reading weights and multiplying overlap: 1 is one after the other, many the longer of both "
        f"(default {OVERLAP:g})",
    )
    add(
        "--restore-hold",
        dest="restore_hold_s",
        type=_seconds,
        default=default.restore_hold_s,
        help="seconds of low demand before weights come back",
    )
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


def parse_arguments(arguments: list[str] | None = None) -> tuple[Options, bool]:
    """Return the command line as options, and whether the report is to be brief."""
    values = vars(make_parser().parse_args(arguments))
    is_brief = values.pop("brief")
    return Options(**values), is_brief


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options, is_brief = parse_arguments(arguments)
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
