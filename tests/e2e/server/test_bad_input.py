"""Whatever comes in: the right status in OpenAI's shape, or the connection is cut; and other streams do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
import pytest
from tiny_models import VOCAB_SIZE

from e2e.client import Json, is_idle, session_of, stream_tokens, until
from e2e.server_process import ServerProcess, running_server
from e2e.tiny import random_prompt

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BYSTANDER: Json = {"prompt": random_prompt(50), "seed": 1, "max_tokens": 200, "ignore_eos": True}
PATIENCE_S = 0.5
MIB = 1 << 20

TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    413: "PayloadTooLargeError",
}


@pytest.fixture(scope="module")
def impatient_session_server(tiny_flags: tuple[str, ...]) -> Iterator[ServerProcess]:
    """Cuts off clients that read or write nothing after half a second instead of half a minute or more."""
    bounds = dict.fromkeys(("write_timeout_s", "body_timeout_s", "idle_timeout_s"), PATIENCE_S)
    with running_server(*tiny_flags, api_settings=bounds) as server:
        yield server


@pytest.fixture
def impatient_server(impatient_session_server: ServerProcess) -> Iterator[ServerProcess]:
    with impatient_session_server.log_shown():
        yield impatient_session_server


@asynccontextmanager
async def bystander(server: ServerProcess) -> AsyncIterator[aiohttp.ClientSession]:
    """A session; meanwhile somebody else streams, again and again, and must get the same tokens every time.

    At the end nothing is left of anybody.
    """
    async with session_of(server) as others, session_of(server) as session:
        expected = await stream_tokens(others, BYSTANDER)
        is_over = asyncio.Event()

        async def stream() -> None:
            while True:
                assert await stream_tokens(others, BYSTANDER) == expected
                if is_over.is_set():
                    return

        streaming = asyncio.create_task(stream())
        try:
            await until(session, lambda state: state["requests"]["running"] > 0)
            yield session
        finally:
            is_over.set()
            await streaming
        await until(session, is_idle)


def check_error(status: int, content: bytes, expected_status: int, param: str | None = None) -> str:
    """Assert an error in OpenAI's shape; its message."""
    assert status == expected_status, content
    body = orjson.loads(content)
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error = body["error"]
    assert (error["code"], error["type"]) == (status, TYPES[status])
    assert param is None or error["param"] == param, error
    message: str = error["message"]
    assert message and "\n" not in message and "Traceback" not in message
    return message


BODIES: list[tuple[str, bytes, int]] = [
    (COMPLETIONS, b"", 400),
    (COMPLETIONS, b"{", 400),
    (COMPLETIONS, b'{"prompt": "a",}', 400),
    (COMPLETIONS, b"prompt=a&max_tokens=3", 400),
    (COMPLETIONS, b'{"prompt": "\xff\xfe"}', 400),  # no UTF-8
    (COMPLETIONS, b'{"prompt": "\xed\xa0\x80"}', 400),  # a surrogate in UTF-8
    (COMPLETIONS, b'{"prompt": "\\ud800"}', 400),  # a lone one, escaped
    (COMPLETIONS, b'{"prompt": NaN}', 400),
    (COMPLETIONS, b"[" * 100_000, 400),
    (COMPLETIONS, b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400),
    (COMPLETIONS, b'"prompt"', 400),
    (COMPLETIONS, b"[]", 400),
    (COMPLETIONS, b"null", 400),
    (CHAT, b"\x00\x01\x02", 400),
    ("/tokenize", b"{]", 400),
    ("/detokenize", b"}", 400),
]


async def test_bodies_that_are_no_json_object(tiny_server: ServerProcess) -> None:
    async with bystander(tiny_server) as session:
        for path, body, status in BODIES:
            async with session.post(path, data=body, headers={"Content-Type": "application/json"}) as response:
                check_error(response.status, await response.read(), status)


USER = [{"role": "user", "content": "hi"}]

FIELDS: list[tuple[str, Json, int, str | None]] = [
    (COMPLETIONS, {}, 400, "prompt"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt"),
    (COMPLETIONS, {"prompt": 5}, 400, "prompt"),
    (COMPLETIONS, {"prompt": ["a", 5]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [1.5]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [True]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": {"a": 1}}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [VOCAB_SIZE]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [2**31]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [2**63]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [[5, 6], [5, VOCAB_SIZE]]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [5] * 2048}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [5] * 100_000}, 400, "prompt"),
    (COMPLETIONS, {"prompt": "too long " * 2048}, 400, "prompt"),
    (COMPLETIONS, {"prompt": "x" * (MIB - 100)}, 400, "prompt"),
    (COMPLETIONS, {"prompt": "a", "model": "gpt-4"}, 404, "model"),
    (COMPLETIONS, {"prompt": "a", "model": 7}, 400, "model"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 2**40}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": [5] * 2000, "max_tokens": 49}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": "many"}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "min_tokens": 9, "max_tokens": 8}, 400, "min_tokens"),
    (COMPLETIONS, {"prompt": "a", "n": 0}, 400, "n"),
    (COMPLETIONS, {"prompt": "a", "n": 10**6}, 400, "n"),
    (COMPLETIONS, {"prompt": ["a"] * 5000}, 400, "prompt"),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}, 400, "temperature"),
    (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
    (COMPLETIONS, {"prompt": "a", "top_p": -0.1}, 400, "top_p"),
    (COMPLETIONS, {"prompt": "a", "top_p": 1.1}, 400, "top_p"),
    (COMPLETIONS, {"prompt": "a", "top_k": -2}, 400, "top_k"),
    (COMPLETIONS, {"prompt": "a", "seed": "lucky"}, 400, "seed"),
    (COMPLETIONS, {"prompt": "a", "stop": [""]}, 400, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop": [5]}, 400, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": [VOCAB_SIZE]}, 400, "stop_token_ids"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"999": 1}}, 400, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 10**6}, 400, "logprobs"),
    (COMPLETIONS, {"prompt": "a", "stream": "yes"}, 400, "stream"),
    (COMPLETIONS, {"prompt": "a", "stream_options": []}, 400, "stream_options"),
    (CHAT, {}, 400, "messages"),
    (CHAT, {"messages": "hi"}, 400, "messages"),
    (CHAT, {"messages": [5]}, 400, None),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, None),
    (CHAT, {"messages": [{"content": "no role"}]}, 400, None),
    (CHAT, {"messages": USER, "model": "gpt-4"}, 404, "model"),
    (CHAT, {"messages": USER, "max_completion_tokens": -5}, 400, "max_completion_tokens"),
    (CHAT, {"messages": [{"role": "user", "content": "too long " * 2048}]}, 400, "messages"),
    ("/detokenize", {"tokens": [VOCAB_SIZE]}, 400, "tokens"),
    ("/detokenize", {"tokens": "abc"}, 400, "tokens"),
    ("/tokenize", {"prompt": 5}, 400, "prompt"),
]


async def test_fields_of_the_wrong_type_or_out_of_range(tiny_server: ServerProcess) -> None:
    async with bystander(tiny_server) as session:
        for path, body, status, param in FIELDS:
            for stream in ({}, {"stream": True}) if "stream" not in body else ({},):
                async with session.post(path, json={**body, **stream}) as response:
                    check_error(response.status, await response.read(), status, param)


async def test_routes_and_methods_that_are_not_there(tiny_server: ServerProcess) -> None:
    async with bystander(tiny_server) as session:
        for path in ("/page", "/v1", "/v1/nothing", "/v1/models/gpt-4", "/../../etc/passwd", "/%00"):
            async with session.get(path) as response:
                check_error(response.status, await response.read(), 404)
        async with session.get(COMPLETIONS) as response:
            assert response.status == 405 and response.headers["Allow"] == "POST"
            assert orjson.loads(await response.read())["error"]["code"] == 405


# --- sockets -------------------------------------------------------------------------------------------------------


def head(num_bytes: int | None, path: str = COMPLETIONS, *more: str) -> bytes:
    """Request line and headers of a body of so many bytes; None: in chunks."""
    length = "Transfer-Encoding: chunked" if num_bytes is None else f"Content-Length: {num_bytes}"
    return "\r\n".join((f"POST {path} HTTP/1.1", "Host: localhost", length, *more, "", "")).encode()


@asynccontextmanager
async def connection(server: ServerProcess, **options: Any) -> AsyncIterator[tuple[Any, Any]]:
    """A bare connection: reader and writer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, **options)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of the answer with a length."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    return int(lines[0].split()[1]), await reader.readexactly(int(headers["content-length"]))


async def test_fifty_megabytes(tiny_server: ServerProcess) -> None:
    large = b'{"prompt": "' + b"x" * (50 * MIB) + b'"}'

    async def in_chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(large), MIB):
            yield large[start : start + MIB]

    async with bystander(tiny_server) as session:
        async with session.post(COMPLETIONS, data=io.BytesIO(large)) as response:
            assert "larger than" in check_error(response.status, await response.read(), 413)
        # no length is announced: it is cut off as soon as it is too long, perhaps while it is still being sent
        with contextlib.suppress(aiohttp.ClientConnectionError):
            async with session.post(COMPLETIONS, data=in_chunks()) as response:
                check_error(response.status, await response.read(), 413)
        async with connection(tiny_server) as (reader, writer):  # refused before the first byte of it
            writer.write(head(50 * MIB))
            check_error(*await answer_of(reader), 413)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 20_000 + b"\r\n\r\n",
        head(None) + b"no length\r\n",
    ],
)
async def test_what_is_no_http_is_refused_and_cut(tiny_server: ServerProcess, data: bytes) -> None:
    async with bystander(tiny_server), connection(tiny_server) as (reader, writer):
        writer.write(data)
        assert (await reader.read()).startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))


async def test_headers_without_end_are_cut(tiny_server: ServerProcess) -> None:
    async with bystander(tiny_server), connection(tiny_server) as (reader, writer):
        with contextlib.suppress(ConnectionError):  # TCP drops an answer that overtakes what is still being sent
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * (8 * MIB))
            await writer.drain()
            await reader.read()


async def test_a_body_that_ends_early(tiny_server: ServerProcess) -> None:
    async with bystander(tiny_server), connection(tiny_server) as (reader, writer):
        writer.write(head(1000) + b'{"prompt": "a')
        writer.write_eof()
        assert await reader.read() == b""  # whoever hung up gets nothing


async def test_a_body_that_never_comes(impatient_server: ServerProcess) -> None:
    async with bystander(impatient_server), connection(impatient_server) as (reader, writer):
        writer.write(head(1000) + b'{"prompt": "a')
        assert "took longer than" in check_error(*await answer_of(reader), 400)


@pytest.mark.parametrize("data", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: local"])
async def test_headers_that_never_come(impatient_server: ServerProcess, data: bytes) -> None:
    async with bystander(impatient_server), connection(impatient_server) as (reader, writer):
        writer.write(data)
        assert await reader.read() == b""


async def test_a_client_that_reads_nothing_is_cut(impatient_server: ServerProcess) -> None:
    """Its answer is tens of megabytes: no buffer holds it. Its requests end, it is cut, and nobody else waits."""
    wanted = {"n": 32, "max_tokens": 500, "ignore_eos": True, "logprobs": 20, "stream": True}
    body = orjson.dumps({"prompt": random_prompt(5), **wanted})
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.setblocking(False)
    loop = asyncio.get_running_loop()
    async with bystander(impatient_server) as session:
        with slow:
            await loop.sock_connect(slow, ("127.0.0.1", impatient_server.port))
            await loop.sock_sendall(slow, head(len(body)) + body)
            await until(session, lambda state: state["requests"]["running"] >= 32)
            await until(session, lambda state: state["requests"]["running"] <= 1)  # with nobody having read a byte
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while data := await loop.sock_recv(slow, 1 << 16):
                    received += data
            assert received.startswith(b"HTTP/1.1 200 ") and b"[DONE]" not in received


async def test_requests_of_clients_that_disconnect_in_the_middle_end(tiny_server: ServerProcess) -> None:
    body = orjson.dumps({"prompt": random_prompt(40), "max_tokens": 2000, "ignore_eos": True, "stream": True})
    async with bystander(tiny_server) as session:
        for _ in range(10):
            async with connection(tiny_server) as (reader, writer):
                writer.write(head(len(body)) + body)
                await reader.readuntil(b'"text"')
                writer.transport.abort()  # a reset, not a goodbye
        await until(session, lambda state: state["requests"]["running"] <= 1)
