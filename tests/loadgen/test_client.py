from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from kunserve.loadgen import metrics, report
from kunserve.loadgen.client import Recording, Target, first_model, run
from kunserve.loadgen.workload import Job


class ScriptedServer:
    """Speaks just enough of the API; `max_tokens` of a request picks the script, so that tests read top to bottom."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.num_disconnects = 0
        self.num_scrapes = 0
        self.num_open = 0
        self.max_open = 0
        self.changed = asyncio.Condition()
        self.scripts: dict[int, Callable[[web.Request, web.StreamResponse], Any]] = {}
        self.server = TestServer(self._app())

    @property
    def url(self) -> str:
        return str(self.server.make_url("")).rstrip("/")

    def _app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.complete)
        return app

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny"}]})

    async def metrics(self, request: web.Request) -> web.Response:
        await self._note(num_scrapes=1)
        return web.Response(text=f'vllm:num_requests_running{{engine="0"}} {self.num_open}\n')

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        async with self.changed:
            await self.changed.wait_for(condition)

    async def _note(self, **deltas: int) -> None:
        async with self.changed:
            for name, delta in deltas.items():
                setattr(self, name, getattr(self, name) + delta)
            self.max_open = max(self.max_open, self.num_open)
            self.changed.notify_all()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        await self._note(num_open=1)
        try:
            if body["max_tokens"] == 503:
                return web.json_response({"error": {"message": "the queue is full"}}, status=503)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            script = self.scripts.get(body["max_tokens"], answer_all)
            await script(request, response)
            return response
        except (asyncio.CancelledError, ConnectionError):
            await self._note(num_disconnects=1)
            raise
        finally:
            await self._note(num_open=-1)


async def send_event(response: web.StreamResponse, event: Any) -> None:
    data = event if isinstance(event, str) else json.dumps(event)
    await response.write(f"data: {data}\n\n".encode())


def token(text: str = "x", finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": finish_reason}]}


async def answer_all(request: web.Request, response: web.StreamResponse) -> None:
    """A proper answer of `max_tokens` tokens, some without text, in the route's format."""
    body = await request.json()
    count = body["max_tokens"]
    if "messages" in body:
        await send_event(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for _ in range(count):
            await send_event(response, {"choices": [{"delta": {"content": "x"}}]})
        await send_event(response, {"choices": [{"delta": {}, "finish_reason": "length"}]})
    else:
        for i in range(count):
            await send_event(response, token("" if i % 3 == 1 else "x", "length" if i == count - 1 else None))
    usage = {"prompt_tokens": len(body.get("prompt", "")), "completion_tokens": count}
    await send_event(response, {"choices": [], "usage": usage})
    await send_event(response, "[DONE]")


async def hang(request: web.Request, response: web.StreamResponse) -> None:
    """One token, and then nothing until the client leaves."""
    await send_event(response, token())
    await asyncio.Event().wait()


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    scripted = ScriptedServer()
    await scripted.server.start_server()
    yield scripted
    await scripted.server.close()


async def record(server: ScriptedServer, jobs: list[Job], **settings: Any) -> Recording:
    target = Target((server.url,), "tiny", **settings)
    recording = Recording.of(jobs, target.urls)
    await run(recording, target)
    return recording


def jobs_of(*num_output_tokens: int) -> list[Job]:
    return [Job(0.0, 5, count) for count in num_output_tokens]


async def test_every_token_of_every_stream_is_counted(server: ScriptedServer) -> None:
    recording = await record(server, jobs_of(7, 1, 30))
    summary = report.summarize(recording)
    assert [s.num_output_tokens for s in recording.streams] == [7, 1, 30] == [len(s.token_s) for s in recording.streams]
    assert (summary["completed"], summary["output_tokens"], summary["prompt_tokens"]) == (3, 38, 15)
    assert summary["failures"] == {} and summary["short_outputs"] == 0
    for stream in recording.streams:
        assert stream.sent_s is not None and stream.ended_s is not None
        assert stream.sent_s < stream.token_s[0] <= stream.token_s[-1] <= stream.ended_s <= recording.elapsed_s


async def test_chat_streams_start_at_their_first_content(server: ScriptedServer) -> None:
    recording = await record(server, jobs_of(5), prompt_mode="chat")
    assert [len(s.token_s) for s in recording.streams] == [5]
    assert "messages" in server.bodies[0]


async def test_without_usage_chunks_are_counted(server: ScriptedServer) -> None:
    async def script(request: web.Request, response: web.StreamResponse) -> None:
        await send_event(response, token())
        await response.write(b": a comment\nevent: message\nda")  # an event may come in pieces
        await response.write(b'ta: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\n')

    server.scripts[4] = script
    recording = await record(server, jobs_of(4))
    assert recording.streams[0].status == "completed"
    assert recording.streams[0].num_output_tokens == 1
    assert report.summarize(recording)["short_outputs"] == 1


async def test_a_token_without_text_that_ends_the_answer_is_a_first_token(server: ScriptedServer) -> None:
    async def script(request: web.Request, response: web.StreamResponse) -> None:
        await send_event(response, token("", "length"))
        await send_event(response, "[DONE]")

    server.scripts[1] = script
    (stream,) = (await record(server, jobs_of(1))).streams
    assert stream.status == "completed" and len(stream.token_s) == 1


FAILURES: dict[int, tuple[list[Any], str]] = {
    11: ([token(), {"error": {"message": "out of blocks", "code": 500}}], "error event: out of blocks"),
    12: ([token(), {"error": "plain"}], "error event: plain"),
    13: ([token()], "ended early"),
    14: ([token(), "{oops"], "malformed event: b'{oops'"),
    15: ([token(), "[1]"], "malformed event"),
    16: ([token(), token("", "error")], "finish_reason error"),
    17: (["[DONE]"], "ended without a token"),
    18: ([token(), "reset"], "connection: "),
}


async def test_each_failure_is_counted_with_its_reason(server: ScriptedServer) -> None:
    def scripted(events: list[Any]) -> Callable[[web.Request, web.StreamResponse], Any]:
        async def script(request: web.Request, response: web.StreamResponse) -> None:
            for event in events:
                if event == "reset":
                    assert request.transport is not None
                    request.transport.abort()
                else:
                    await send_event(response, event)

        return script

    server.scripts = {key: scripted(events) for key, (events, _) in FAILURES.items()}
    recording = await record(server, jobs_of(*FAILURES, 503, 503, 2))
    summary = report.summarize(recording)
    assert (summary["failed"], summary["completed"]) == (len(FAILURES) + 2, 1)
    assert summary["failures"]["HTTP 503: the queue is full"] == 2
    for stream, (_, reason) in zip(recording.streams, FAILURES.values(), strict=False):
        assert stream.status == "failed" and stream.failure is not None and stream.failure.startswith(reason)
    assert sum(summary["failures"].values()) == summary["failed"]


async def test_a_server_that_is_not_there_is_a_failure_not_an_exception() -> None:
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        recording = Recording.of(jobs_of(3), (url,))
        await run(recording, Target((url,), "tiny"))
        assert recording.streams[0].failure is not None
        assert recording.streams[0].failure.startswith("connection: ClientConnectorError")
        with pytest.raises(ValueError, match=f"cannot reach {url}"):
            await first_model(url, {})


async def test_a_stream_that_hangs_times_out(server: ScriptedServer) -> None:
    server.scripts[9] = hang
    (stream,) = (await record(server, jobs_of(9), timeout_s=0.05)).streams
    assert stream.failure == "timeout: no end after 0.05 s" and len(stream.token_s) == 1


async def test_cancelled_streams_close_their_connection(server: ScriptedServer) -> None:
    async def endless(request: web.Request, response: web.StreamResponse) -> None:
        for _ in range(3):
            await send_event(response, token())
        await asyncio.Event().wait()  # only a closed connection ends this

    server.scripts[50] = endless
    recording = await record(server, [Job(0.0, 5, 50, cancel_after=3), Job(0.0, 5, 4)])
    await server.wait_for(lambda: server.num_open == 0)
    assert server.num_disconnects == 1
    summary = report.summarize(recording)
    assert (summary["cancelled"], summary["completed"], summary["failed"]) == (1, 1, 0)
    assert [s.num_output_tokens for s in recording.streams] == [3, 4]


async def test_urls_are_asked_in_turn(server: ScriptedServer) -> None:
    other = ScriptedServer()
    await other.server.start_server()
    urls = (server.url, other.url)
    recording = Recording.of(jobs_of(1, 2, 3, 4, 5), urls)
    await run(recording, Target(urls, "tiny"))
    assert sorted(body["max_tokens"] for body in server.bodies) == [1, 3, 5]
    assert sorted(body["max_tokens"] for body in other.bodies) == [2, 4]
    assert [series.url for series in recording.series] == list(urls)
    await other.server.close()


async def test_concurrency_is_bounded(server: ScriptedServer) -> None:
    await record(server, jobs_of(*[3] * 20), concurrency=2)
    assert len(server.bodies) == 20 and server.max_open <= 2


async def test_an_interrupted_run_keeps_what_it_saw(server: ScriptedServer) -> None:
    server.scripts[9] = hang
    recording = Recording.of([*jobs_of(3, 9), Job(1e6, 5, 3)], (server.url,))
    running = asyncio.create_task(run(recording, Target((server.url,), "tiny", concurrency=1)))
    await server.wait_for(lambda: len(server.bodies) == 2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [s.status for s in recording.streams] == ["completed", "interrupted", "pending"]
    assert report.summarize(recording)["unfinished"] == 2


async def test_metrics_are_polled_while_streams_run(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hold(request: web.Request, response: web.StreamResponse) -> None:
        first = server.num_scrapes + 1
        await server.wait_for(lambda: server.num_scrapes > first)  # the one before has been taken in
        await answer_all(request, response)

    monkeypatch.setattr(metrics, "POLL_INTERVAL_S", 0.0)
    server.scripts[2] = hold
    recording = await record(server, jobs_of(2))
    assert 1.0 in recording.series[0].values["running"]


async def start(server: ScriptedServer, *argv: str) -> Process:
    program = "from kunserve.cli import main; main()"
    command = (sys.executable, "-c", program, "loadgen", "--url", server.url, *argv)
    return await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)


async def test_the_last_line_of_stdout_is_one_json_object(server: ScriptedServer, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    process = await start(
        server, "--num-requests", "6", "--output-len", "3:5", "--json", str(path), "--api-key", "secret"
    )
    stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr
    summary = json.loads(stdout.decode().strip().splitlines()[-1])
    assert summary["completed"] == 6 and summary["output_tokens"] == sum(b["max_tokens"] for b in server.bodies)
    assert {body["model"] for body in server.bodies} == {"tiny"}
    assert b"6 completed" in stderr
    document = json.loads(path.read_text())
    assert document["summary"] == summary and len(document["requests"]) == 6
    assert "secret" not in path.read_text()


async def test_an_interrupt_prints_the_report_of_what_finished(server: ScriptedServer, tmp_path: Path) -> None:
    server.scripts[9] = hang
    trace = tmp_path / "trace.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,5,3\n0,5,9\n1000000,5,3\n")
    process = await start(server, "--trace", str(trace), "--concurrency", "1")
    await server.wait_for(lambda: len(server.bodies) == 2)
    process.send_signal(signal.SIGINT)
    stdout, stderr = await process.communicate()
    assert process.returncode == 130, stderr
    summary = json.loads(stdout.decode().strip().splitlines()[-1])
    assert (summary["completed"], summary["unfinished"], summary["failed"]) == (1, 2, 0)


async def test_a_run_in_which_nothing_completes_ends_with_status_1(server: ScriptedServer) -> None:
    process = await start(server, "--num-requests", "2", "--output-len", "503", "--model", "m")
    stdout, _ = await process.communicate()
    assert process.returncode == 1
    assert json.loads(stdout)["failures"] == {"HTTP 503: the queue is full": 2}
