#!/usr/bin/env python3
"""A burst over two replicas behind Ray Serve; a third starts when `kunserve:demand_over_undropped` asks for it.

    make scale-out        # an environment of its own, with Ray; or, in one that has kunserve[ray]:
    PYTHONPATH=scripts/bench:scripts/check python scripts/scale_out.py [--policies drop,recompute]

Once for each policy: says when the burst began, when the gauge asked, when the new replica was ready and what it took,
and how long first tokens took before, until then and after. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from ray_replicas import APP, NAME, application, make_model

from kunserve.loadgen.client import Recording, Stream, Target, run
from kunserve.loadgen.report import time_to_first_token
from kunserve.loadgen.workload import Segment, Span, burst_arrivals, draw_lengths, make_jobs, stream_of
from kunserve.percentiles import percentiles
from kunserve.ray.scaling import TARGET

# Little to compute, and much to keep: eight layers of a chunk each, and 16 KiB of KV for a token.
SHAPE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 64}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 4}
LOOK_EVERY_S = 0.5
SOCKETS = Path(tempfile.gettempdir())  # where replicas make the folders of theirs
DEMAND, USAGE = "kunserve:demand_over_undropped", "vllm:kv_cache_usage_perc"
DROPS, PREEMPTIONS, FINISHED = "kunserve:drops_total", "vllm:num_preemptions_total", "vllm:request_success_total"


@dataclass(frozen=True, slots=True)
class Look:
    """What is seen at one moment."""

    at_s: float  # after the load began
    num_asked: int  # replicas that Serve runs or starts
    num_ready: int
    gauges: list[dict[str, float]]  # of each server that answers

    def total(self, name: str) -> float:
        """Return a gauge or counter of all servers, added up."""
        return sum(gauges.get(name, 0.0) for gauges in self.gauges)


@dataclass(slots=True)
class Watch:
    """Looks at Serve and at the replicas' own servers for as long as the load runs."""

    deployment: str
    started: float = field(default_factory=time.perf_counter)
    looks: list[Look] = field(default_factory=list)
    _sessions: dict[str, aiohttp.ClientSession] = field(default_factory=dict)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Look at the servers again and again while the block runs."""
        task = asyncio.create_task(self._look_on())
        try:
            yield
            await self._look()  # counters have their last values
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            for session in self._sessions.values():
                await session.close()

    async def _look_on(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self) -> None:
        from ray import serve

        at_s = time.perf_counter() - self.started
        status = await asyncio.to_thread(serve.status)
        states = status.applications[APP].deployments[self.deployment].replica_states
        num_ready = states.get("RUNNING", 0)
        gauges = [await self._gauges(str(path)) for path in sorted(SOCKETS.glob("kunserve-*/http"))]
        self.looks.append(Look(at_s, num_ready + states.get("STARTING", 0), num_ready, [g for g in gauges if g]))

    async def _gauges(self, socket: str) -> dict[str, float]:
        """Return what a server's /metrics say, samples of one name added up; nothing while it starts."""
        if socket not in self._sessions:
            self._sessions[socket] = aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket))
        session, found = self._sessions[socket], dict[str, float]()
        try:
            async with session.get("http://kunserve/metrics", timeout=aiohttp.ClientTimeout(total=5)) as response:
                if response.status != 200:
                    return {}
                for line in (await response.text()).splitlines():
                    name = line.partition("{")[0].partition(" ")[0]
                    if name in (DEMAND, USAGE, DROPS, PREEMPTIONS, FINISHED):
                        found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
        except (aiohttp.ClientError, OSError):
            return {}
        return found


async def burst(args: argparse.Namespace, url: str, watch: Watch) -> Recording:
    """Send the load; returns what became of it."""
    segments = (Segment(args.before, args.rate), Segment(args.burst, args.burst_rate), Segment(args.after, args.rate))
    times = burst_arrivals(segments, None, stream_of(args.seed, 0))
    lengths = draw_lengths(Span.parse(args.prompt), Span.parse(args.output), len(times), stream_of(args.seed, 1))
    recording = Recording.of(make_jobs(times, lengths, (None, None), 0.0, stream_of(args.seed, 2)), (url,))
    watch.started = time.perf_counter()
    async with watch.watching():
        await run(recording, Target((url,), NAME, vocabulary=Span(1, 255), seed=args.seed))
    return recording


def first(looks: Sequence[Look], num: int, of: str) -> float | None:
    """Return the second of the first look at which there were more than `num` replicas; None if there never were."""
    return next((look.at_s for look in looks if getattr(look, of) > num), None)


def row(streams: Sequence[Stream], slo_s: float) -> dict[str, Any]:
    """Return what became of some streams."""
    ttfts = [time_to_first_token(stream) for stream in streams]
    known = [ttft for ttft in ttfts if ttft is not None]
    shares = percentiles(known)
    within = sum(ttft <= slo_s for ttft in known) / len(streams) if streams else None
    not_done = sum(stream.status != "completed" for stream in streams)
    p50, p99 = (None if (share := shares[p]) is None else round(share, 3) for p in ("p50", "p99"))
    return {"requests": len(streams), "ttft_p50_s": p50, "ttft_p99_s": p99, "attainment": within, "not_done": not_done}


def report(args: argparse.Namespace, recording: Recording, watch: Watch) -> dict[str, Any]:
    """Return what happened."""
    looks, end_s = watch.looks, recording.elapsed_s
    over = next((x.at_s for x in looks if x.at_s > args.before and x.total(DEMAND) > args.replicas * TARGET), None)
    asked, ready = first(looks, args.replicas, "num_asked"), first(looks, args.replicas, "num_ready")
    until = args.before + args.burst
    sides = {
        "before the burst": (0.0, args.before),
        "burst, until it asked": (args.before, min(asked or until, until)),
        "burst, until it was ready": (min(asked or until, until), min(ready or until, until)),
        "burst, with the new replica": (min(ready or until, until), until),
        "after the burst": (until, end_s),
    }
    rows = {
        name: row([s for s in recording.streams if s.sent_s is not None and start <= s.sent_s < stop], args.slo)
        for name, (start, stop) in sides.items()
    }
    in_burst = [look for look in looks if args.before <= look.at_s < until]
    return {
        "burst_s": args.before,
        "gauge_over_target_s": over,
        "asked_s": asked,
        "ready_s": ready,
        "most_replicas": max(look.num_ready for look in looks),
        "peak_demand": round(max(look.total(DEMAND) for look in looks), 2),
        "peak_usage": round(max((look.total(USAGE) for look in in_burst), default=0.0), 2),
        "drops": looks[-1].total(DROPS),
        "preemptions": looks[-1].total(PREEMPTIONS),
        "answered_by_each": [gauges.get(FINISHED, 0.0) for gauges in looks[-1].gauges],
        "seconds": round(end_s, 1),
        "all": row(recording.streams, args.slo),
        "rows": rows,
    }


def lines(policy: str, told: Mapping[str, Any], slo_s: float) -> list[str]:
    """Return the report for people."""

    def at(name: str) -> str:
        return "never" if told[name] is None else f"at {told[name]:.1f} s"

    head = (
        f"{policy}: burst at {told['burst_s']:.1f} s; the gauge was over its target {at('gauge_over_target_s')}, "
        f"another replica was asked for {at('asked_s')} and ready {at('ready_s')}; {told['drops']:.0f} drops, "
        f"{told['preemptions']:.0f} preemptions; demand at most {told['peak_demand']}; "
        f"answered by each: {told['answered_by_each']}"
    )
    table = [f"| {policy} | requests | TTFT p50, s | p99, s | within {slo_s:g} s |", "| --- | --- | --- | --- | --- |"]
    for name, values in {**told["rows"], "all": told["all"]}.items():
        share = "-" if values["attainment"] is None else f"{100 * values['attainment']:.1f} %"
        table.append(f"| {name} | {values['requests']} | {values['ttft_p50_s']} | {values['ttft_p99_s']} | {share} |")
    return [head, *table]


def measure(args: argparse.Namespace, policy: str, model: str) -> dict[str, Any]:
    """Run the burst with one policy."""
    flags = (
        f"--devices {args.devices} --load-format dummy --num-gpu-blocks-override {args.blocks} --disable-access-log "
        f"--served-model-name {NAME} --no-enable-prefix-caching --overload-policy {policy}"
    )
    scaling = {"replicas": args.replicas, "max_replicas": args.replicas + 1, "upscale_delay_s": args.upscale_delay}
    with application(args.replicas + 3, model=model, flags=flags, **scaling) as url:
        watch = Watch(f"{NAME}-0")
        return report(args, asyncio.run(burst(args, url, watch)), watch)


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", type=lambda text: text.split(","), default=["drop", "recompute"])
    parser.add_argument("--replicas", type=int, default=2, help="before the burst; one more may start")
    parser.add_argument("--devices", default="cpu:2", help="of a replica: one device alone cannot drop")
    parser.add_argument("--blocks", type=int, default=24, help="of 16 tokens, on each device")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second outside the burst")
    parser.add_argument("--burst-rate", type=float, default=2.0)
    parser.add_argument("--before", type=float, default=8.0, help="seconds before the burst")
    parser.add_argument(
        "--burst", type=float, default=90.0, help="seconds that it lasts: longer than a replica takes to start"
    )
    parser.add_argument("--after", type=float, default=8.0)
    parser.add_argument("--prompt", default="16:64", help="tokens, low:high")
    parser.add_argument("--output", default="128:320", help="tokens, low:high")
    parser.add_argument("--upscale-delay", type=float, default=5.0, help="seconds that demand must last")
    parser.add_argument("--slo", type=float, default=1.0, help="seconds to the first token that are asked for")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    told = {}
    with tempfile.TemporaryDirectory() as name:
        model = make_model(Path(name) / NAME, **SHAPE)
        for policy in args.policies:
            told[policy] = measure(args, policy, model)
            print("\n".join(lines(policy, told[policy], args.slo)), flush=True)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
