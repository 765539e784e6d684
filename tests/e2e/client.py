"""Plain HTTP to a server process: JSON, events, and the state to wait for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
from prometheus_client.parser import text_string_to_metric_families

from e2e.server_process import POLL_S, ServerProcess

WAIT_S = 60.0

Json = dict[str, Any]


@asynccontextmanager
async def session_of(server: ServerProcess) -> AsyncIterator[aiohttp.ClientSession]:
    """A session with as many connections as it takes."""
    async with aiohttp.ClientSession(server.url, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


async def post(session: aiohttp.ClientSession, path: str, body: Json) -> Json:
    """The JSON answer, which must be a 200."""
    async with session.post(path, json=body) as response:
        answer: Json = await response.json()
        assert response.status == 200, answer
        return answer


async def events_of(response: aiohttp.ClientResponse) -> AsyncIterator[Json]:
    """Events of a stream as they come; asserts that it ends with [DONE]."""
    assert response.status == 200 and response.headers["Content-Type"].startswith("text/event-stream")
    data = b""
    async for line in response.content:
        if line == b"\n":
            continue
        assert line.startswith(b"data: ") and line.endswith(b"\n"), line
        data = line[6:-1]
        if data != b"[DONE]":
            yield orjson.loads(data)
    assert data == b"[DONE]", "the stream was cut"


async def stream_tokens(session: aiohttp.ClientSession, body: Json) -> list[int]:
    """Token ids of a streamed completion with one choice."""
    async with session.post("/v1/completions", json={**body, "stream": True, "return_token_ids": True}) as response:
        events = [event async for event in events_of(response)]
    choices = [choice for event in events for choice in event["choices"]]
    assert choices[-1]["finish_reason"] is not None
    return [token_id for choice in choices for token_id in choice["token_ids"]]


async def state_of(session: aiohttp.ClientSession) -> Json:
    """GET /kunserve/state."""
    async with session.get("/kunserve/state") as response:
        assert response.status == 200
        state: Json = await response.json()
        return state


async def metrics_of(session: aiohttp.ClientSession) -> dict[str, float]:
    """Samples of GET /metrics by name; of those with further labels, by name and their values."""
    async with session.get("/metrics") as response:
        families = text_string_to_metric_families(await response.text())
        samples = [sample for family in families for sample in family.samples]
    common = ("model_name", "engine")
    return {
        "/".join([s.name, *(value for label, value in s.labels.items() if label not in common)]): s.value
        for s in samples
    }


async def until(session: aiohttp.ClientSession, is_reached: Callable[[Json], bool]) -> Json:
    """The first state for which `is_reached`; TimeoutError, with the last one, if it never comes."""
    deadline = time.monotonic() + WAIT_S
    while not is_reached(state := await state_of(session)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"still {state}")
        await asyncio.sleep(POLL_S)
    return state


def is_idle(state: Json) -> bool:
    """Nothing runs or waits, no step is in flight and every block is free."""
    requests, groups = state["requests"], state["groups"]
    return requests["running"] == requests["waiting"] == 0 and all(
        group["running"] == group["microbatches_in_flight"] == group["blocks"]["used"] == 0 for group in groups
    )
