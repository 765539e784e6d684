"""Sample what the servers' /metrics say while the load runs, under common names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

POLL_INTERVAL_S = 0.5
OWN_PREFIX = "kunserve:"  # kept as they are, labels included
COMMON_NAMES = {
    "vllm:num_requests_running": "running",
    "sglang:num_running_reqs": "running",
    "llamacpp:requests_processing": "running",
    "vllm:num_requests_waiting": "waiting",
    "sglang:num_queue_reqs": "waiting",
    "llamacpp:requests_deferred": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:gpu_cache_usage_perc": "kv_usage",
    "sglang:token_usage": "kv_usage",
    "llamacpp:kv_cache_usage_ratio": "kv_usage",
    "vllm:num_preemptions_total": "preemptions",
}


@dataclass(slots=True)
class MetricSeries:
    """One server's samples over time. A name that was missing at some poll has None there."""

    url: str
    at_s: list[float] = field(default_factory=list)  # after the start of the run
    values: dict[str, list[float | None]] = field(default_factory=dict)

    def append(self, at_s: float, sample: dict[str, float]) -> None:
        """Add the sample taken at `at_s` to the series; a name that one of them lacks gets None in its place."""
        for name in sample.keys() - self.values.keys():
            self.values[name] = [None] * len(self.at_s)
        self.at_s.append(at_s)
        for name, series in self.values.items():
            series.append(sample.get(name))


def parse_metrics(text: str) -> dict[str, float]:
    """Return the samples of a Prometheus page that tell of load: by common name or, our own, with labels.

    Several samples of one common name (one per engine) are added up; shares (kv_usage) are averaged.
    A value that is not a number raises ValueError.
    """
    found: dict[str, list[float]] = {}
    for line in text.splitlines():
        end = line.rfind("}") + 1 or line.find(" ")
        name = line[:end] if line.startswith(OWN_PREFIX) else COMMON_NAMES.get(line[:end].partition("{")[0])
        if name and not name.partition("{")[0].endswith(("_bucket", "_created")):
            found.setdefault(name, []).append(float(line[end:].split()[0]))
    return {name: sum(values) / (len(values) if name == "kv_usage" else 1) for name, values in sorted(found.items())}


async def poll(session: aiohttp.ClientSession, series: MetricSeries, clock: Callable[[], float]) -> None:
    """Sample /metrics until cancelled; a server that answers without having any is left alone."""
    timeout = aiohttp.ClientTimeout(total=5)
    while True:
        started_s = clock()
        try:
            async with session.get(f"{series.url}/metrics", timeout=timeout) as response:
                if response.status == 200:
                    series.append(started_s, parse_metrics(await response.text()))
                elif not series.at_s:
                    return
        except (aiohttp.ClientError, OSError, ValueError, IndexError):
            pass  # busy, stopping, or not a Prometheus page: this sample is missing, the run goes on
        await asyncio.sleep(max(0.0, started_s + POLL_INTERVAL_S - clock()))
