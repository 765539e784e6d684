"""The server's socket: bound before the model loads, so that a wrong port fails at once and probes get an answer."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from aiohttp import web

from kunserve.errors import ConfigError

BACKLOG = 4096  # connections of a burst that wait to be accepted; beyond, clients try again after a second
# libuv accepts one connection in a round of the loop: while tokens are sent, a burst would wait for seconds.
ACCEPTS_A_ROUND = 8
# What a client has sent and nobody has read yet; the kernel takes twice as much: enough for 6 MB/s over 10 ms. By
# itself it would keep up to six MiB for each connection, and one round of the loop, in which thousands may be read,
# would take up to 256 KB of each before the first body is counted.
RECEIVE_BYTES = 32 << 10
# For answers under way while the model loads, before their connections are cut. Not 0, which is "for ever" to aiohttp:
# one that is taken in the last round of the loop, as browsers open some in advance, hears of no end and may never ask.
LAST_ANSWERS_S = 1.0


class Listener:
    """A listening socket, served by one aiohttp runner after another without a moment of refusal between them."""

    def __init__(self, host: str, port: int, uds: Path | None, ssl_context: ssl.SSLContext | None) -> None:
        """Bind. Raises ConfigError if the address is taken or cannot be."""
        self._uds, self._ssl_context = uds, ssl_context
        scheme = "http" if ssl_context is None else "https"
        self.url = f"unix:{uds}" if uds is not None else f"{scheme}://{host}:{port}"
        try:
            self._socket = _tcp_socket(host, port) if uds is None else _unix_socket(uds)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
            self._socket.listen(BACKLOG)
        except OSError as error:
            where = str(uds) if uds is not None else f"{host}:{port}"
            raise ConfigError(f"cannot listen on {where}: {error.strerror}") from None
        self._socket.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor of the listening socket, for processes that take connections from it, too."""
        return self._socket.fileno()

    async def serve(self, runner: web.BaseRunner) -> None:
        """Let `runner`, which is set up, take connections until it is cleaned up."""
        await take_connections(runner, self._socket, self._ssl_context)

    def close(self) -> None:
        """Refuse connections from now on."""
        self._socket.close()
        if self._uds is not None:
            self._uds.unlink(missing_ok=True)

    @contextlib.asynccontextmanager
    async def answering_with(
        self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
    ) -> AsyncIterator[None]:
        """Let `handler` answer every request inside: while the model loads."""
        runner = web.ServerRunner(web.Server(handler), handle_signals=False, shutdown_timeout=LAST_ANSWERS_S)
        await runner.setup()
        try:
            await self.serve(runner)
            yield
        finally:
            await runner.cleanup()


async def take_connections(
    runner: web.BaseRunner, listening: socket.socket, ssl_context: ssl.SSLContext | None
) -> None:
    """Let `runner` take connections of a socket, which others may do as well, until it is cleaned up."""
    for _ in range(ACCEPTS_A_ROUND):
        await web.SockSite(runner, listening.dup(), ssl_context=ssl_context, backlog=BACKLOG).start()


def _tcp_socket(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def _unix_socket(path: Path) -> socket.socket:
    """Return a socket at `path`; one that an earlier server left behind is replaced, any other file is not."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists():
            if not stat.S_ISSOCK(path.stat().st_mode) or _is_served(path):
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            path.unlink()
        sock.bind(str(path))
    except OSError:
        sock.close()
        raise
    return sock


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0
