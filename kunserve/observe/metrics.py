"""Counters the engine keeps as it serves, in the names dashboards and routers know; `/metrics` renders them.

Routers read one sample per gauge, so the gauges that route traffic are aggregated over all devices
(`engine="0"`); what differs from device to device stands under our own prefix. Routers scrape as often as every
50 ms: gauges are then made from plain numbers, without waiting for a step, and the many other series (4 ms of
formatting) may be `COUNTERS_AGE_S` old.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kunserve.grammar.limits import DEATH_REASONS
from kunserve.observe.gauges import EngineStats as EngineStats  # for whoever sets both
from kunserve.observe.gauges import Gauges
from kunserve.observe.many import ManyHistogram
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
TRANSITION_KINDS = ("drop", "restore", "rebalance", "lose", "remove", "add")
COUNTERS_AGE_S = 0.15


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
        """Return the number of tokens that the client sent."""

    @property
    def num_output_tokens(self) -> int:
        """Return the number of tokens generated so far."""


def _token_buckets(max_tokens: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, ... up to `max_tokens`."""
    scales = (10**exponent for exponent in range(len(str(max_tokens))))
    return [m * scale for scale in scales for m in (1, 2, 5) if m * scale <= max_tokens]


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
        self._gauges.register(Gauges(self._labels, stats, lambda: self.prefix_hit_rate))
        self._now = now
        self._counters_text = b""
        self._counters_text_s = -inf
        self.num_prompt_tokens = self.num_generation_tokens = 0  # since start
        self.num_looked_for_tokens = self.num_cached_tokens = 0  # in the prefix cache
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
        self._preemptions = self._counter(
            "vllm:num_preemptions", "Preemptions: requests that lost their KV to others and are computed again."
        )
        self._prompt_tokens = self._counter(
            "vllm:prompt_tokens", "Prompt tokens computed; tokens that are computed again do not count again."
        )
        self._generation_tokens = self._counter("vllm:generation_tokens", "Output tokens that were generated.")
        self._prefix_cache = [
            (
                self._counter(
                    prefix + "prefix_cache_queries", "Prompt tokens that were looked for in the prefix cache."
                ),
                self._counter(prefix + "prefix_cache_hits", "Prompt tokens whose KV was found in the prefix cache."),
            )
            for prefix in ("vllm:", "vllm:gpu_")  # the second: old names, which routers read
        ]
        text = "Requests that ended, by the reason why."
        self._finished = self._counter_by("finished_reason", "vllm:request_success", text, FinishReason)
        text = "Requests that were refused with 503, by the bound that they met."
        family = Counter("vllm:admission_rejections", text, [*self._labels, "reason"], registry=self._registry)
        self._rejections = family
        for reason in REJECTIONS:
            family.labels(**self._labels, reason=reason)  # from the start
        text = "Processes that follow structures (schemas, grammars) and ended before their time, by reason."
        family = Counter("kunserve:structure_process_deaths", text, [*self._labels, "reason"], registry=self._registry)
        self._structure_process_deaths = family
        for reason in DEATH_REASONS:
            family.labels(**self._labels, reason=reason)
        self._transitions = {
            "drop": self._counter("kunserve:drops", "Drops that were committed."),
            "restore": self._counter("kunserve:restores", "Restores that were committed."),
            "rebalance": self._counter("kunserve:rebalances", "Moves of memory from one kind of KV to the other."),
        }
        text = "Transitions that failed and were undone, by their kind."
        self._rolled_back = self._counter_by("kind", "kunserve:rolled_back_transitions", text, TRANSITION_KINDS)
        self._devices_lost = self._counter("kunserve:devices_lost", "Devices that were declared lost.")
        self._exchange_bytes = self._counter(
            "kunserve:exchange_bytes", "Bytes of KV that followed their layers to another device."
        )
        text = "Requests that are computed again because their KV did not follow its layers."
        self._exchange_lost_requests = self._counter("kunserve:exchange_lost_requests", text)
        text = "Requests that started over because a step that carried them failed."
        self._retried_requests = self._counter("kunserve:retried_requests", text)

    def _make_histograms(self, tokens: Sequence[float]) -> None:
        def seconds(name: str, text: str, buckets: Sequence[float] = REQUEST_BUCKETS_S) -> Histogram:
            return self._histogram(f"vllm:{name}_seconds", text, buckets)

        self._ttft = seconds(
            "time_to_first_token", "Seconds from a request's arrival to its first token.", TTFT_BUCKETS_S
        )
        text = "Seconds from one token of a request to its next."
        name = "vllm:inter_token_latency_seconds"
        self._inter_token = ManyHistogram(name, text, self._labels, ITL_BUCKETS_S)
        self._registry.register(self._inter_token)
        self._per_token = seconds(
            "request_time_per_output_token",
            "Mean seconds per output token of a request, after its first.",
            ITL_BUCKETS_S,
        )
        self._e2e = seconds("e2e_request_latency", "Seconds from a request's arrival to its end.")
        self._queue = seconds("request_queue_time", "Seconds from a request's arrival to its first admission.")
        self._prefill = seconds("request_prefill_time", "Seconds from a request's admission to its first token.")
        self._decode = seconds("request_decode_time", "Seconds from a request's first token to its end.")
        self._inference = seconds("request_inference_time", "Seconds from a request's admission to its end.")
        histogram = self._histogram
        self._request_prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", tokens)
        self._request_output = histogram("vllm:request_generation_tokens", "Output tokens that a request got.", tokens)
        self._request_max = histogram(
            "vllm:request_params_max_tokens", "The max_tokens that a request asked for.", tokens
        )
        self._request_n = histogram("vllm:request_params_n", "The n that a request asked for.", N_BUCKETS)
        self._request_preemptions = histogram(
            "vllm:request_num_preemptions", "How often a request was preempted.", PREEMPTION_BUCKETS
        )
        self._step_tokens = histogram(
            "vllm:iteration_tokens_total", "Prompt and output tokens of one step.", STEP_BUCKETS_TOKENS
        )
        text = "Seconds that a step of a committed transition took."
        names = [*self._labels, "step"]
        buckets = TRANSITION_BUCKETS_S
        self._steps = Histogram("kunserve:transition_seconds", text, names, registry=self._registry, buckets=buckets)
        self._loop_lag = histogram(
            "kunserve:event_loop_lag_seconds", "Seconds that a timer of the event loop fired late.", LAG_BUCKETS_S
        )
        names = list(self._labels)
        lag_max = Gauge(
            "kunserve:event_loop_lag_max_seconds",
            "The longest such lag since the start.",
            names,
            registry=self._registry,
        )
        self._loop_lag_max = lag_max.labels(**self._labels)
        body_bytes = Gauge(
            "kunserve:body_bytes", "Bytes of request bodies that are not requests yet.", names, registry=self._registry
        )
        self._body_bytes = body_bytes.labels(**self._labels)

    @property
    def prefix_hit_rate(self) -> float:
        """Return the share of prompt tokens whose KV was in the prefix cache, since the start."""
        return self.num_cached_tokens / max(1, self.num_looked_for_tokens)

    def prefix_cache(self, num_tokens: int, num_cached_tokens: int) -> None:
        """Count a prompt that was looked for in the prefix cache, and how much of it was there."""
        self.num_looked_for_tokens += num_tokens
        self.num_cached_tokens += num_cached_tokens
        self.recent.prompt(num_tokens, num_cached_tokens)
        for queries, hits in self._prefix_cache:
            queries.inc(num_tokens)
            hits.inc(num_cached_tokens)

    def first_token(self, request: Counted, now_s: float) -> None:
        """Count the first token of a request, at `now_s` on the engine's clock."""
        self._ttft.observe(now_s - request.arrival_s)
        self.recent.first_token(now_s, now_s - request.arrival_s)

    def inter_tokens(self, seconds: Sequence[float]) -> None:
        """Count the times from a token to the next of its request, of all requests of a step."""
        for value, count in Tally(seconds).items():  # nearly always one: they were in the step before as well
            self._inter_token.observe(value, count)
            self.recent.gap_s = max(self.recent.gap_s, value)

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
        """Show how many bytes of bodies are held that are no requests yet (told by HTTP)."""
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
        """Count the `n` of one prompt (told by HTTP: the engine sees n requests)."""
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
        """Return all series in Prometheus text format."""
        now_s = self._now()
        if now_s - self._counters_text_s >= COUNTERS_AGE_S:
            self._counters_text, self._counters_text_s = generate_latest(self._registry), now_s
        return generate_latest(self._gauges) + self._counters_text
