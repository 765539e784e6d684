from __future__ import annotations

import asyncio
from typing import Any

import pytest
from api_fakes import FakeEngine, error_of, say, serving

from kunserve.api.wire.backend import ApiSettings
from kunserve.errors import EngineError, OverloadedError

URL = "/kunserve/burst"
ADMIN = ApiSettings(admin_keys=("root",), api_keys=("user",))
HEADERS = {"Authorization": "Bearer root"}
BURST: dict[str, Any] = {"requests": 5, "rate": 1000, "prompt_tokens": 7, "output_tokens": 2}


async def test_a_burst_runs_as_it_was_asked() -> None:
    engine = FakeEngine()
    async with serving(engine, ADMIN) as client:
        answer = await (await client.post(URL, json=BURST, headers=HEADERS)).json()
        assert answer.pop("seconds") >= 0
        assert answer == {"completed": 5, "refused": 0, "failed": 0}
        assert len(engine.requests) == 5
        prompts = [request.prompt_token_ids for request in engine.requests]
        assert {len(prompt) for prompt in prompts} == {7} and len(set(map(tuple, prompts))) == 5
        assert {(r.params.max_tokens, r.params.ignore_eos) for r in engine.requests} == {(2, True)}


async def test_only_admins_may_and_one_at_a_time() -> None:
    engine = FakeEngine(lambda _: [asyncio.Event()])
    async with serving(engine, ADMIN) as client:
        for headers in ({}, {"Authorization": "Bearer user"}):
            assert (await error_of(await client.post(URL, json=BURST, headers=headers)))["code"] == 401
        assert engine.requests == []
        first = asyncio.create_task(client.post(URL, json=BURST, headers=HEADERS))
        await engine.submitted.get()
        assert (await error_of(await client.post(URL, json=BURST, headers=HEADERS)))["code"] == 409
        first.cancel()
    async with serving(FakeEngine()) as client:
        assert (await error_of(await client.post(URL, json=BURST, headers=HEADERS)))["code"] == 403


async def test_whoever_asked_ends_it_by_leaving() -> None:
    engine = FakeEngine(lambda _: say("a", None))
    async with serving(engine, ADMIN) as client:
        asked = asyncio.create_task(client.post(URL, json={**BURST, "rate": 0.01}, headers=HEADERS))
        sent = await engine.submitted.get()
        asked.cancel()
        assert await engine.aborted.get() == sent
        engine.script = lambda _: say("ok")
        assert (await client.post(URL, json=BURST, headers=HEADERS)).status == 200  # the next one may come
        assert len(engine.requests) == 6  # the rest of the first was never sent


@pytest.mark.parametrize(("error", "counted"), [(OverloadedError("full"), "refused"), (EngineError("no"), "failed")])
async def test_what_is_refused_or_fails_is_counted(error: OverloadedError, counted: str) -> None:
    engine = FakeEngine(lambda _: [error])
    async with serving(engine, ADMIN) as client:
        answer = await (await client.post(URL, json=BURST, headers=HEADERS)).json()
        assert answer[counted] == 5 and answer["completed"] == 0


async def test_a_burst_waits_in_the_queue_like_everybody() -> None:
    full = ApiSettings(admin_keys=("root",), max_num_queued_reqs=3)  # and three wait already (api_fakes.STATS)
    engine = FakeEngine()
    async with serving(engine, full) as client:
        answer = await (await client.post(URL, json=BURST, headers=HEADERS)).json()
        assert answer["refused"] == 5 and engine.requests == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("requests", 0), ("requests", 1001), ("rate", 0), ("prompt_tokens", 64), ("output_tokens", 58), ("rate", "x")],
)
async def test_what_cannot_be_is_refused(name: str, value: object) -> None:
    async with serving(FakeEngine(), ADMIN) as client:
        response = await client.post(URL, json={**BURST, name: value}, headers=HEADERS)
        assert (await error_of(response))["param"] == name
