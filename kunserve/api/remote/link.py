"""One end of the socket between a worker and the engine's process: frames of messages, all of one moment in one."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, Generic, Self, TypeVar, cast

import msgspec
import structlog

log = structlog.get_logger()

Sent = TypeVar("Sent", contravariant=True)
Received = TypeVar("Received")

_HEAD = struct.Struct("=I")  # length of a frame
# Of what is sent and the other end has not read; one that does not read any more is given up.
MOST_UNREAD_BYTES = 256 << 20
_ENCODER = msgspec.msgpack.Encoder()


def framed(data: bytes) -> bytes:
    """Return a frame."""
    return _HEAD.pack(len(data)) + data


def read_frame(connection: socket.socket) -> bytes:
    """Wait for a frame, before there is an event loop. EOFError if the other end is gone."""
    [length] = _HEAD.unpack(_read(connection, _HEAD.size))
    return _read(connection, length)


def _read(connection: socket.socket, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        if not (piece := connection.recv(num_bytes - len(data))):
            raise EOFError
        data += piece
    return bytes(data)


class Link(asyncio.Protocol, Generic[Sent, Received]):
    """Sends messages and takes those that come. Used on one event loop."""

    def __init__(
        self,
        received: Any,
        take: Callable[[Received], None],
        last: Callable[[], Sent | None],
        lost: Callable[[], None],
    ) -> None:
        """Make an end that is not connected yet.

        `received`: the type of a list of messages that come. `take` gets each; what fails there is
        logged. `last` may add one to all that are sent at once. `lost` is called once, when the other end is gone.
        """
        self._decoder = msgspec.msgpack.Decoder(received)
        self._take, self._last, self._lost = take, last, lost
        self._waiting: list[Sent] = []  # to be sent
        self._is_due = False
        self._came = bytearray()
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()

    async def open(self, connection: socket.socket) -> Self:
        """Begin, on a connected socket."""
        connection.setblocking(False)
        await self._loop.create_unix_connection(lambda: self, sock=connection)
        return self

    def close(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._transport.abort()

    def send(self, message: Sent) -> None:
        """Send a message with all others of this moment, once there is a connection; none after it is lost."""
        self._waiting.append(message)
        self.send_soon()

    def send_soon(self) -> None:
        """Send what waits, and what `last` adds, once the loop has done what it is at."""
        if not self._is_due and self._transport is not None:
            self._is_due = True
            self._loop.call_soon(self.send_now)

    def send_now(self) -> None:
        """Send what waits."""
        self._is_due = False
        if self._transport is None:
            return
        if (last := self._last()) is not None:
            self._waiting.append(last)
        messages, self._waiting = self._waiting, []
        if not messages:
            return
        self._transport.write(framed(_ENCODER.encode(messages)))
        if self._transport.get_write_buffer_size() > MOST_UNREAD_BYTES:
            log.error("the other end of a link does not read")
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self.send_soon()

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._transport = None
        self._lost()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._came += data
        begin = 0
        while len(self._came) - begin >= _HEAD.size:
            [length] = _HEAD.unpack_from(self._came, begin)
            end = begin + _HEAD.size + length
            if len(self._came) < end:
                break
            messages = self._decoder.decode(self._came[begin + _HEAD.size : end])
            begin = end
            self._take_all(messages)
        del self._came[:begin]

    def _take_all(self, messages: Sequence[Received]) -> None:
        for message in messages:
            try:
                self._take(message)
            except Exception:  # the others have done nothing wrong
                log.exception("message failed", kind=type(message).__name__)
