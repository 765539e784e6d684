"""A replica's promise to a front on its machine: while the front holds on to it, its request counts as running.

The front then speaks to the server's socket itself: each token would otherwise pass through two processes of Ray more,
which costs more than the token where models are small. A lease is a connection to a socket of the replica, so that it
ends with the front, whatever ends that.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Lease:
    """Where a front takes up what it was promised, and where the server is."""

    socket: str
    number: int
    server: str

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Hold on to it inside. Raises OSError if the replica is gone."""
        _, writer = await asyncio.open_unix_connection(self.socket)
        try:
            writer.write(b"%d\n" % self.number)
            yield
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class Leases:
    """The leases that one replica has given."""

    TAKE_UP_S = 30.0  # that a front has: one that dies before is waited for no longer

    def __init__(self, socket: Path, server: Path) -> None:
        """Begin with no lease. `socket`: to listen on. `server`: the socket where fronts go."""
        self._socket, self._server = socket, server
        self._numbers = itertools.count()
        self._ends: dict[int, asyncio.Future[None]] = {}
        self._taken_up: set[int] = set()

    async def open(self) -> None:
        """Listen."""
        self._listening = await asyncio.start_unix_server(self._hold, str(self._socket))

    async def close(self) -> None:
        """Listen no more."""
        self._listening.close()

    async def give(self) -> AsyncIterator[Lease]:
        """Yield a lease, and return when the front has let go of it."""
        number, loop = next(self._numbers), asyncio.get_running_loop()
        end = self._ends[number] = loop.create_future()
        try:
            yield Lease(str(self._socket), number, str(self._server))
            await asyncio.wait([end], timeout=self.TAKE_UP_S)
            if number in self._taken_up:
                await end
        finally:
            self._taken_up.discard(number)
            del self._ends[number]

    async def _hold(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        end: asyncio.Future[None] | None = None
        try:
            number = int(await reader.readline())
            if (end := self._ends.get(number)) is not None:
                self._taken_up.add(number)
                await reader.read()  # until the front lets go
        except (ValueError, ConnectionError):
            pass
        finally:
            writer.close()
            if end is not None and not end.done():
                end.set_result(None)
