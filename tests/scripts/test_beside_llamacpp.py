"""What the comparison with llama.cpp's server makes of streams. The servers are stand-ins."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from beside_llamacpp import ROWS, named_server, run

TOKEN_S = 0.001


class StandIn:
    """A server that answers each prompt with a token every `TOKEN_S`, `missing` fewer than were asked for."""

    def __init__(self, missing: int = 0) -> None:
        self.missing, self.bodies = missing, list[dict[str, Any]]()

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "some-model"}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        response = web.StreamResponse()
        await response.prepare(request)
        num = body["max_tokens"] - self.missing
        for _ in range(num):
            await asyncio.sleep(TOKEN_S)
            await response.write(event({"choices": [{"text": "x", "finish_reason": None}]}))
        await response.write(event({"choices": [{"text": "", "finish_reason": "length"}]}))
        await response.write(event({"choices": [], "usage": {"completion_tokens": num}}) + b"data: [DONE]\n\n")
        return response

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.complete)
        return app


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@pytest.fixture
async def stand_in() -> AsyncIterator[tuple[StandIn, str]]:
    served = StandIn()
    async with TestServer(served.app()) as server:
        yield served, str(server.make_url("")).rstrip("/")


def settings(*servers: tuple[str, str]) -> argparse.Namespace:
    return argparse.Namespace(
        servers=list(servers), rounds=2, prompt=5, tokens=4, streams=3, long_prompt=30, timeout=30.0
    )


async def test_figures_of_each_server(stand_in: tuple[StandIn, str]) -> None:
    _, url = stand_in
    found = await run(settings(("ours", url), ("theirs", url)))
    assert list(found) == ["ours", "theirs"]
    for figures in found.values():
        assert list(figures) == list(ROWS)
        assert 0 < figures["ms_per_token"]["best"] <= figures["ms_per_token"]["median"]
        assert figures["tokens_per_s"]["best"] >= figures["tokens_per_s"]["median"] > 0
        assert figures["prompt_tokens_per_s"]["best"] >= figures["prompt_tokens_per_s"]["median"] > 0


async def test_prompts_are_all_different_and_answers_go_on_to_their_last_token(stand_in: tuple[StandIn, str]) -> None:
    served, url = stand_in
    await run(settings(("ours", url)))
    asked = [body for body in served.bodies if len(body["prompt"]) in (5, 30)]
    assert len(asked) == 2 * (1 + 3 + 1)
    assert len({tuple(body["prompt"]) for body in asked}) == len(asked)
    assert all(body["ignore_eos"] and body["model"] == "some-model" for body in served.bodies)


async def test_an_answer_of_another_length_is_no_figure(stand_in: tuple[StandIn, str]) -> None:
    served, url = stand_in
    served.missing = 1
    with pytest.raises(ValueError, match="ours gave 7 tokens instead of 8"):
        await run(settings(("ours", url)))


@pytest.mark.parametrize("text", ["http://h:1", "=http://h:1", "ours=h:1"])
def test_what_is_no_server(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not NAME=URL"):
        named_server(text)
