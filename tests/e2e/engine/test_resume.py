"""A stream that is taken up by another server says what it would have said undisturbed, from wherever it broke off."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import ClientSession, web
from api_fakes import error_of
from own_server import free_port

from e2e.engines import assert_idle
from e2e.tiny import TinyModels
from kunserve.command.arguments import ServerConfig, parse_args
from kunserve.command.listen import Listener
from kunserve.command.serving import application_of
from kunserve.command.workers import Workers
from kunserve.engine.engine import Engine
from kunserve.engine.launch.launch import Served, launch

FRONT = {"X-KunServe-Front": "front", "X-KunServe-Seed": "17", "X-KunServe-Created": "1234", "X-Request-ID": "r1"}
STEP = 1 if os.environ.get("KUNSERVE_ALL_MODELS") else 16  # a stream is broken off at every so-manieth token
COMPLETIONS, CHAT, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/messages"
HI = [{"role": "user", "content": "hi"}]
DAYS = {"type": "object", "properties": {"days": {"type": "integer"}, "why": {"enum": ["a", "bc"]}}}
DAYS |= {"required": ["days", "why"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": DAYS}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "days", "schema": DAYS}}
THOUGHTS = {"structured_outputs": {"regex": "<think>[a-z]{4,9}</think>[a-z ]{6,12}"}}
USAGE = {"stream_options": {"include_usage": True}}
CALL = r'[a-z]{2,5}<tool_call>\{"name": "f", "arguments": \{"days": [0-9]{2,5}, "why": "a"\}\}</tool_call>'
HOT = {"temperature": 1.3, "max_tokens": 40}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (COMPLETIONS, {"prompt": "the quick", "temperature": 0, "max_tokens": 25, "ignore_eos": True, **USAGE}),
    "seeded, with log-probabilities": (COMPLETIONS, {"prompt": "fox", **HOT, "seed": 3, "logprobs": 2, "echo": True}),
    "penalties": (COMPLETIONS, {"prompt": "fox", **HOT, "repetition_penalty": 1.4, "bad_words": ["e"]}),
    "several choices": (COMPLETIONS, {"prompt": ["dog", "the"], **HOT, "max_tokens": 12, "n": 2, **USAGE}),
    "chat": (CHAT, {"messages": HI, **HOT, "logprobs": True, "top_logprobs": 1, **USAGE}),
    "schema": (CHAT, {"messages": HI, **HOT, "response_format": SCHEMA, "return_token_ids": True}),
    "reasoning": (CHAT, {"messages": HI, **HOT, **THOUGHTS, **USAGE}),
    "forced calls": (CHAT, {"messages": HI, **HOT, "tools": [TOOL], "tool_choice": "required"}),
    "calls": (CHAT, {"messages": HI, "max_tokens": 99, "tools": [TOOL], "structured_outputs": {"regex": CALL}}),
    "messages": (MESSAGES, {"messages": HI, **HOT, **THOUGHTS}),
}


@asynccontextmanager
async def launched(folder: Path, num_workers: int = 0) -> AsyncIterator[tuple[ServerConfig, Served]]:
    """An engine that runs, as its command line makes it."""
    flags = (str(folder), "--devices", "cpu:1", "--num-gpu-blocks-override", "64")
    formats = ("--tool-call-parser", "hermes", "--reasoning-parser", "deepseek_r1")
    process = ("--served-model-name", "tiny", "--front-key", "front", "--disable-access-log")
    listen = ("--api-workers", str(num_workers), "--port", str(free_port()))
    config = parse_args([*flags, *formats, *process, *listen])
    served = await launch(config.engine, "tiny", lambda text, share: None)
    await served.engine.start()
    try:
        yield config, served
    finally:
        await served.engine.stop()
        await served.close()


@asynccontextmanager
async def app_serving(folder: Path) -> AsyncIterator[tuple[web.Application, Engine]]:
    """A server's application in this process."""
    async with launched(folder) as (config, served):
        app, _ = application_of(config, served, None)
        yield app, served.engine


@asynccontextmanager
async def serving(folder: Path, num_workers: int = 0) -> AsyncIterator[tuple[ClientSession, Engine]]:
    """A server in this process, and a client of it; HTTP may be in others."""
    async with launched(folder, num_workers) as (config, served):
        listener = Listener(config.host, config.port, None, None)
        app, setup = application_of(config, served, None)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        workers = Workers(setup, runner, listener.fileno(), num_workers)
        try:
            await (workers.open() if num_workers else listener.serve(runner))
            async with ClientSession(listener.url) as client:
                yield client, served.engine
        finally:
            await served.engine.stop()
            await workers.close()
            await runner.cleanup()
            listener.close()


GROWING = ("text", "content", "thinking", "arguments", "reasoning", "reasoning_content", "partial_json")
LISTS = ("token_ids", "text_offset", "token_logprobs", "top_logprobs", "tokens", "content")


def told(data: bytes) -> tuple[dict[str, Any], dict[int, list[Any]]]:
    """What a stream says: what grows, by its place, however it is cut into events; all else by choice, in its order."""
    grown: dict[str, Any] = {}
    others: dict[int, list[Any]] = {}

    def rest(value: Any, place: str, name: str = "") -> Any:
        if isinstance(value, dict):
            at = f"{place}/{value.get('index', '')}"
            left = {name: rest(inside, f"{at}/{name}", name) for name, inside in value.items()}
            return {name: inside for name, inside in left.items() if inside not in (None, {})}
        grows = (isinstance(value, str) and name in GROWING) or (isinstance(value, list) and name in LISTS)
        if grows:
            grown[place] = grown[place] + value if place in grown else value
            return None
        if isinstance(value, list):
            return [rest(inside, place) for inside in value]
        return "drawn" if name == "id" and "call" in value else value

    for event in data.decode().split("\n\n"):
        value = event.partition("data: ")[2]
        if value.startswith("{"):
            other = rest(orjson.loads(value), "")
            own = others.setdefault(next((choice["index"] for choice in other.get("choices", ())), -1), [])
            if other not in own:
                own.append(other)
    return grown, others


def units_of(data: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """A front's stream: what is whole together, and its mark; the ending has none."""
    found = re.split(rb": kunserve (.*)\n\n", data)
    return [(found[i], orjson.loads(found[i + 1]) if i + 1 < len(found) else {}) for i in range(0, len(found), 2)]


async def read(client: ClientSession, path: str, body: Any) -> bytes:
    async with client.post(path, json=body, headers=FRONT) as response:
        data = await response.read()
        assert response.status == 200, data
        assert response.headers["X-Request-ID"] == "r1"
        return data


async def resumed(client: ClientSession, path: str, body: Any, marks: Sequence[dict[str, Any]]) -> bytes:
    """The rest of a stream after so many marks."""
    num_choices = len(body.get("prompt", [""])) * body["n"] if "n" in body else 1
    ids: list[list[int]] = [[] for _ in range(num_choices)]
    cached = [0] * num_choices
    for mark in marks:
        ids[mark["choice"]] += mark["token_ids"]
        cached[mark["choice"]] = mark["cached"]
    asked = {"path": path, "body": body, "token_ids": ids, "num_cached_tokens": cached}
    return await read(client, "/kunserve/resume", asked)


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_a_stream_goes_on_from_wherever_it_broke_off(tiny_models: TinyModels, num_workers: int) -> None:
    async with serving(tiny_models.folder("llama"), num_workers) as (client, engine):
        for name, (path, body) in CASES.items():
            body = {"model": "tiny", **body, "stream": True}
            await read(client, path, body)  # so that its prompt is cached: usage tells
            whole = await read(client, path, body)
            *units, (ending, _) = units_of(whole)
            if name == "greedy":  # a stop string in the middle of what it says, across tokens
                middle = "".join(told(whole)[0].values())[-12:-8]
                body["stop"] = [middle]
                whole = await read(client, path, body)
                *units, (ending, _) = units_of(whole)
                assert middle not in "".join(told(whole)[0].values()) and b'"finish_reason":"stop"' in whole
            assert len(units) > 2, name
            for k in [*range(0, len(units), STEP), len(units)]:
                before = b"".join(events for events, _ in units[:k])
                rest = await resumed(client, path, body, [mark for _, mark in units[:k]])
                assert told(before + rest) == told(whole), f"{name}: {k} of {len(units)}"
            assert rest == ending
        await asyncio.sleep(0)
        await assert_idle(engine)


@pytest.mark.parametrize("num_workers", [0, 1])
async def test_who_is_no_front_sees_no_marks_and_resumes_nothing(tiny_models: TinyModels, num_workers: int) -> None:
    body = {"prompt": "fox", "max_tokens": 4, "stream": True, "seed": 1}
    asked = {"path": COMPLETIONS, "body": body, "token_ids": [[5]], "num_cached_tokens": [0]}
    async with serving(tiny_models.folder("llama"), num_workers) as (client, engine):
        for key in ({}, {"X-KunServe-Front": "guessed"}):
            answer = await client.post(COMPLETIONS, json=body, headers=key)
            assert answer.status == 200 and b"kunserve" not in await answer.read()
            assert (await error_of(await client.post("/kunserve/resume", json=asked, headers=key)))["code"] == 401
        for wrong, param in (
            ({"path": "/v1/responses"}, "path"),
            ({"body": {**body, "stream": False}}, "body"),
            ({"token_ids": [[5], [5]]}, "num_cached_tokens"),
            ({"token_ids": [[5], [5]], "num_cached_tokens": [0, 0]}, "token_ids"),
            ({"token_ids": [[400]]}, "token_ids"),
            ({"token_ids": [[5] * 9]}, "token_ids"),
            ({"body": {**body, "structured_outputs": {"regex": "[0-9]{9}"}}, "token_ids": [[70, 71]]}, "token_ids"),
        ):
            response = await client.post("/kunserve/resume", json={**asked, **wrong}, headers=FRONT)
            error = await error_of(response)
            assert (error["code"], error["param"]) == (400, param), error
        await assert_idle(engine)
