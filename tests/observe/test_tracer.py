"""Traces of requests: whose they are, what they hold, and what it takes to have them."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from api_fakes import FakeEngine, make_app
from engine_fakes import make_request, read, scripted_engine
from loaded_groups import loaded, two_devices
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from kunserve.engine.request import Request
from kunserve.errors import ConfigError
from kunserve.log import set_up_logging
from kunserve.observe import trace_endpoint as endpoints
from kunserve.observe.trace_endpoint import TraceEndpoint, trace_endpoint
from kunserve.observe.tracer import Tracer, open_tracer
from kunserve.sampling import SamplingParams

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CLIENT = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}
VLLM = {  # vllm/tracing/utils.py, as its request span has them
    "gen_ai.request.id",
    "gen_ai.request.n",
    "gen_ai.request.max_tokens",
    "gen_ai.request.temperature",
    "gen_ai.request.top_p",
    "gen_ai.response.model",
    "gen_ai.usage.prompt_tokens",
    "gen_ai.usage.completion_tokens",
    "gen_ai.latency.e2e",
    "gen_ai.latency.time_in_queue",
    "gen_ai.latency.time_to_first_token",
    "gen_ai.latency.time_in_model_prefill",
    "gen_ai.latency.time_in_model_decode",
    "gen_ai.latency.time_in_model_inference",
}


class Traces:
    """A tracer, and the spans that it sent."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracer = Tracer(self._exporter, "tiny")

    def spans(self) -> list[ReadableSpan]:
        """All that have ended, in the order of their ends. Nothing more can be traced."""
        self.tracer.close()
        return list(self._exporter.get_finished_spans())


@pytest.fixture
def traces() -> Traces:
    return Traces()


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)


def events_of(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]


async def test_a_request_is_a_span_of_its_clients_trace_with_its_phases(traces: Traces) -> None:
    async with scripted_engine(chunks_per_layer=1) as (engine, executor):
        http = traces.tracer.of(CLIENT)
        requests = [make_request(name, num_prompt=12, max_tokens=12, temperature=0.5) for name in ("a", "b")]
        for request in requests:
            request.trace = http.begin(2)
        answers = asyncio.gather(*(read(engine.submit(request)) for request in requests))
        while not answers.done():  # 32 tokens of KV are too few for both: one is preempted
            stepping = asyncio.ensure_future(executor.next_step())
            await asyncio.wait((stepping, answers), return_when=asyncio.FIRST_COMPLETED)
            if stepping.done():
                stepping.result().finish(7)
            stepping.cancel()
            await asyncio.sleep(0)
    spans = traces.spans()
    roots = [span for span in spans if span.name == "llm_request"]
    assert len(roots) == 2 and len(spans) == 8
    for root in roots:
        assert root.kind is SpanKind.SERVER and root.status.status_code is StatusCode.UNSET
        assert root.context.trace_id == int(TRACE_ID, 16)
        assert root.parent is not None and root.parent.span_id == int(SPAN_ID, 16)
        found = dict(root.attributes or {})
        assert found.keys() >= VLLM
        assert (found["gen_ai.usage.prompt_tokens"], found["gen_ai.usage.completion_tokens"]) == (12, 12)
        assert (found["gen_ai.request.temperature"], found["gen_ai.request.n"]) == (0.5, 2)
        phases = [span for span in spans if span.parent and span.parent.span_id == root.context.span_id]
        assert [span.name for span in phases] == ["queue", "prefill", "decode"]
        for span, name in zip(phases, ("queue", "model_prefill", "model_decode"), strict=True):
            assert span.start_time is not None and span.end_time is not None
            seconds = found[f"gen_ai.latency.time_in_{name}"]
            assert (span.end_time - span.start_time) / 1e9 == pytest.approx(seconds, abs=1e-6)
        assert all(before.end_time == after.start_time for before, after in pairwise(phases))
        assert phases[-1].end_time == root.end_time
    assert sorted(map(events_of, roots)) == [[], ["preempted"]]
    assert {root.attributes["kunserve.preemptions"] for root in roots if root.attributes} == {0, 1}


async def test_what_fails_or_never_begins_says_so(traces: Traces) -> None:
    async with scripted_engine() as (engine, _):
        request = make_request()
        request.trace = traces.tracer.of({}).begin(1)
        engine.fleet.set_admitting(engine.groups[0], False)
        answer = asyncio.ensure_future(read(engine.submit(request)))
        await asyncio.sleep(0)
        engine.limit_tokens(2)  # no group can hold it any more
        with pytest.raises(Exception, match="tokens"):
            await answer
    phase, root = traces.spans()
    assert (phase.name, root.name, root.parent) == ("queue", "llm_request", None)
    assert root.status.status_code is StatusCode.ERROR
    assert "gen_ai.latency.time_in_queue" not in (root.attributes or {})


async def test_a_drop_and_the_way_of_the_kv_are_events(traces: Traces, six_layers: Path) -> None:
    rng = random.Random(3)
    requests = [
        Request(f"r{i}", rng.choices(range(3, 60), k=30), SamplingParams(20, ignore_eos=True, seed=i)) for i in range(4)
    ]
    async with two_devices(six_layers, 320) as checked:
        for request in requests:
            request.trace = traces.tracer.of({}).begin(1)
        answers = await loaded(checked, requests)
        await checked.control.drop()
        await answers
        await checked.settled()
    roots = [span for span in traces.spans() if span.name == "llm_request"]
    assert [events_of(root) for root in roots] == [["kv departed", "drop", "kv arrived"]] * 4
    (departed, drop, arrived), epochs = roots[0].events, {root.events[1].attributes["epoch"] for root in roots}
    assert departed.timestamp <= drop.timestamp <= arrived.timestamp and epochs == {1}


@asynccontextmanager
async def client_of(
    engine: FakeEngine, tracer: Tracer | None
) -> AsyncIterator[TestClient[web.Request, web.Application]]:
    app = make_app(engine, tracer=tracer)
    async with TestClient(TestServer(app)) as client:
        yield client


@pytest.mark.usefixtures("_logging_as_before")
async def test_sequences_share_the_trace_of_their_request_and_lines_of_the_log_name_it(
    traces: Traces, capfd: pytest.CaptureFixture[str]
) -> None:
    set_up_logging("info", as_json=True)
    engine, body = FakeEngine(), {"prompt": "a", "n": 2}
    async with client_of(engine, traces.tracer) as client:
        for headers in (CLIENT, {}, {}):
            assert (await client.post("/v1/completions", json=body, headers=headers)).status == 200
        assert (await client.post("/v1/completions", json={"prompt": 5.5}, headers=CLIENT)).status == 400
        assert (await client.get("/v1/models")).status == 200
    ids = [request.trace.ids for request in engine.requests if request.trace is not None]
    assert len(ids) == 6 and len({each["span_id"] for each in ids}) == 6
    trace_ids = [each["trace_id"] for each in ids]
    assert trace_ids[:2] == [TRACE_ID] * 2 and trace_ids[2] == trace_ids[3] != trace_ids[4] == trace_ids[5]
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    logged = [line.get("trace_id") for line in lines if line["event"] == "request"]
    assert logged == [*trace_ids[::2], TRACE_ID, None]


async def test_nothing_is_traced_unless_it_is_wanted() -> None:
    engine = FakeEngine()
    async with client_of(engine, None) as client:
        assert (await client.post("/v1/completions", json={"prompt": "a"}, headers=CLIENT)).status == 200
    assert [request.trace for request in engine.requests] == [None]


async def test_a_collector_gets_the_spans_over_http() -> None:
    bodies = []

    async def take(request: web.Request) -> web.Response:
        bodies.append(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response()

    app = web.Application()
    app.add_routes([web.post("/v1/traces", take)])
    async with TestServer(app) as server:
        endpoint = trace_endpoint(f"http://127.0.0.1:{server.port}", {})
        assert endpoint is not None
        tracer = open_tracer(endpoint, "tiny")
        trace = tracer.of(CLIENT).begin(1)
        request = make_request("mine")
        trace.end(request, 1.0)
        await asyncio.to_thread(tracer.close)
    [body] = bodies
    [resource] = body.resource_spans
    assert any(a.key == "service.name" and a.value.string_value == "kunserve" for a in resource.resource.attributes)
    sent = {span.name: span for span in resource.scope_spans[0].spans}
    assert sent["llm_request"].trace_id.hex() == TRACE_ID
    assert sent["queue"].parent_span_id == sent["llm_request"].span_id


def test_a_trace_that_its_client_did_not_choose_is_not_sent(traces: Traces) -> None:
    trace = traces.tracer.of({"traceparent": CLIENT["traceparent"][:-1] + "0"}).begin(1)
    trace.event("preempted")
    trace.end(make_request(), 1.0)
    assert trace.ids["trace_id"] == TRACE_ID and traces.spans() == []


@pytest.mark.parametrize(
    ("url", "environment", "found"),
    [
        ("http://c:4318", {}, TraceEndpoint("http://c:4318/v1/traces", is_grpc=False)),
        ("https://c/otel", {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, TraceEndpoint("https://c/otel", False)),
        ("c:4317", {}, "must be a URL"),
        ("http://", {}, "must be a URL"),
        ("http://c", {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "json"}, "must be http/protobuf or grpc"),
        (None, {}, None),
    ],
)
def test_the_endpoint_is_judged_at_the_start(
    url: str | None, environment: dict[str, str], found: TraceEndpoint | str | None
) -> None:
    if isinstance(found, str):
        with pytest.raises(ConfigError, match=found):
            trace_endpoint(url, environment)
    else:
        assert trace_endpoint(url, environment) == found


@pytest.mark.parametrize(
    ("missing", "url", "told"),
    [
        ("opentelemetry", "http://c", r"pip install 'kunserve\[otel\]'"),
        ("opentelemetry.exporter", "http://c", r"pip install 'kunserve\[otel\]'"),
        ("opentelemetry.exporter.otlp.proto.grpc", "grpc://c:4317", "opentelemetry-exporter-otlp-proto-grpc"),
    ],
)
def test_a_missing_package_is_told_at_the_start(
    missing: str, url: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "find_spec", lambda module: None if module.startswith(missing) else object())
    with pytest.raises(ConfigError, match=f"^--otlp-traces-endpoint .*{told}$"):
        trace_endpoint(url, {})
