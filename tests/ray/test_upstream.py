"""What a front reads of a server's answer, however its bytes are cut and wherever they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest
from aiohttp import web

from kunserve.ray.front import Front
from kunserve.ray.upstream import Head, answer_of


@asynccontextmanager
async def server_that_says(folder: Path, *pieces: bytes) -> AsyncIterator[str]:
    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    socket = str(folder / "http")
    async with await asyncio.start_unix_server(say, socket):
        yield socket


async def whole(socket: str, method: str = "GET") -> tuple[Head, bytes]:
    head, *pieces = [part async for part in answer_of(socket, method, "/", [], b"")]
    assert not isinstance(head, bytes)
    return head, b"".join(piece for piece in pieces if isinstance(piece, bytes))


async def test_an_answer_is_whole_or_an_error(tmp_path: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\nX-A:  b\r\nContent-Type: c\r\n"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
    for at in range(9, len(chunked) - 1, 5):
        async with server_that_says(tmp_path, chunked[:9], chunked[9:at], chunked[at:]) as socket:
            (status, headers), body = await whole(socket)
            assert (status, body) == (200, b"ab") and headers[:2] == [(b"x-a", b"b"), (b"content-type", b"c")]
    for answer, body in (
        (b"Content-Length: 2\r\n\r\nab", b"ab"),
        (b"\r\nab", b"ab"),
        (b"Content-Length: 0\r\n\r\n", b""),
    ):
        async with server_that_says(tmp_path, head + answer) as socket:
            assert (await whole(socket))[1] == body
    async with server_that_says(tmp_path, head + b"Content-Length: 2\r\n\r\n") as socket:
        assert (await whole(socket, "HEAD"))[1] == b""
    cut = (b"", head, chunked[:-5], head + b"Content-Length: 3\r\n\r\nab", b"garbage\r\n\r\n", b"a b\r\n\r\n")
    for said in cut:
        async with server_that_says(tmp_path, said) as socket:
            with pytest.raises(OSError):
                await whole(socket)
    with pytest.raises(OSError):
        await whole(str(tmp_path / "nobody"))


async def test_a_path_arrives_as_it_was_asked_for(tmp_path: Path) -> None:
    """What comes to a front is decoded: a line break in it would begin a header of the client's choice."""

    async def echo(request: web.Request) -> web.Response:
        return web.json_response(
            [request.path, request.rel_url.raw_query_string, sorted(request.headers), await request.text()]
        )

    class OneServer:
        async def answer(self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes):  # type: ignore[no-untyped-def]
            async for part in answer_of(str(tmp_path / "http"), method, path, headers, body):
                yield part

    app = web.Application()
    app.router.add_route("*", r"/{path:[\s\S]*}", echo)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "http")).start()
    front, said = Front({"tiny": OneServer()}, "key"), b""
    path = "/v1/models/a b\r\nX-Evil: 1\r\n%41ü?"
    scope = {"type": "http", "method": "PUT", "path": path, "query_string": b"a=%20b&c=\xc3", "root_path": ""}
    told = asyncio.Event()

    async def receive() -> dict[str, object]:
        if told.is_set():
            await asyncio.Event().wait()
        told.set()
        return {"type": "http.request", "body": b"body"}

    async def send(message) -> None:  # type: ignore[no-untyped-def]
        nonlocal said
        said += message.get("body", b"")

    await front({**scope, "headers": [(b"accept", b"x")]}, receive, send)
    await runner.cleanup()
    asked, query, headers, body = orjson.loads(said)
    assert (asked, query, body) == (path, "a=%20b&c=%C3", "body") and "X-Evil" not in headers and "Accept" in headers
