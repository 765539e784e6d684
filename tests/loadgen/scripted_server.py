"""A server for the load generator's tests: what it answers is written in the test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer


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


@asynccontextmanager
async def scripted_server() -> AsyncIterator[ScriptedServer]:
    scripted = ScriptedServer()
    await scripted.server.start_server()
    try:
        yield scripted
    finally:
        await scripted.server.close()


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
