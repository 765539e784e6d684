"""HTTP in processes of its own (`--api-workers`): the same answers, whichever worker gives them, and whichever dies."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import aiohttp
import psutil
import pytest

from e2e.client import Json, is_idle, metrics_of, post, session_of, state_of, stream_tokens, until
from e2e.server_process import POLL_S, ServerProcess, running_server
from e2e.tiny import random_prompt

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"days": {"type": "integer"}}, "required": ["days"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
SHORT: Json = {"prompt": random_prompt(9), "max_tokens": 24, "temperature": 0}
SEEDED: Json = {"prompt": random_prompt(7), "max_tokens": 24, "temperature": 1.3, "seed": 5}
NO_END = {"ignore_eos": True}

# Paths and bodies: what crosses, what is found out on either side, and what is refused.
COVERING: tuple[tuple[str, Json], ...] = (
    ("/v1/completions", SHORT),
    ("/v1/completions", {**SEEDED, "n": 3, "logprobs": 3, "return_token_ids": True}),
    ("/v1/completions", {**SEEDED, "echo": True, "logprobs": 1, "prompt_logprobs": 2}),
    ("/v1/completions", {**SEEDED, "presence_penalty": 1.0, "logit_bias": {"7": 5}, "min_p": 0.01, "top_k": 40}),
    ("/v1/completions", {**SEEDED, "prompt": [random_prompt(5), random_prompt(6)], "n": 2, **NO_END}),
    ("/v1/completions", {**SEEDED, "stop": ["a", "e", "t"], "max_tokens": 64}),
    ("/v1/completions", {**SEEDED, "stop": ["a", "e"], "include_stop_str_in_output": True, "logprobs": 0}),
    ("/v1/completions", {**SEEDED, "stop_token_ids": list(range(20, 60))}),
    ("/v1/completions", {**SEEDED, "structured_outputs": {"regex": "[0-9]{3}-[a-f]{2}"}, "max_tokens": 40}),
    ("/v1/completions", {**SEEDED, "structured_outputs": {"choice": ["yes", "no", "maybe"]}, "n": 2}),
    ("/v1/completions", {**SEEDED, "structured_outputs": {"grammar": "this is none"}}),
    ("/v1/completions", {**SEEDED, "bad_words": ["a"], "allowed_token_ids": list(range(5, 90))}),
    ("/v1/completions", {**SHORT, "prompt": random_prompt(3000)}),
    ("/v1/completions", {**SHORT, "max_tokens": 0}),
    ("/v1/completions", {**SHORT, "n": "two"}),
    ("/v1/chat/completions", {"messages": HI, "seed": 3, "max_tokens": 20, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {"messages": HI, "seed": 3, "max_tokens": 60, "response_format": {"type": "json_object"}}),
    ("/v1/chat/completions", {"messages": HI, "seed": 3, "max_tokens": 60, "tools": [TOOL], "tool_choice": "required"}),
    ("/v1/messages", {"messages": HI, "max_tokens": 20, "temperature": 0}),
    ("/v1/responses", {"input": "hi", "temperature": 0, "max_output_tokens": 20}),
    ("/tokenize", {"prompt": "hello there"}),
    ("/nothing", {}),
)


@pytest.fixture(scope="module")
def joined_server(tiny_flags: tuple[str, ...]) -> Iterator[ServerProcess]:
    with running_server(*tiny_flags, "--api-workers", "2", "--admin-key", "admin") as server:
        yield server


@pytest.fixture
def server(joined_server: ServerProcess) -> Iterator[ServerProcess]:
    with joined_server.log_shown():
        yield joined_server


def workers_of(server: ServerProcess) -> list[int]:
    """Process ids of the workers that live."""
    pids = []
    for child in psutil.Process(server.pid).children():
        with suppress(psutil.Error):  # it has just ended
            pids += [child.pid] if "kunserve.command.worker" in child.cmdline() else []
    return pids


def plain(text: str) -> str:
    """An answer without times and without ids that are drawn."""
    text = re.sub(r'"(created|created_at|completed_at)":[0-9.]+', r'"\1":0', text)
    return re.sub(r'"(id|call_id|item_id)":"[^"]+"', r'"\1":""', text)


def of_stream(text: str) -> Any:
    """What a stream tells of each choice, however it is cut into events; and its usage."""
    told: defaultdict[str, Any] = defaultdict(list)
    for line in text.split("\n\n"):
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            for choice in event.get("choices", [event]):
                delta, index = choice.get("delta", choice), choice.get("index", 0)
                told[f"text {index}"] += list(delta.get("text") or delta.get("content") or "")
                told[f"ids {index}"] += choice.get("token_ids") or []
                told[f"logprobs {index}"] += (choice.get("logprobs") or {}).get("token_logprobs", [])
                for call in delta.get("tool_calls", []):
                    told[f"call {index}"] += list(call["function"]["arguments"])
                told[f"end {index}"] += [choice.get("finish_reason"), choice.get("stop_reason")]
                told[f"end {index}"] = [end for end in told[f"end {index}"] if end is not None]
            told["usage"] += [event["usage"]] if event.get("usage") else []
            told["errors"] += [event["error"]] if event.get("error") else []
    return told


async def told(session: aiohttp.ClientSession, path: str, body: Json) -> tuple[int, Any]:
    headers = {"X-Request-ID": "the-same"}
    async with session.post(path, json=body, headers=headers) as response:
        text = await response.text()
        assert response.headers["X-Request-ID"] == "the-same"
        return response.status, of_stream(text) if body.get("stream") else plain(text)


@pytest.mark.parametrize(("path", "body"), COVERING, ids=lambda value: str(value)[:60])
async def test_answers_are_those_of_one_process(
    tiny_server: ServerProcess, server: ServerProcess, path: str, body: Json
) -> None:
    async with session_of(tiny_server) as alone, session_of(server) as joined:
        answers = [await told(session, path, body) for session in (alone, joined)]
        assert answers[0] == answers[1]
        if path in ("/v1/completions", "/v1/chat/completions", "/v1/messages") and answers[0][0] == 200:
            usage = {} if path == "/v1/messages" else {"stream_options": {"include_usage": True}}
            streamed = [await told(session, path, {**body, "stream": True, **usage}) for session in (alone, joined)]
            assert streamed[0] == streamed[1]
        await until(joined, is_idle)


async def test_all_workers_serve_and_any_knows_all(server: ServerProcess) -> None:
    pids = workers_of(server)
    assert len(pids) == 2
    before = {pid: psutil.Process(pid).cpu_times().user for pid in pids}
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # each request on a connection of its own
    async with aiohttp.ClientSession(server.url, connector=connector) as session:
        count = (await metrics_of(session))["vllm:request_success_total/stop"]
        answers = await asyncio.gather(*(post(session, "/v1/completions", SHORT) for _ in range(64)))
        assert len({answer["choices"][0]["text"] for answer in answers}) == 1
        stored = await post(session, "/v1/responses", {"input": "hi", "max_output_tokens": 4})
        for _ in range(8):
            async with session.get(f"/v1/responses/{stored['id']}") as response:
                assert (await response.json())["output"] == stored["output"]
            async with session.post("/kunserve/drop", json={}, headers={"Authorization": "Bearer wrong"}) as response:
                assert response.status == 401
        async with session.get("/kunserve/events") as response:
            assert (await response.content.readline()).startswith(b"event: snapshot")
        metrics = await metrics_of(session)
        assert metrics["vllm:request_params_n_count"] >= 65 and metrics["vllm:request_success_total/stop"] >= count
    assert all(psutil.Process(pid).cpu_times().user > before[pid] for pid in pids), "one did all the work"


async def tokens_or_none(session: aiohttp.ClientSession, body: Json) -> list[int] | None:
    try:
        return await stream_tokens(session, body)
    except (aiohttp.ClientError, AssertionError):
        return None


async def test_a_worker_that_dies_takes_its_own_streams_alone(server: ServerProcess) -> None:
    body = {**SEEDED, **NO_END, "max_tokens": 400}
    lost, other = workers_of(server)
    ends = server.log.count("an API worker has ended")
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(server.url, connector=connector) as session:
        expected = await stream_tokens(session, body)
        streams = [asyncio.create_task(tokens_or_none(session, body)) for _ in range(24)]
        await until(session, lambda state: state["requests"]["running"] == 24)
        psutil.Process(lost).send_signal(signal.SIGKILL)
        tokens = await asyncio.gather(*streams)
        assert [found for found in tokens if found is not None] == [expected] * (24 - tokens.count(None))
        await until(session, is_idle)
        while len(workers_of(server)) < 2:
            await asyncio.sleep(POLL_S)
        assert other in workers_of(server) and lost not in workers_of(server)
        for _ in range(8):
            assert await stream_tokens(session, body) == expected
    assert server.log.count("an API worker has ended") == ends + 1


async def statuses(session: aiohttp.ClientSession, bodies: Sequence[Json]) -> list[int]:
    async def one(body: Json) -> int:
        async with session.post("/v1/completions", json=body) as response:
            answer = await response.json()
            if response.status == 503:
                assert int(response.headers["Retry-After"]) > 0 and answer["error"]["code"] == 503
            return response.status

    return await asyncio.gather(*map(one, bodies))


async def test_a_flood_is_refused_by_one_bound_and_no_worker_outlives_its_server(tiny_flags: tuple[str, ...]) -> None:
    flags = ("--api-workers", "2", "--max-num-queued-reqs", "4", "--max-num-seqs", "4", "--max-body-memory", "64MiB")
    with running_server(*tiny_flags, *flags) as server:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(server.url, connector=connector) as session:
            found = await statuses(session, [{**SHORT, **NO_END, "max_tokens": 100}] * 150)
            assert set(found) == {200, 503}
            assert found.count(200) >= 4
            state = await until(session, is_idle)
            assert state["requests"]["waiting"] == 0
            metrics = await metrics_of(session)
            assert metrics["vllm:admission_rejections_total/queue_full"] == found.count(503)
            assert metrics["kunserve:body_bytes"] == 0
            assert set(await statuses(session, [SHORT] * 2)) == {200}
            assert (await state_of(session))["requests"]["running"] == 0
        workers = [psutil.Process(pid) for pid in workers_of(server)]
        server.send_signal(signal.SIGKILL)
        assert psutil.wait_procs(workers, timeout=60)[1] == [], "a worker outlives its server"
