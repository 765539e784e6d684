from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from scripted_server import ScriptedServer, answer_all, hang, scripted_server, send_event, token

from kunserve.loadgen import metrics, report
from kunserve.loadgen.client import Recording, Target, first_model, run
from kunserve.loadgen.workload import Job, in_turns


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    async with scripted_server() as server:
        yield server


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
    assert len({stream.text for stream in recording.streams}) == 3 and all(stream.text for stream in recording.streams)
    for stream in recording.streams:
        assert stream.sent_s is not None and stream.ended_s is not None
        assert stream.sent_s < stream.token_s[0] <= stream.token_s[-1] <= stream.ended_s <= recording.elapsed_s


async def test_chat_streams_start_at_their_first_content(server: ScriptedServer) -> None:
    recording = await record(server, jobs_of(5), prompt_mode="chat")
    assert [len(s.token_s) for s in recording.streams] == [5]
    assert "messages" in server.bodies[0]


async def test_a_chat_goes_on_with_all_turns_before_it_and_their_answers(server: ScriptedServer) -> None:
    jobs = in_turns([Job(0.0, 5, 2), Job(0.0, 6, 3)], 3, num_system_tokens=7, num_systems=1)
    recording = await record(server, jobs, prompt_mode="chat")
    assert [stream.status for stream in recording.streams] == ["completed"] * 6
    for number in (2, 3):  # each chat asks for another number of tokens
        first, second, third = (body["messages"] for body in server.bodies if body["max_tokens"] == number)
        assert [message["role"] for message in first] == ["system", "user"] and len(first[0]["content"].split()) == 7
        for before, after in ((first, second), (second, third)):
            assert after[: len(before)] == before
            assert [message["role"] for message in after[len(before) :]] == ["assistant", "user"]
            assert after[len(before)]["content"]
    assert len({body["messages"][0]["content"] for body in server.bodies}) == 1
    assert len(report.summarize(recording)["ttft_p50_by_turn_s"]) == 3


async def test_a_chat_ends_at_a_turn_that_failed(server: ScriptedServer) -> None:
    async def script(request: web.Request, response: web.StreamResponse) -> None:
        await send_event(response, {"error": {"message": "no"}})

    server.scripts[4] = script
    recording = await record(server, in_turns([Job(0.0, 5, 4)], 3, 0, 1), prompt_mode="chat")
    assert [stream.status for stream in recording.streams] == ["failed", "pending", "pending"]
    assert report.summarize(recording)["unfinished"] == 2


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
        assert "ssl" not in recording.streams[0].failure  # the URL is a plain one
        with pytest.raises(ValueError, match=f"cannot reach {url}") as caught:
            await first_model(url, {})
        assert "ssl" not in str(caught.value)


async def test_a_web_page_is_no_reason() -> None:
    async def page(_: web.Request) -> web.Response:
        return web.Response(status=404, text="<!DOCTYPE html><p>Sorry!", content_type="text/html")

    app = web.Application()
    app.router.add_get("/v1/models", page)
    async with TestServer(app) as other:
        with pytest.raises(ValueError, match=r"but HTTP 404: Not Found: name one with --model$"):
            await first_model(str(other.make_url("")).rstrip("/"), {})


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
    async with scripted_server() as other:
        urls = (server.url, other.url)
        recording = Recording.of(jobs_of(1, 2, 3, 4, 5), urls)
        await run(recording, Target(urls, "tiny"))
    assert sorted(body["max_tokens"] for body in server.bodies) == [1, 3, 5]
    assert sorted(body["max_tokens"] for body in other.bodies) == [2, 4]
    assert [series.url for series in recording.series] == list(urls)


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
