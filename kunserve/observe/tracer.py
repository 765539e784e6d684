"""Traces of requests, for OpenTelemetry: a span `llm_request` for each sequence, with vLLM's names of attributes.

Its children are the queue, the prefill and the decode; its events are what touched the request meanwhile: preemptions,
drops and restores of its group, and its KV on the way to another. Spans leave on a thread of the SDK's, in batches.
Needs the extra otel; nothing imports this module unless traces are wanted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Protocol

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode, format_span_id, format_trace_id
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kunserve.observe.metrics import Counted
from kunserve.observe.trace_endpoint import TraceEndpoint
from kunserve.sampling import FinishReason
from kunserve.version import installed_version

NS = 1_000_000_000


class Traced(Counted, Protocol):
    """What a span says of a request; times are on the engine's clock."""

    request_id: str
    num_cached_tokens: int


class RequestTrace:
    """The span of one sequence, from its making to its end; see `Trace` in engine/request.py."""

    __slots__ = ("_model", "_span", "_tracer", "ids")

    def __init__(self, tracer: trace.Tracer, model: str, span: Span) -> None:
        self._tracer, self._model, self._span = tracer, model, span
        context = span.get_span_context()
        self.ids: Mapping[str, str] = {
            "trace_id": format_trace_id(context.trace_id),
            "span_id": format_span_id(context.span_id),
        }

    def event(self, name: str, **attributes: str | int) -> None:
        """Note that something happens to the request now."""
        self._span.add_event(name, attributes)

    def end(self, request: Traced, now_s: float) -> None:
        """End the span at `now_s` on the engine's clock, and make those of the phases that it reached."""
        if not self._span.is_recording():  # whoever began the trace did not choose it
            return
        now_ns = time.time_ns()
        began = {"queue": request.arrival_s, "prefill": request.admitted_s, "decode": request.first_token_s}
        phases = [(name, at_s) for name, at_s in began.items() if at_s is not None]
        ends = [*(at_s for _, at_s in phases[1:]), now_s]
        context = trace.set_span_in_context(self._span)
        for (name, start_s), end_s in zip(phases, ends, strict=True):
            start_ns, end_ns = (now_ns - round((now_s - at_s) * NS) for at_s in (start_s, end_s))
            self._tracer.start_span(name, context, start_time=start_ns).end(end_ns)
        reason = request.finish_reason or FinishReason.ERROR
        if reason is FinishReason.ERROR:
            self._span.set_status(StatusCode.ERROR)
        self._span.set_attributes(self._attributes(request, reason, now_s))
        self._span.end(now_ns)

    def _attributes(self, request: Traced, reason: FinishReason, now_s: float) -> dict[str, str | int | float]:
        """Return what is known at the end: the names are vLLM's (vllm/tracing/utils.py), and ours where it has none."""
        params, admitted_s, first_s = request.params, request.admitted_s, request.first_token_s
        found: dict[str, str | int | float] = {
            "gen_ai.request.id": request.request_id,
            "gen_ai.response.model": self._model,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.prompt_tokens": request.num_prompt_tokens,
            "gen_ai.usage.completion_tokens": request.num_output_tokens,
            "gen_ai.latency.e2e": now_s - request.arrival_s,
            "kunserve.finish_reason": str(reason),
            "kunserve.cached_tokens": request.num_cached_tokens,
            "kunserve.preemptions": request.num_preemptions,
        }
        if admitted_s is not None:
            found["gen_ai.latency.time_in_queue"] = admitted_s - request.arrival_s
            found["gen_ai.latency.time_in_model_inference"] = now_s - admitted_s
        if admitted_s is not None and first_s is not None:
            found["gen_ai.latency.time_to_first_token"] = first_s - request.arrival_s
            found["gen_ai.latency.time_in_model_prefill"] = first_s - admitted_s
            found["gen_ai.latency.time_in_model_decode"] = now_s - first_s
        return found


class HttpTrace:
    """The trace that an HTTP request belongs to: its client's, or one that its first sequence begins."""

    __slots__ = ("_context", "_model", "_tracer")

    def __init__(self, tracer: trace.Tracer, model: str, context: Context) -> None:
        self._tracer, self._model, self._context = tracer, model, context

    @property
    def trace_id(self) -> str | None:
        """Return its id, as 32 hexadecimal digits; None if it has not begun."""
        context = trace.get_current_span(self._context).get_span_context()
        return format_trace_id(context.trace_id) if context.is_valid else None

    def begin(self, n: int) -> RequestTrace:
        """Begin the span of a sequence, one of `n` of its prompt."""
        has_begun = self.trace_id is not None
        span = self._tracer.start_span("llm_request", self._context, SpanKind.SERVER, {"gen_ai.request.n": n})
        if not has_begun:
            self._context = trace.set_span_in_context(span, self._context)
        return RequestTrace(self._tracer, self._model, span)


class Tracer:
    """Makes the spans of one server and sends them to `exporter`. `close` waits until they are sent."""

    def __init__(self, exporter: SpanExporter, model: str) -> None:
        named = {} if "OTEL_SERVICE_NAME" in os.environ else {SERVICE_NAME: "kunserve"}
        self._provider = TracerProvider(resource=Resource.create(named))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("kunserve", installed_version())
        self._model, self._propagator = model, TraceContextTextMapPropagator()

    def of(self, headers: Mapping[str, str]) -> HttpTrace:
        """Return the trace of an HTTP request: the one that its `traceparent` names, if it has one that is valid."""
        return HttpTrace(self._tracer, self._model, self._propagator.extract(headers))

    def close(self) -> None:
        """Send what is left, for a few seconds at most if nobody takes it, and stop."""
        self._provider.shutdown()


def open_tracer(endpoint: TraceEndpoint, model: str) -> Tracer:
    """Return a tracer that sends to a collector, whether or not one is there; headers and TLS are OTEL_* variables."""
    exporter: SpanExporter
    if endpoint.is_grpc:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

        exporter = Grpc(endpoint.url.replace("grpc://", "http://", 1))
    else:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

        exporter = Http(endpoint.url)
    return Tracer(exporter, model)
