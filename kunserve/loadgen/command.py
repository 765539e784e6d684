"""Put load on any OpenAI-compatible server and measure latency, throughput and stalls of streams.

Requests, output tokens per second, time to first token (TTFT) and per output token, the longest gap inside any
stream, failures. The last line of stdout is one JSON object; everything for people goes to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import signal
import sys
from collections.abc import Sequence

import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from kunserve.command.command_line import check_matplotlib
from kunserve.loadgen import report
from kunserve.loadgen.arguments import build_parser
from kunserve.loadgen.client import Recording, Stream, Target, first_model, run
from kunserve.loadgen.plot import plot
from kunserve.loadgen.record import recording as recording_feed
from kunserve.loadgen.workload import (
    Job,
    Segment,
    burst_arrivals,
    draw_lengths,
    fixed_arrivals,
    in_turns,
    make_jobs,
    poisson_arrivals,
    stream_of,
)
from kunserve.sim.traces import pick_rows, read_rows, sample_lengths


def make_workload(args: argparse.Namespace) -> list[Job]:
    """Return the jobs that the arguments ask for; raise ValueError if these contradict or a file is malformed."""
    seed = abs(args.seed)
    asked = "trace" if args.trace else "burst" if args.burst else "poisson" if args.rate else "all"
    arrival = args.arrival or asked
    for kind, given, flag in (
        ("trace", args.trace, "--trace"),
        ("burst", args.burst, "--burst"),
        ("fixed", args.rate, "--rate"),
        ("poisson", args.rate, "--rate"),
    ):
        if arrival == kind and not given:
            raise ValueError(f"--arrival {kind} needs {flag}")
    times: list[float]
    hash_ids: list[tuple[int, ...]] = []
    if arrival == "trace":
        rows = read_rows(args.trace, needs_times=True)
        rows = pick_rows(rows, args.trace_window, args.limit or args.num_requests, stream_of(seed, 0))
        times, lengths = [r.at_s for r in rows], [(r.num_prompt_tokens, r.num_output_tokens) for r in rows]
        hash_ids = [row.hash_ids for row in rows]
    else:
        times = _arrivals(arrival, args.rate, args.burst, args.num_requests, seed)
        if args.lengths_csv:
            lengths = sample_lengths(read_rows(args.lengths_csv, needs_times=False), len(times), stream_of(seed, 1))
        else:
            lengths = draw_lengths(args.input_len, args.output_len, len(times), stream_of(seed, 1))
    times = [at_s * args.time_scale for at_s in times]
    most = args.max_input, args.max_output
    jobs = make_jobs(times, lengths, most, args.cancel_fraction, stream_of(seed, 2), hash_ids)
    if args.turns == 1 and args.system_len is None:
        return jobs
    if args.prompt_mode != "chat":
        raise ValueError("--turns and --system-len need --prompt-mode chat")
    return in_turns(jobs, args.turns, args.system_len or 0, args.num_systems)


def _arrivals(
    arrival: str, rate: float, segments: tuple[Segment, ...], num_requests: int | None, seed: int
) -> list[float]:
    count = num_requests or 100
    if arrival == "fixed":
        return fixed_arrivals(rate, count)
    if arrival == "poisson":
        return poisson_arrivals(rate, count, stream_of(seed, 0))
    if arrival == "burst":
        return burst_arrivals(segments, num_requests, stream_of(seed, 0))
    return [0.0] * count


async def measure(args: argparse.Namespace, jobs: list[Job]) -> tuple[Recording, bool]:
    """Send the jobs; return what was seen, and whether a signal stopped the run early."""
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    target = Target(
        urls=args.url,
        model=args.model or await first_model(args.url[0], headers),
        prompt_mode=args.prompt_mode,
        vocabulary=args.vocab,
        seed=abs(args.seed),
        timeout_s=args.timeout,
        concurrency=args.concurrency,
        headers=headers,
        extra_body=args.extra_body,
    )
    recording = Recording.of(jobs, target.urls)
    feed = recording_feed(target.urls[0], headers, args.record) if args.record else contextlib.nullcontext()
    async with feed:
        sending = asyncio.create_task(run(recording, target))
        progress = asyncio.create_task(show_progress(recording.streams, args.quiet))
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signal_number, sending.cancel)
        try:
            await asyncio.wait([sending])
        finally:
            progress.cancel()
            await asyncio.wait([progress])
        if args.record and not sending.cancelled():
            await asyncio.sleep(args.record_after)  # the way back is part of the story
    if not sending.cancelled():
        sending.result()
    return recording, sending.cancelled()


async def show_progress(streams: list[Stream], is_quiet: bool) -> None:
    """Show a bar on a terminal, else a line every five seconds, until cancelled."""
    console = Console(stderr=True)
    if is_quiet:
        return
    if not console.is_terminal:
        started_s = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(5)
            print(f"{asyncio.get_running_loop().time() - started_s:6.0f} s  {_state(streams)}", file=sys.stderr)
    columns = (BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=len(streams))
        while True:  # half a second is often enough, and drawing costs the server time
            finished = sum(stream.ended_s is not None for stream in streams)
            bar.update(task, completed=finished, description=_state(streams), refresh=True)
            await asyncio.sleep(0.5)


def _state(streams: list[Stream]) -> str:
    count = dict.fromkeys(("pending", "running", "completed", "cancelled", "failed", "interrupted"), 0)
    for stream in streams:
        count[stream.status] += 1
    shown = ", ".join(f"{value} {name}" for name, value in count.items() if value or name in ("running", "failed"))
    return f"{sum(len(stream.token_s) for stream in streams)} chunks; {shown}"


def main(arguments: Sequence[str] | None = None, prog: str = "kunserve loadgen") -> int:
    """Run the command; return its status: 0, 1 if no request completed, 130 if interrupted.

    Wrong arguments end in one line, which begins with `prog`, and SystemExit with status 2.
    """
    parser = build_parser(prog, (__doc__ or "").strip())
    args = parser.parse_args(arguments)
    args.url = args.server or args.url
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # one socket per stream
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    try:
        if args.plot:
            check_matplotlib()
        for path in filter(None, (args.json, args.plot, args.record)):  # before the run, not after it
            if not path.parent.is_dir():
                raise ValueError(f"cannot write {path}: no such directory")
        jobs = make_workload(args)
        if not jobs:
            raise ValueError("nothing to send: the segments ended before the first arrival")
        recording, is_interrupted = uvloop.run(measure(args, jobs))
    except ValueError as error:
        parser.exit(2, f"{prog}: {error}\n")
    summary = report.summarize(recording)
    details = report.details(recording)
    print(*report.lines(summary), sep="\n", file=sys.stderr)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key not in ("api_key", "server")}
        document = {"summary": summary, "args": settings, **details}
        args.json.write_text(json.dumps(document, default=str) + "\n")
    if args.plot:
        plot(details["requests"], details["metrics"], args.plot)
    print(json.dumps(summary), flush=True)
    return 130 if is_interrupted else 0 if summary["completed"] or summary["cancelled"] else 1
