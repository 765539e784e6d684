#!/usr/bin/env python3
"""Compare overload policies: one server per policy with the same memory, the same bursts; a table, JSON and a picture.

`plenty` is the server with memory for all of a burst at once: what is left there is the devices' own time. Where it is
among the policies, the others' answers are compared with its: no policy may change any.

Burst A fills memory by growth (48 requests at 16/s, 64 in / 256 out), burst B by prompts (48 at 4/s, 256 in / 128
out). A peer that runs already is measured the same way: --peer vllm=http://127.0.0.1:8101,http://127.0.0.1:8102.
The prefix cache is off: policies are compared by what they do with KV that is in use. Start a peer without one, too.
The last line of stdout is one JSON object; everything for people goes to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from own_server import running_server
from rich.console import Console
from rich.table import Table

from kunserve.command.command_line import check_matplotlib
from kunserve.loadgen import report
from kunserve.loadgen.client import Recording, Target, first_model, run
from kunserve.loadgen.workload import Span, draw_lengths, make_jobs, poisson_arrivals, stream_of
from kunserve.sizes import ceil_div

POLICIES = ("drop", "recompute", "retract", "swap", "migrate", "queue")
PLENTY = "plenty"
BLOCK_SIZE = 16
NO_CACHE = "--no-enable-prefix-caching"
SETTLE_S = 8.0  # after a burst: long enough for the weights to come back


@dataclass(frozen=True, slots=True)
class Burst:
    """A Poisson burst of equal requests; lengths in tokens."""

    num_requests: int
    rate: float  # requests per second
    num_prompt_tokens: int
    num_output_tokens: int


BURSTS = {"A": Burst(48, 16.0, 64, 256), "B": Burst(48, 4.0, 256, 128)}


def parse_arguments() -> argparse.Namespace:
    """Read the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = ",".join((*POLICIES, PLENTY))
    parser.add_argument("--policies", default=rows, help="which of ours, with commas; empty: none")
    parser.add_argument("--bursts", default="A,B", help="which bursts, with commas")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL,URL", help="a running peer")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--devices", default="cpu:2")
    parser.add_argument("--blocks", type=int, default=256, help="KV blocks of 16 tokens on each device")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder for overload.json and overload.png")
    return parser.parse_args()


async def measure(urls: tuple[str, ...], burst: Burst, seed: int) -> dict[str, Any]:
    """Run one burst; `summary`, `requests` and `metrics` as the load generator reports them."""
    times = poisson_arrivals(burst.rate, burst.num_requests, stream_of(seed, 0))
    prompt, output = Span.parse(str(burst.num_prompt_tokens)), Span.parse(str(burst.num_output_tokens))
    lengths = draw_lengths(prompt, output, len(times), stream_of(seed, 1))
    jobs = make_jobs(times, lengths, (None, None), 0.0, stream_of(seed, 2))
    recording = Recording.of(jobs, urls)
    await run(recording, Target(urls, await first_model(urls[0], {}), seed=seed))
    texts = [stream.text if stream.status == "completed" else None for stream in recording.streams]
    return {"summary": report.summarize(recording), "texts": texts, **report.details(recording)}


def flags_of(policy: str, bursts: dict[str, Burst], args: argparse.Namespace) -> tuple[str, ...]:
    """Return how to start the server; with plenty of memory each device could hold any burst alone."""
    blocks = args.blocks
    if policy == PLENTY:
        tokens = max(b.num_requests * (b.num_prompt_tokens + b.num_output_tokens + BLOCK_SIZE) for b in bursts.values())
        policy, blocks = "queue", ceil_div(tokens, BLOCK_SIZE)
    memory = ("--num-gpu-blocks-override", str(blocks), "--block-size", str(BLOCK_SIZE))
    return ("--model", args.model, "--devices", args.devices, *memory, NO_CACHE, "--overload-policy", policy)


async def measure_policy(policy: str, bursts: dict[str, Burst], args: argparse.Namespace) -> dict[str, Any]:
    """Start a server with this policy, run the bursts one after the other, and stop it."""
    flags = flags_of(policy, bursts, args)
    async with running_server(*flags, log=args.out / f"server-{policy}.log") as server:
        results = {}
        for name, burst in bursts.items():
            before = await server.state()
            result = await measure((server.url,), burst, args.seed)
            await asyncio.sleep(SETTLE_S)
            after = await server.state()
            result["preemptions"] = after["requests"]["preemptions"] - before["requests"]["preemptions"]
            new = after["transitions"][len(before["transitions"]) :]
            result["transitions"] = [t | {"at_s": t["started_s"] - before["now_s"]} for t in new]
            results[name] = result
        return results


def count_others(result: dict[str, Any], plenty: dict[str, Any]) -> int:
    """Return how many answers are not those of the server with plenty, those that never came among them."""
    return sum(text is None or text != other for text, other in zip(result["texts"], plenty["texts"], strict=True))


def table_of(burst: str, results: dict[str, dict[str, Any]]) -> Table:
    """Make a table with a row per policy or peer."""
    table = Table(title=f"Burst {burst}: {BURSTS[burst]}")
    for column in (
        "policy",
        "time s",
        "tok/s",
        "TTFT p50",
        "TTFT p99",
        "TPOT p50",
        "longest gap",
        "preempted",
        "failed",
        "other answers",
    ):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, bursts in results.items():
        s = bursts[burst]["summary"]
        table.add_row(
            name,
            f"{s['elapsed_s']:.1f}",
            f"{s['output_tokens_per_s']:.0f}",
            *(f"{value:.2f}" for value in (s["ttft_s"]["p50"], s["ttft_s"]["p99"], s["tpot_s"]["p50"])),
            f"{s['longest_gap_s']:.2f}",
            str(bursts[burst].get("preemptions", "?")),
            str(s["failed"] + s["unfinished"]),
            str(bursts[burst].get("other_answers", "?")),
        )
    return table


KINDS = ("TTFT, s", "longest gap, s", "KV, MiB")
SIGNS = {"drop": ("tab:red", "weights dropped"), "restore": ("tab:green", "weights back")}


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Write the picture of `figure_of`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = figure_of(results)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def figure_of(results: dict[str, dict[str, Any]]) -> Any:
    """Return a column per policy and a part per burst, of TTFT, stalls, and KV capacity and use over time."""
    from matplotlib import pyplot

    bursts = list(next(iter(results.values())))
    figure = pyplot.figure(figsize=(3 * len(results) + 1, 6.6 * len(bursts) + 0.8), layout="constrained")
    parts = figure.subfigures(len(bursts), squeeze=False)[:, 0]
    for burst, part in zip(bursts, parts, strict=True):
        part.suptitle(_words(burst), fontweight="bold", fontsize="medium")
        axes = part.subplots(len(KINDS), len(results), sharex=True, sharey="row", squeeze=False)
        for column, (name, by_burst) in enumerate(results.items()):
            for row, kind in enumerate(KINDS):
                _panel(axes[row][column], kind, by_burst[burst])
                axes[row][0].set_ylabel(kind)
            axes[0][column].set_title(name)
            axes[-1][column].set_xlabel("seconds since the burst began")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=2, fontsize="small")
    return figure


def _words(name: str) -> str:
    """Return what a burst is, in two lines."""
    burst = BURSTS[name]
    return (
        f"burst {name}: {burst.num_requests} requests, {burst.rate:g} a second,\n"
        f"{burst.num_prompt_tokens} tokens in, {burst.num_output_tokens} out"
    )


def _legend() -> list[Any]:
    """Return an entry for each sign that a panel may hold."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lines = [Line2D([], [], color=colour, linewidth=1, label=label) for colour, label in SIGNS.values()]
    return [
        Line2D([], [], marker=".", linestyle="", color="tab:blue", label="a request, at the time it was sent"),
        *lines,
        Patch(color="tab:red", alpha=0.2, label="KV follows its layers"),
        Line2D([], [], color="tab:blue", label="KV capacity"),
        Patch(color="tab:blue", alpha=0.4, label="KV used"),
    ]


def _panel(axes: Any, kind: str, result: dict[str, Any]) -> None:
    requests = [r for r in result["requests"] if r["ttft_s"] is not None]
    if kind.startswith("KV"):
        for server in result["metrics"]:
            pools = [values for key, values in server.items() if key.startswith("kunserve:kv_pool_bytes")]
            if pools:
                capacity = [sum(v or 0 for v in at) / 2**20 for at in zip(*pools, strict=True)]
                axes.plot(server["at_s"], capacity, color="tab:blue")
                used = [c * (u or 0) for c, u in zip(capacity, server["kv_usage"], strict=True)]
                axes.fill_between(server["at_s"], used, color="tab:blue", alpha=0.4)
    else:
        key = "ttft_s" if kind.startswith("TTFT") else "longest_gap_s"
        axes.scatter([r["sent_s"] for r in requests], [r[key] for r in requests], s=6, color="tab:blue")
    for transition in result.get("transitions", []):
        seconds = transition["seconds"]
        if "committed" not in seconds:
            continue  # it was rolled back, or gave way to a burst
        colour, _ = SIGNS[transition["kind"]]
        live_s = transition["at_s"] + seconds["committed"]
        axes.axvline(live_s, color=colour, linewidth=1)
        if (exchange_s := seconds.get("exchange", 0.0)) > 0:
            axes.axvspan(live_s, live_s + exchange_s, color=colour, alpha=0.2)
    axes.grid(alpha=0.3)


async def main() -> None:
    """Measure everything that was asked for."""
    args = parse_arguments()
    try:
        check_matplotlib()
    except ValueError as error:
        raise SystemExit(str(error)) from None
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    bursts = {name: BURSTS[name] for name in args.bursts.split(",")}
    results: dict[str, dict[str, Any]] = {}
    for policy in filter(None, args.policies.split(",")):
        console.print(f"measuring {policy}")
        results[policy] = await measure_policy(policy, bursts, args)
    if PLENTY in results:
        for by_burst in results.values():
            for name, result in by_burst.items():
                result["other_answers"] = count_others(result, results[PLENTY][name])
    for peer in args.peer:
        name, _, urls = peer.partition("=")
        console.print(f"measuring {name}")
        results[name] = {b: await measure(tuple(urls.split(",")), burst, args.seed) for b, burst in bursts.items()}
    for burst in bursts:
        console.print(table_of(burst, results))
    (args.out / "overload.json").write_text(json.dumps(results))
    draw(results, args.out / "overload.png")
    console.print(f"written: {args.out / 'overload.json'}, {args.out / 'overload.png'}")
    summaries = {
        name: {b: r["summary"] | {key: r.get(key) for key in ("preemptions", "other_answers")} for b, r in by.items()}
        for name, by in results.items()
    }
    print(json.dumps(summaries))


if __name__ == "__main__":
    asyncio.run(main())
