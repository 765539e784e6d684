"""The socket before, while and after something is served on it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import subprocess
from pathlib import Path

import aiohttp
import pytest
import uvloop
from aiohttp import web
from own_server import free_port

from kunserve.api.operate.loading import loading_handler
from kunserve.command.listen import RECEIVE_BYTES, Listener
from kunserve.errors import ConfigError


async def hello(_: web.BaseRequest) -> web.StreamResponse:
    return web.Response(text="hello")


async def talk(listener: Listener, client: aiohttp.ClientSession, url: str) -> None:
    """503 while loading, then the real thing, on the same socket."""
    async with listener.answering_with(loading_handler(lambda: ("loading weights", 0.5))):
        for path in ("/health", "/ready", "/v1/models"):
            async with client.get(url + path) as response:
                assert response.status == 503
                assert response.headers["Retry-After"] == "5"
                assert response.headers["Connection"] == "close"  # it may have been taken in the last moment
                assert "loading" in (await response.json())["error"]["message"]
    waiting = asyncio.ensure_future(client.get(url))  # nobody answers yet, nobody refuses
    runner = web.ServerRunner(web.Server(hello))
    await runner.setup()
    await listener.serve(runner)
    async with await waiting as response:
        assert await response.text() == "hello"
    await runner.cleanup()
    listener.close()
    with pytest.raises(aiohttp.ClientConnectionError):
        await client.get(url)


async def test_tcp() -> None:
    port = free_port()
    listener = Listener("127.0.0.1", port, None, None)
    assert listener.url == f"http://127.0.0.1:{port}"
    async with aiohttp.ClientSession() as client:
        await talk(listener, client, listener.url)


@pytest.mark.parametrize("num_rounds", range(6))
def test_who_connects_as_loading_ends_and_says_nothing_does_not_hold_it_up(num_rounds: int) -> None:
    async def connect_and_end() -> None:
        with socket.socket() as client, contextlib.closing(Listener("127.0.0.1", port, None, None)) as listener:
            async with asyncio.timeout(60), listener.answering_with(loading_handler(lambda: ("loading weights", 1.0))):
                client.connect(("127.0.0.1", port))  # at once: the kernel answers
                for _ in range(num_rounds):  # of the loop, which takes it, makes it known, waits for what it asks
                    await asyncio.sleep(0)

    port = free_port()
    uvloop.run(connect_and_end())


async def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    listener = Listener("127.0.0.1", 1, path, None)
    with pytest.raises(ConfigError, match=r"cannot listen on .*server\.sock"):
        Listener("127.0.0.1", 1, path, None)
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as client:
        await talk(listener, client, "http://localhost")
    assert not path.exists()


def test_what_a_dead_server_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    Listener("127.0.0.1", 1, path, None).close()
    path.write_text("precious")
    with pytest.raises(ConfigError, match="cannot listen on"):
        Listener("127.0.0.1", 1, path, None)
    assert path.read_text() == "precious"


async def test_tls(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    listener = Listener("127.0.0.1", free_port(), None, context)
    assert listener.url.startswith("https://")
    trust = ssl.create_default_context(cafile=str(certificate))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as client:
        await talk(listener, client, listener.url)


def test_addresses_that_cannot_be() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            Listener("127.0.0.1", port, None, None)
    with pytest.raises(ConfigError, match="cannot listen on no such host"):
        Listener("no such host", 1, None, None)


async def test_the_kernel_keeps_little_of_what_nobody_has_read() -> None:
    port = free_port()
    listener = Listener("127.0.0.1", port, None, None)
    sizes = asyncio.Queue[int]()

    async def look(request: web.BaseRequest) -> web.StreamResponse:
        assert request.transport is not None
        sizes.put_nowait(request.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
        return web.Response()

    runner = web.ServerRunner(web.Server(look))
    await runner.setup()
    await listener.serve(runner)
    async with aiohttp.ClientSession() as client, client.get(listener.url):
        assert await sizes.get() <= 2 * RECEIVE_BYTES
    await runner.cleanup()
    listener.close()
