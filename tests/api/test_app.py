from __future__ import annotations

import asyncio
import gzip
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from io import BytesIO

import orjson
import pytest
import uvloop
import yarl
from aiohttp import ClientSession
from api_fakes import Client, FakeEngine, error_of, events_of, say, serving

from kunserve.api.wire.backend import ApiSettings
from kunserve.engine.request import Output, Request

URL = "/v1/completions"

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def raw_post(body: bytes, path: str = URL, length: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    return head.encode() + body


@asynccontextmanager
async def connected(client: Client) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection(client.server.host, client.server.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, as a process that is killed with unread data does."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def check_all_are_aborted(is_stream: bool, outputs: list[Output], with_reset: bool, n: int = 1) -> None:
    """A client goes while the engine has nothing (more) to say: all its requests are aborted."""
    engine = FakeEngine(lambda _: outputs)
    async with serving(engine) as client, connected(client) as (reader, writer):
        body = {"prompt": [1], "stream": is_stream, "n": n, "max_tokens": 8}
        writer.write(raw_post(orjson.dumps(body)))
        submitted = {await engine.submitted.get() for _ in range(n)}
        if is_stream:
            await reader.readuntil(b"\r\n\r\n")  # headers come before any token
        if is_stream and outputs:
            await reader.readuntil(b"data: ")
        if with_reset:
            reset(writer)
        else:
            writer.close()
        assert {await engine.aborted.get() for _ in range(n)} == submitted


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("num_outputs", [0, 2])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_leaves_ends_its_requests(is_stream: bool, num_outputs: int, with_reset: bool) -> None:
    await check_all_are_aborted(is_stream, say("abcd"[:num_outputs], None), with_reset)


async def test_a_client_that_leaves_ends_all_its_choices() -> None:
    await check_all_are_aborted(True, say("ab", None), False, n=3)
    await check_all_are_aborted(False, [], False, n=3)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_on_uvloop(is_stream: bool) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(check_all_are_aborted(is_stream, say("ab", None), False))


async def test_a_client_that_leaves_while_it_sends_its_body() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        async with connected(client) as (_, writer):
            writer.write(raw_post(b'{"prompt', length=100))
            await writer.drain()
        assert (await client.post(URL, json={"prompt": "hi"})).status == 200
    assert len(engine.requests) == 1


async def test_other_streams_go_on() -> None:
    gate = asyncio.Event()
    engine = FakeEngine(lambda r: [*say("a", None), gate, *say("b")] if r.prompt_token_ids == [7] else [])
    async with serving(engine) as client:
        steady = await client.post(URL, json={"prompt": [7], "stream": True})
        async with connected(client) as (_, writer):
            writer.write(raw_post(b'{"prompt": [8], "stream": true}'))
            await engine.submitted.get()
            await engine.submitted.get()
        await client.post(URL, data=b"{")
        await client.post(URL, data=BytesIO(b" " * (9 << 20)))
        assert await engine.aborted.get() == engine.requests[1].request_id
        gate.set()
        assert [event["choices"][0]["text"] for event in await events_of(steady)] == ["a", "b"]


def endless(_: Request) -> Iterator[Output]:
    while True:
        yield Output("x" * 65536, (5,))


async def test_a_client_that_stops_reading_is_cut_off() -> None:
    engine = FakeEngine(endless)
    async with serving(engine, ApiSettings(write_timeout_s=0.05)) as client, connected(client) as (reader, writer):
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(raw_post(b'{"prompt": [7], "stream": true}'))
        assert await engine.aborted.get() == await engine.submitted.get()
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert not (await reader.read()).endswith(b"0\r\n\r\n")  # cut, not ended


async def test_a_client_that_never_finishes_its_headers_is_cut_off() -> None:
    settings = ApiSettings(idle_timeout_s=0.05)
    async with serving(FakeEngine(), settings) as client, connected(client) as (reader, writer):
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        assert await reader.read() == b""


async def test_a_client_that_never_finishes_its_body_gets_an_error() -> None:
    settings = ApiSettings(body_timeout_s=0.05)
    async with serving(FakeEngine(), settings) as client, connected(client) as (reader, writer):
        writer.write(raw_post(b'{"prompt', length=100))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"prompt": NaN}', 400),
        (b'{"prompt": "\xff\xfe"}', 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b"[" * 100_000, 400),
        (b"[]", 400),
        (b'"prompt"', 400),
        (b'{"prompt": 1, "messages": 2, "tokens": "x"}', 400),
    ],
)
async def test_bodies_that_are_no_request(body: bytes, status: int) -> None:
    async with serving(FakeEngine()) as client:
        for url in (URL, "/v1/chat/completions", "/tokenize", "/detokenize"):
            assert (await error_of(await client.post(url, data=body)))["code"] == status


async def test_large_bodies() -> None:
    async def in_pieces() -> AsyncIterator[bytes]:
        for _ in range(9):
            yield b" " * (1 << 20)

    async with serving(FakeEngine()) as client:
        for data in (BytesIO(b" " * 50_000_000), in_pieces()):
            response = await client.post(URL, data=data)
            error = await error_of(response)
            assert (response.status, error["type"]) == (413, "PayloadTooLargeError")
        bomb = gzip.compress(b" " * (50 << 20))
        response = await client.post(URL, data=bomb, headers={"Content-Encoding": "gzip"})
        assert (await error_of(response))["code"] == 400
        assert (await client.get("/health")).status == 200


async def test_unknown_routes_and_methods() -> None:
    async with serving(FakeEngine()) as client:
        error = await error_of(await client.get("/v2/nothing"))
        assert (error["code"], error["type"]) == (404, "NotFoundError")
        response = await client.get(URL)
        assert (await error_of(response))["code"] == 405
        assert response.headers["Allow"] == "POST"
        assert response.headers["X-Request-ID"]


async def test_every_answer_has_the_id_of_its_request() -> None:
    """Whatever comes of it: in one piece, a stream, an error; from whatever route."""
    engine = FakeEngine()
    chat = {"messages": [{"role": "user", "content": "x"}]}
    key = {"Authorization": "Bearer k"}
    async with serving(engine, ApiSettings(api_keys=("k",))) as client:
        for method, path, body, headers, status in (
            ("POST", URL, {"prompt": "x"}, key, 200),
            ("POST", URL, {"prompt": "x", "stream": True}, key, 200),
            ("POST", "/v1/chat/completions", {**chat, "stream": True}, key, 200),
            ("POST", "/v1/responses", {"input": "x", "stream": True}, key, 200),
            ("POST", "/v1/messages", {**chat, "max_tokens": 1, "stream": True}, key, 200),
            ("POST", URL, {"prompt": 5}, key, 400),
            ("POST", URL, {"prompt": "x"}, {}, 401),
            ("GET", "/v1/models", None, key, 200),
            ("GET", "/health", None, {}, 200),
            ("HEAD", "/metrics", None, {}, 200),
        ):
            response = await client.request(method, path, json=body, headers={**headers, "X-Request-Id": "mine"})
            assert (response.status, response.headers["X-Request-ID"]) == (status, "mine"), (method, path)


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"prompt": "x", "n": 0}, 400, "BadRequestError"),
        ({"prompt": "x", "model": "other"}, 404, "NotFoundError"),
        ({"prompt": "x", "n": "one"}, 400, "BadRequestError"),
    ],
)
async def test_errors_are_typed_as_clients_know_them(body: dict[str, object], status: int, kind: str) -> None:
    async with serving(FakeEngine()) as client:
        error = await error_of(await client.post(URL, json=body))
    assert (error["code"], error["type"]) == (status, kind)


@pytest.mark.parametrize("path", [f"{URL}/", f"/{URL}", URL.replace("/", "//"), f"{URL}//"])
async def test_slashes_too_many_lead_to_the_same_route(path: str) -> None:
    async with serving(FakeEngine(), ApiSettings(api_keys=("k",))) as client:
        address, headers = f"http://{client.host}:{client.port}{path}", {"Authorization": "Bearer k"}
        async with ClientSession(headers=headers) as session:
            for _ in range(2):  # on one connection
                async with session.post(yarl.URL(address, encoded=True), json={"prompt": "x"}) as response:
                    assert response.status == 200
                    assert (await response.json())["choices"][0]["text"] == "ok"
        async with ClientSession() as session, session.post(yarl.URL(address, encoded=True), json={}) as response:
            assert response.status == 401


async def test_slashes_do_not_make_a_route() -> None:
    async with serving(FakeEngine()) as client:
        assert (await client.get("/no/such/route/")).status == 404
        assert (await client.get(f"{URL}/")).status == 405
        assert (await client.get("/v1/models/org/tiny/?x=1")).status == 200


@pytest.mark.parametrize("padding", ["", " " * 200_000])
async def test_a_byte_order_mark_is_no_part_of_the_body(padding: str) -> None:
    body = b"\xef\xbb\xbf" + b'{"prompt": "x"}' + padding.encode()
    async with serving(FakeEngine()) as client:
        response = await client.post(URL, data=body, headers={"Content-Type": "application/json"})
        assert response.status == 200, await response.text()
