"""A server process whose traces a collector gets, by the time that it has stopped at the latest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import aiohttp
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from e2e.server_process import running_server

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


@contextmanager
def collector(bodies: list[bytes]) -> Iterator[str]:
    """A collector that fills `bodies`; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


async def test_a_collector_has_all_spans_when_the_server_has_stopped(tiny_flags: tuple[str, ...]) -> None:
    bodies: list[bytes] = []
    headers = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
    body = {"model": "tiny", "prompt": [3, 4, 5], "max_tokens": 7, "ignore_eos": True, "n": 2}
    with collector(bodies) as url, running_server(*tiny_flags, "--otlp-traces-endpoint", url) as server:
        post = aiohttp.request("POST", f"{server.url}/v1/completions", json=body, headers=headers)
        async with post as response:
            assert response.status == 200
            await response.read()
    requests = [ExportTraceServiceRequest.FromString(each) for each in bodies]
    spans = [span for r in requests for each in r.resource_spans for scope in each.scope_spans for span in scope.spans]
    assert {span.trace_id.hex() for span in spans} == {TRACE_ID}
    assert sorted(span.name for span in spans) == sorted(["llm_request", "queue", "prefill", "decode"] * 2)
    [model] = {a.value.string_value for span in spans for a in span.attributes if a.key == "gen_ai.response.model"}
    assert model == "tiny"
