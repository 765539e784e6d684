"""Gauges of `/metrics`: what the engine is doing at the moment of a scrape, from one snapshot of plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

DEVICE_STATES = ("ok", "suspect", "lost", "removed")


@dataclass(frozen=True, slots=True)
class DeviceStats:
    """The bytes of one device by what they are used for, and whether it does its work."""

    name: str
    weight_bytes: int
    kv_bytes: int
    free_bytes: int
    state: str = "ok"  # one of DEVICE_STATES


@dataclass(frozen=True, slots=True)
class GroupStats:
    """One group; a chain has more than one stage."""

    group_id: int
    num_stages: int
    bubble_share: float = 0.0  # since the group was formed


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine is doing now; blocks are those mapped at present, over all groups."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_used_blocks: int
    block_size: int
    devices: tuple[DeviceStats, ...] = ()
    groups: tuple[GroupStats, ...] = ()
    weights_dropped_bytes: int = 0
    num_idle_blocks: int = 0  # that nobody uses, and that keep the prefix cache
    demand_over_undropped: float = 0.0


Sample = tuple[Mapping[str, str], float]  # the labels that it has beside those of all, and its value


class Gauge(NamedTuple):
    """One gauge: its name, what its value says, and its samples of a snapshot."""

    name: str
    text: str
    samples: Callable[[EngineStats], list[Sample]]


def _one(value: Callable[[EngineStats], float]) -> Callable[[EngineStats], list[Sample]]:
    """Return what makes the only sample of a gauge without labels of its own."""
    return lambda stats: [({}, value(stats))]


def _usage(stats: EngineStats) -> float:
    return stats.num_used_blocks / max(1, stats.num_blocks)


def _idle(stats: EngineStats) -> float:
    return stats.num_idle_blocks / max(1, stats.num_blocks)


def _cache_size(stats: EngineStats) -> list[Sample]:
    return [({"block_size": str(stats.block_size), "num_gpu_blocks": str(stats.num_blocks)}, 1.0)]


def _memory(stats: EngineStats) -> list[Sample]:
    return [
        ({"device": device.name, "owner": owner}, num_bytes)
        for device in stats.devices
        for owner, num_bytes in (
            ("weights", device.weight_bytes),
            ("kv", device.kv_bytes),
            ("free", device.free_bytes),
        )
    ]


def _states(stats: EngineStats) -> list[Sample]:
    states = [device.state for device in stats.devices]
    return [({"state": state}, states.count(state)) for state in DEVICE_STATES]


GAUGES = (
    Gauge(
        "vllm:num_requests_running",
        "Requests that are being computed now.",
        _one(lambda stats: stats.num_running),
    ),
    Gauge(
        "vllm:num_requests_waiting",
        "Requests that wait to be admitted now.",
        _one(lambda stats: stats.num_waiting),
    ),
    Gauge(
        "vllm:kv_cache_usage_perc",
        "Fraction (0..1) of the KV blocks mapped now that requests use.",
        _one(_usage),
    ),
    Gauge("vllm:gpu_cache_usage_perc", "Old name of vllm:kv_cache_usage_perc.", _one(_usage)),
    Gauge(
        "vllm:cache_config_info",
        "Size of the KV cache as mapped now, in its labels; the value is always 1.",
        _cache_size,
    ),
    Gauge(
        "kunserve:kv_cache_idle_perc",
        "Fraction (0..1) of the KV blocks mapped now that nobody uses and that keep the prefix cache.",
        _one(_idle),
    ),
    Gauge(
        "kunserve:demand_over_undropped",
        "KV blocks that all requests, waiting ones too, are expected to need, divided by those that there are without "
        "any drop. Above 1 the server lives on dropped weights or lets requests wait.",
        _one(lambda stats: stats.demand_over_undropped),
    ),
    Gauge("kunserve:device_memory_bytes", "Bytes of a device, by owner: weights, kv or free.", _memory),
    Gauge(
        "kunserve:devices",
        "Number of devices, by state. A suspect one gets no new requests while others can take them.",
        _states,
    ),
    Gauge(
        "kunserve:kv_pool_bytes",
        "Bytes of a device that are mapped for KV now.",
        lambda stats: [({"device": device.name}, device.kv_bytes) for device in stats.devices],
    ),
    Gauge(
        "kunserve:group_stages",
        "Number of devices in the chain of a group.",
        lambda stats: [({"group": str(group.group_id)}, group.num_stages) for group in stats.groups],
    ),
    Gauge(
        "kunserve:bubble_share",
        "Share (0..1) of a group's busy time in which its stages waited for each other, since the group was formed.",
        lambda stats: [({"group": str(group.group_id)}, group.bubble_share) for group in stats.groups],
    ),
    Gauge(
        "kunserve:weights_dropped_bytes",
        "Bytes of weights that are dropped now, so that KV has their memory.",
        _one(lambda stats: stats.weights_dropped_bytes),
    ),
)


class Gauges(Collector):
    """Makes all gauges from `EngineStats` at the moment of the scrape; `labels` are those of every series."""

    def __init__(
        self, labels: dict[str, str], stats: Callable[[], EngineStats], prefix_hit_rate: Callable[[], float]
    ) -> None:
        self._labels = labels
        self._stats, self._prefix_hit_rate = stats, prefix_hit_rate

    def describe(self) -> list[Metric]:
        """Return nothing: names are not known before a scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield all gauges, from one snapshot."""
        stats = self._stats()
        for name, text, samples in GAUGES:
            yield self._family(name, text, samples(stats))
        # Its counts are those of the counters, so that it never contradicts them.
        text = "Old name: share of prompt tokens found in the prefix cache since the start."
        yield self._family("vllm:gpu_prefix_cache_hit_rate", text, [({}, self._prefix_hit_rate())])

    def _family(self, name: str, text: str, samples: list[Sample]) -> Metric:
        family = GaugeMetricFamily(name, text)
        for labels, value in samples:
            family.add_sample(name, self._labels | dict(labels), float(value))
        return family
