from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web
from api_fakes import FakeEngine, error_of, serving
from structlog.testing import capture_logs

from kunserve.api.wire.access import ADMIN_PATHS, is_admin_path, needs_key
from kunserve.api.wire.backend import ApiSettings

KEYS = ApiSettings(api_keys=("first", "second"), admin_keys=("root",))
BODY = {"prompt": "hi"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer firs"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "Basic first"}, 401),
        ({"Authorization": "Bearer \udcff\udcfe"}, 401),
        ({"Authorization": "Bearer root"}, 401),
        ({"x-api-key": "wrong"}, 401),
        ({"Authorization": "Bearer first"}, 200),
        ({"Authorization": "bearer second"}, 200),
        ({"x-api-key": "second"}, 200),
    ],
)
async def test_keys(headers: dict[str, str], status: int) -> None:
    engine = FakeEngine()
    async with serving(engine, KEYS) as client:
        response = await client.post("/v1/completions", json=BODY, headers=headers)
        assert response.status == status
        if status == 401:
            assert (await error_of(response))["type"] == "AuthenticationError"
    assert len(engine.requests) == (status == 200)


async def owners(settings: ApiSettings, *requests: tuple[str, str, Any]) -> list[str]:
    """Of requests by (key, path, body)."""
    engine = FakeEngine()
    async with serving(engine, settings) as client:
        for key, path, body in requests:
            response = await client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})
            assert response.status == 200, await response.text()
    return [request.owner for request in engine.requests]


async def test_keys_share_the_queue() -> None:
    """Whatever users they name."""
    body = {"prompt": "x", "user": "u"}
    requests = [(key, "/v1/completions", body) for key in ("first", "second", "first")]
    first, second, again = await owners(KEYS, *requests)
    assert first == again != second and "first" not in first


async def test_users_share_the_queue_where_there_is_one_key() -> None:
    message = [{"role": "user", "content": "x"}]
    named = [
        ("k", "/v1/completions", {"prompt": "x", "user": "u"}),
        ("k", "/v1/chat/completions", {"messages": message, "user": "w", "safety_identifier": "u"}),
        ("k", "/v1/responses", {"input": "x", "user": "u"}),
        ("k", "/v1/messages", {"messages": message, "max_tokens": 1, "metadata": {"user_id": "u"}}),
    ]
    assert await owners(ApiSettings(api_keys=("k",)), *named, ("k", "/v1/completions", {"prompt": "x"})) == [
        *"uuuu",
        "",
    ]


@pytest.mark.parametrize(("uses_priority", "expected"), [(True, -3), (False, 0)])
async def test_priorities_count_if_the_server_says_so(uses_priority: bool, expected: int) -> None:
    engine = FakeEngine()
    async with serving(engine, ApiSettings(uses_priority=uses_priority)) as client:
        await client.post("/v1/completions", json={"prompt": "x", "priority": -3})
    assert engine.requests[0].priority == expected


async def test_every_route_is_guarded_but_those_of_probes() -> None:
    async with serving(FakeEngine(), KEYS) as client:
        application = client.app
        assert isinstance(application, web.Application)
        checked = is_open = 0
        for route in application.router.routes():
            path = route.resource.canonical if route.resource else ""
            path = path.replace("{name}", "tiny").replace("{index}", "0")
            response = await client.request(route.method, path)
            assert (response.status == 401) is (needs_key(path) or is_admin_path(path)), path
            is_open += response.status != 401
            checked += 1
        assert checked > 15 and is_open < 24  # probes and the page, with HEAD
        for path in ("/v1/responses/x", "/version", "/kunserve/state", "/v1/models", "/tokenize"):
            assert needs_key(path), path
        assert [needs_key(path) for path in ("/health", "/ping", "/ready", "/metrics", "/openapi.json")] == [False] * 5
        assert (await client.get("/no/such/route")).status == 401
        for path in (*ADMIN_PATHS, "/kunserve/devices/0/remove", "/kunserve/devices/0/add"):
            assert (await client.post(path, headers={"Authorization": "Bearer first"})).status == 401


async def test_without_keys_everybody_may_come_in() -> None:
    async with serving(FakeEngine()) as client:
        assert (await client.get("/v1/models")).status == 200


ORIGIN = {"Origin": "https://a.example"}
PREFLIGHT = {**ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


@pytest.mark.parametrize(
    ("allowed", "seen"),
    [
        ((), None),
        (("*",), "*"),
        (("https://a.example", "https://b.example"), "https://a.example"),
        (("https://b.example",), None),
    ],
)
async def test_origins(allowed: tuple[str, ...], seen: str | None) -> None:
    settings = ApiSettings(api_keys=("k",), allowed_origins=allowed)
    async with serving(FakeEngine(), settings) as client:
        asked = await client.options("/v1/completions", headers=PREFLIGHT)
        assert asked.status == (204 if allowed else 401)
        streamed = await client.post(
            "/v1/completions", json={**BODY, "stream": True}, headers={**ORIGIN, "Authorization": "Bearer k"}
        )
        for response in (asked, streamed, await client.get("/v1/models", headers=ORIGIN)):
            assert response.headers.get("Access-Control-Allow-Origin") == seen
        if seen:
            assert asked.headers["Access-Control-Allow-Methods"] == "POST"
            assert asked.headers["Access-Control-Allow-Headers"] == "authorization"
        plain = await client.get("/health")
        assert "Access-Control-Allow-Origin" not in plain.headers


async def test_access_log() -> None:
    with capture_logs() as lines:
        async with serving(FakeEngine()) as client:
            await client.post("/v1/completions", json=BODY, headers={"X-Request-ID": "mine"})
            await client.get("/nothing")
            await client.get("/metrics")
    seen = [(line["log_level"], line["method"], line["path"], line["status"]) for line in lines]
    assert seen == [
        ("info", "POST", "/v1/completions", 200),
        ("info", "GET", "/nothing", 404),
        ("debug", "GET", "/metrics", 200),
    ]
    assert lines[0]["request_id"] == "mine" and lines[0]["seconds"] >= 0
    with capture_logs() as lines:
        async with serving(FakeEngine(), ApiSettings(logs_access=False)) as client:
            await client.get("/nothing")
    assert lines == []
