"""A client of a front (`kunserve.ray.front`) as an ASGI server shows it one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import orjson

from kunserve.ray.front import Front


@dataclass
class Told:
    status: int = 0
    body: bytes = b""


async def ask(front: Front, path: str, body: Any, method: str = "POST", stay: asyncio.Event | None = None) -> Told:
    """What a client is told."""
    told, messages = Told(), [{"type": "http.request", "body": orjson.dumps(body), "more_body": False}]

    async def receive() -> Any:
        if not messages:
            await (stay or asyncio.Event()).wait()
            return {"type": "http.disconnect"}
        return messages.pop()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert not told.status, "an answer began twice"
            told.status = message["status"]
        else:
            told.body += message["body"]

    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [], "root_path": ""}
    await front(scope, receive, send)
    return told
