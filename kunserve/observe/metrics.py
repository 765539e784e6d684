"""Counters the engine feeds as it serves, in the names dashboards and routers know; `/metrics` renders them.

Routers read one sample per gauge, so the gauges that route traffic are aggregated over all devices
(`engine="0"`); what differs from device to device stands under our own prefix. Routers scrape as often as every
50 ms: gauges are then made from plain numbers, without waiting for a step, and the many other series (4 ms of
formatting) may be `COUNTERS_AGE_S` old.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kunserve.grammar.limits import DEATH_REASONS
from kunserve.observe.recent import Recent
from kunserve.sampling import FinishReason, SamplingParams

TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
LAG_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)
TRANSITION_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STEP_BUCKETS_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
N_BUCKETS = (1, 2, 5, 10, 20)
PREEMPTION_BUCKETS = (0, 1, 2, 5, 10, 20)
REJECTIONS = (
    "queue_full",
    "queue_tokens_full",
    "key_share",
    "body_memory",
    "body_share",
)  # what `Metrics.rejection` is told
DEVICE_STATES = ("ok", "suspect", "lost", "removed")
TRANSITION_KINDS = ("drop", "restore", "lose", "remove", "add")
COUNTERS_AGE_S = 0.15


@dataclass(frozen=True, slots=True)
class DeviceStats:
    """Who owns the bytes of one device, and whether it does its work."""

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


class Counted(Protocol):
    """What metrics read of a request; times are on the engine's clock."""

    params: SamplingParams
    arrival_s: float
    admitted_s: float | None
    first_token_s: float | None
    finish_reason: FinishReason | None
    num_preemptions: int

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens the client sent."""

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""


def _token_buckets(max_tokens: int) -> list[int]:
    """1, 2, 5, 10, 20, ... up to `max_tokens`."""
    scales = (10**exponent for exponent in range(len(str(max_tokens))))
    return [m * scale for scale in scales for m in (1, 2, 5) if m * scale <= max_tokens]


class _Gauges(Collector):
    """Gauges made from `EngineStats` at the moment of the scrape."""

    def __init__(
        self, labels: dict[str, str], stats: Callable[[], EngineStats], prefix_hit_rate: Callable[[], float]
    ) -> None:
        self._labels = labels
        self._stats, self._prefix_hit_rate = stats, prefix_hit_rate

    def _gauge(self, name: str, text: str, samples: list[tuple[dict[str, str], float]]) -> Metric:
        family = GaugeMetricFamily(name, text)
        for labels, value in samples:
            family.add_sample(name, self._labels | labels, value)
        return family

    def describe(self) -> list[Metric]:
        """Nothing to describe ahead of a scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All gauges, from one snapshot."""
        stats = self._stats()
        usage, idle = (number / max(1, stats.num_blocks) for number in (stats.num_used_blocks, stats.num_idle_blocks))
        cache = {"block_size": str(stats.block_size), "num_gpu_blocks": str(stats.num_blocks)}
        single: list[tuple[str, str, dict[str, str], float]] = [
            ("vllm:num_requests_running", "Requests being computed.", {}, stats.num_running),
            ("vllm:num_requests_waiting", "Requests waiting to be admitted.", {}, stats.num_waiting),
            ("vllm:kv_cache_usage_perc", "Used fraction (0..1) of the KV blocks mapped now.", {}, usage),
            ("vllm:gpu_cache_usage_perc", "Old name of kv_cache_usage_perc.", {}, usage),
            ("kunserve:kv_cache_idle_perc", "Fraction (0..1) of them that nobody uses: the prefix cache.", {}, idle),
            (
                "kunserve:demand_over_undropped",
                "Blocks that all requests, waiting ones too, are expected to need, over those that there are without "
                "any drop: above 1 the server lives on dropped weights or lets requests wait.",
                {},
                stats.demand_over_undropped,
            ),
            (
                "vllm:gpu_prefix_cache_hit_rate",
                "Old name; hits by queries so far.",
                {},
                self._prefix_hit_rate(),
            ),
            ("vllm:cache_config_info", "Size of the KV cache as mapped now.", cache, 1.0),
        ]
        for name, text, labels, value in single:
            yield self._gauge(name, text, [(labels, value)])
        owners = [
            ({"device": device.name, "owner": owner}, float(num_bytes))
            for device in stats.devices
            for owner, num_bytes in (
                ("weights", device.weight_bytes),
                ("kv", device.kv_bytes),
                ("free", device.free_bytes),
            )
        ]
        yield self._gauge("kunserve:device_memory_bytes", "Bytes of a device by owner.", owners)
        states = [device.state for device in stats.devices]
        text = "Devices by state; a suspect one gets no new requests while others can take them."
        counts = [({"state": state}, float(states.count(state))) for state in DEVICE_STATES]
        yield self._gauge("kunserve:devices", text, counts)
        pools = [({"device": device.name}, float(device.kv_bytes)) for device in stats.devices]
        yield self._gauge("kunserve:kv_pool_bytes", "Bytes of a device mapped for KV now.", pools)
        stages = [({"group": str(group.group_id)}, float(group.num_stages)) for group in stats.groups]
        yield self._gauge("kunserve:group_stages", "Devices in the chain of a group.", stages)
        bubbles = [({"group": str(group.group_id)}, group.bubble_share) for group in stats.groups]
        text = "Share of its busy time in which a stage of a chain waits for another, since the group was formed."
        yield self._gauge("kunserve:bubble_share", text, bubbles)
        nothing: dict[str, str] = {}
        dropped = [(nothing, float(stats.weights_dropped_bytes))]
        yield self._gauge("kunserve:weights_dropped_bytes", "Bytes of weights that gave way to KV.", dropped)


class Metrics:
    """All series of one server, in a registry of its own. Feeding costs microseconds and never fails."""

    def __init__(
        self,
        model_name: str,
        max_model_len: int,
        stats: Callable[[], EngineStats],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._labels = {"model_name": model_name, "engine": "0"}
        self._registry = CollectorRegistry()
        self._gauges = CollectorRegistry()
        self._gauges.register(_Gauges(self._labels, stats, lambda: self.prefix_hit_rate))
        self._now = now
        self._counters_text = b""
        self._counters_text_s = -inf
        self.num_prompt_tokens = self.num_generation_tokens = 0  # since start
        self._num_looked_for_tokens = self._num_cached_tokens = 0  # in the prefix cache
        self._make_counters()
        self._make_histograms(_token_buckets(max_model_len))
        self.recent = Recent()
        self._worst_lag_s = 0.0

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, list(self._labels), registry=self._registry).labels(**self._labels)

    def _counter_by(self, label: str, name: str, text: str, values: Iterable[str]) -> dict[str, Counter]:
        family = Counter(name, text, [*self._labels, label], registry=self._registry)
        return {value: family.labels(**self._labels, **{label: value}) for value in values}

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(name, text, list(self._labels), registry=self._registry, buckets=buckets)
        return family.labels(**self._labels)

    def _make_counters(self) -> None:
        self._preemptions = self._counter("vllm:num_preemptions", "Requests whose KV was given up to others.")
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens computed, each once.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._prefix_cache = [
            (
                self._counter(prefix + "prefix_cache_queries", "Prompt tokens looked for in the prefix cache."),
                self._counter(prefix + "prefix_cache_hits", "Of those, tokens whose KV was there."),
            )
            for prefix in ("vllm:", "vllm:gpu_")  # the second: old names, which routers read
        ]
        text = "Requests that ended, by reason."
        self._finished = self._counter_by("finished_reason", "vllm:request_success", text, FinishReason)
        text = "Requests turned away, by reason."
        family = Counter("vllm:admission_rejections", text, [*self._labels, "reason"], registry=self._registry)
        self._rejections = family
        for reason in REJECTIONS:
            family.labels(**self._labels, reason=reason)  # from the start
        text = "Processes of structures (schemas, grammars) that ended before their time, by reason."
        family = Counter("kunserve:structure_process_deaths", text, [*self._labels, "reason"], registry=self._registry)
        self._structure_process_deaths = family
        for reason in DEATH_REASONS:
            family.labels(**self._labels, reason=reason)
        self._transitions = {
            "drop": self._counter("kunserve:drops", "Transitions that dropped weights."),
            "restore": self._counter("kunserve:restores", "Transitions that brought weights back."),
        }
        text = "Transitions that failed and were undone, by kind."
        self._rolled_back = self._counter_by("kind", "kunserve:rolled_back_transitions", text, TRANSITION_KINDS)
        self._devices_lost = self._counter("kunserve:devices_lost", "Devices that were declared dead.")
        self._exchange_bytes = self._counter("kunserve:exchange_bytes", "KV that followed its layers.")
        text = "Requests whose KV did not follow its layers, and is computed again."
        self._exchange_lost_requests = self._counter("kunserve:exchange_lost_requests", text)
        text = "Requests that started over because a step with them failed."
        self._retried_requests = self._counter("kunserve:retried_requests", text)

    def _make_histograms(self, tokens: Sequence[float]) -> None:
        def seconds(name: str, text: str, buckets: Sequence[float] = REQUEST_BUCKETS_S) -> Histogram:
            return self._histogram(f"vllm:{name}_seconds", text, buckets)

        self._ttft = seconds("time_to_first_token", "Arrival to first token.", TTFT_BUCKETS_S)
        self._inter_token = seconds("inter_token_latency", "One token to the next.", ITL_BUCKETS_S)
        self._per_token = seconds("request_time_per_output_token", "Mean after the first.", ITL_BUCKETS_S)
        self._e2e = seconds("e2e_request_latency", "Arrival to end.")
        self._queue = seconds("request_queue_time", "Arrival to first admission.")
        self._prefill = seconds("request_prefill_time", "Admission to first token.")
        self._decode = seconds("request_decode_time", "First token to end.")
        self._inference = seconds("request_inference_time", "Admission to end.")
        histogram = self._histogram
        self._request_prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", tokens)
        self._request_output = histogram("vllm:request_generation_tokens", "Its generated tokens.", tokens)
        self._request_max = histogram("vllm:request_params_max_tokens", "Its max_tokens.", tokens)
        self._request_n = histogram("vllm:request_params_n", "Its n.", N_BUCKETS)
        self._request_preemptions = histogram("vllm:request_num_preemptions", "Its preemptions.", PREEMPTION_BUCKETS)
        self._step_tokens = histogram("vllm:iteration_tokens_total", "Tokens of a step.", STEP_BUCKETS_TOKENS)
        text = "Time of a transition, by step."
        names = [*self._labels, "step"]
        buckets = TRANSITION_BUCKETS_S
        self._steps = Histogram("kunserve:transition_seconds", text, names, registry=self._registry, buckets=buckets)
        self._loop_lag = histogram("kunserve:event_loop_lag_seconds", "How late the event loop woke.", LAG_BUCKETS_S)
        names = list(self._labels)
        lag_max = Gauge("kunserve:event_loop_lag_max_seconds", "Since start.", names, registry=self._registry)
        self._loop_lag_max = lag_max.labels(**self._labels)
        body_bytes = Gauge("kunserve:body_bytes", "Of bodies that are no requests yet.", names, registry=self._registry)
        self._body_bytes = body_bytes.labels(**self._labels)

    @property
    def prefix_hit_rate(self) -> float:
        """Return the share of prompt tokens whose KV was in the prefix cache, since the start."""
        return self._num_cached_tokens / max(1, self._num_looked_for_tokens)

    def prefix_cache(self, num_tokens: int, num_cached_tokens: int) -> None:
        """Count a prompt that was looked for in the prefix cache, and how much of it was there."""
        self._num_looked_for_tokens += num_tokens
        self._num_cached_tokens += num_cached_tokens
        self.recent.prompt(num_tokens, num_cached_tokens)
        for queries, hits in self._prefix_cache:
            queries.inc(num_tokens)
            hits.inc(num_cached_tokens)

    def first_token(self, request: Counted, now_s: float) -> None:
        """Count the first token of a request, at `now_s` on the engine's clock."""
        self._ttft.observe(now_s - request.arrival_s)
        self.recent.first_token(now_s, now_s - request.arrival_s)

    def inter_token(self, seconds: float) -> None:
        """Count the time from one token of a request to its next."""
        self._inter_token.observe(seconds)
        self.recent.gap_s = max(self.recent.gap_s, seconds)

    def step(self, num_tokens: int) -> None:
        """Count one step that computed `num_tokens` (prompt and decode)."""
        self._step_tokens.observe(num_tokens)

    def prompt_tokens(self, num_tokens: int) -> None:
        """Add prompt tokens that were computed for the first time; after a preemption they do not count again."""
        self._prompt_tokens.inc(num_tokens)
        self.num_prompt_tokens += num_tokens

    def generation_tokens(self, num_tokens: int) -> None:
        """Add tokens generated."""
        self._generation_tokens.inc(num_tokens)
        self.num_generation_tokens += num_tokens

    def preemption(self) -> None:
        """Count one request that lost its KV to others."""
        self._preemptions.inc()

    def rejection(self, reason: str) -> None:
        """Count one request turned away; `reason` is one of a few constant words."""
        self._rejections.labels(**self._labels, reason=reason).inc()

    def body_bytes(self, num_bytes: int) -> None:
        """Show how many bytes of bodies are held that are no requests yet (fed by HTTP)."""
        self._body_bytes.set(num_bytes)

    def structure_process_died(self, reason: str) -> None:
        """Count a structure's process that ended before its time; `reason` is one of DEATH_REASONS."""
        self._structure_process_deaths.labels(**self._labels, reason=reason).inc()

    def loop_lag(self, seconds: float) -> None:
        """Count how late a timer of the event loop fired."""
        self._loop_lag.observe(seconds)
        if seconds > self._worst_lag_s:
            self._worst_lag_s = seconds
            self._loop_lag_max.set(seconds)

    def transition(self, kind: str, seconds: Mapping[str, float], exchange_bytes: int) -> None:
        """Count a transition that was committed, and the seconds of its steps; `kind` is one of TRANSITION_KINDS."""
        if kind in self._transitions:
            self._transitions[kind].inc()
        self._exchange_bytes.inc(exchange_bytes)
        for step, value in seconds.items():
            self._steps.labels(**self._labels, step=step).observe(value)

    def rolled_back(self, kind: str) -> None:
        """Count a transition that failed and was undone; `kind` is one of TRANSITION_KINDS."""
        self._rolled_back[kind].inc()

    def device_lost(self) -> None:
        """Count one device that was declared dead."""
        self._devices_lost.inc()

    def exchange_lost_request(self) -> None:
        """Count one request whose KV should have followed its layers, but did not arrive."""
        self._exchange_lost_requests.inc()

    def retried_request(self) -> None:
        """Count one request that starts over because a step with it failed."""
        self._retried_requests.inc()

    def choices_asked(self, n: int) -> None:
        """Count the `n` of one prompt (fed by HTTP: the engine sees n requests)."""
        self._request_n.observe(n)

    def request_finished(self, request: Counted, now_s: float) -> None:
        """Count a request that ended at `now_s`, in whatever state it was (waiting, prefill, decode)."""
        reason = request.finish_reason or FinishReason.ERROR
        self._finished[reason].inc()
        self._e2e.observe(now_s - request.arrival_s)
        self._request_prompt.observe(request.num_prompt_tokens)
        self._request_output.observe(request.num_output_tokens)
        self._request_max.observe(request.params.max_tokens)
        self._request_preemptions.observe(request.num_preemptions)
        if request.admitted_s is None:
            return
        self._queue.observe(request.admitted_s - request.arrival_s)
        self._inference.observe(now_s - request.admitted_s)
        if request.first_token_s is None:
            return
        self._prefill.observe(request.first_token_s - request.admitted_s)
        decode_s = now_s - request.first_token_s
        self._decode.observe(decode_s)
        if request.num_output_tokens > 1:
            self._per_token.observe(decode_s / (request.num_output_tokens - 1))

    def render(self) -> bytes:
        """All series in Prometheus text format."""
        now_s = self._now()
        if now_s - self._counters_text_s >= COUNTERS_AGE_S:
            self._counters_text, self._counters_text_s = generate_latest(self._registry), now_s
        return generate_latest(self._gauges) + self._counters_text
