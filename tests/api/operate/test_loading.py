"""What is answered while the model loads."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer, TestClient
from api_fakes import error_of

from kunserve.api.operate.loading import loading_handler
from kunserve.api.operate.page import page_files

Client = TestClient[web.BaseRequest, None]


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    client: Client = TestClient(RawTestServer(loading_handler(lambda: ("loading weights", 0.43217))))
    async with client:
        yield client


@pytest.mark.parametrize("accept", ["*/*", "text/html"])
async def test_who_opens_the_page_gets_it_though_the_server_is_not_ready(client: Client, accept: str) -> None:
    response = await client.get("/", headers={"Accept": accept})
    assert (response.status, response.headers["Retry-After"]) == (503, "5")  # a balancer must not take it for ready
    assert await response.text() == page_files()["index.html"]
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
    for name, text in page_files().items():
        response = await client.get(f"/page/{name}")
        assert (response.status, await response.text()) == (200, text)
        assert response.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")


async def test_the_page_learns_what_is_being_done(client: Client) -> None:
    response = await client.get("/kunserve/loading")
    assert response.status == 200 and response.headers["Cache-Control"] == "no-store"
    assert await response.json() == {"text": "loading weights", "share": 0.4322}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/health"),
        ("GET", "/ready"),
        ("GET", "/v1/models"),
        ("GET", "/page/none.js"),
        ("GET", "/page"),
        ("GET", "/main.js"),
        ("GET", "/kunserve/events"),
        ("POST", "/"),
        ("POST", "/kunserve/loading"),
        ("POST", "/v1/chat/completions"),
    ],
)
async def test_everything_else_is_told_to_come_back(client: Client, method: str, path: str) -> None:
    response = await client.request(method, path)
    assert (response.status, response.headers["Retry-After"]) == (503, "5")
    assert (await error_of(response))["message"] == "The server is loading its model."
