"""The way out: server-sent events, and writes that end when the client stops reading."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web

DONE = b"data: [DONE]\n\n"
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # proxies: pass events on as they come
}


async def write_while_read(
    request: web.BaseRequest, write: Callable[[], Awaitable[None]], num_bytes: int, timeout_s: float
) -> None:
    """Await `write` of so many bytes for as long as the client keeps taking some.

    ConnectionResetError if it is gone, or took none for `timeout_s`: then the connection is cut.
    """
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client is gone")
    unsent = transport.get_write_buffer_size() + num_bytes
    while True:
        try:
            async with asyncio.timeout(timeout_s):
                await write()
            return
        except TimeoutError:
            left = transport.get_write_buffer_size()
            if left >= unsent:
                transport.abort()
                raise ConnectionResetError("the client has stopped reading") from None
            unsent, write = left, request.writer.drain


async def send_response(request: web.Request, response: web.StreamResponse, timeout_s: float) -> None:
    """Send a whole response, so that a client that does not read it cannot hold on to it."""

    async def send() -> None:
        await response.prepare(request)
        await response.write_eof()

    num_bytes = response.content_length or 0
    await write_while_read(request, send, num_bytes, timeout_s)


class EventStream:
    """One answer as events. All methods raise ConnectionResetError once the client is gone or stopped reading."""

    __slots__ = ("_is_chunked", "_request", "_timeout_s", "_transport", "response")

    def __init__(self, request: web.Request, timeout_s: float) -> None:
        self._request = request
        self._transport: asyncio.Transport | None = None  # once the headers are out
        self._is_chunked = False
        self._timeout_s = timeout_s
        self.response = web.StreamResponse(headers=_HEADERS)

    async def open(self) -> None:
        """Send the headers, before there is anything to say."""
        await self.response.prepare(self._request)
        self._request.writer.send_headers()
        self._is_chunked = hdrs.TRANSFER_ENCODING in self.response.headers
        self._transport = self._request.transport

    @property
    def is_free(self) -> bool:
        """Return whether nothing waits to be sent to a client that is there: then `send_now` may be called."""
        transport = self._transport
        return transport is not None and not (transport.get_write_buffer_size() or transport.is_closing())

    def send_now(self, events: bytes) -> None:
        """Send complete events, few of them, without waiting; the headers are out, and `is_free` has said so."""
        assert self._transport is not None
        self._transport.write(b"%x\r\n%b\r\n" % (len(events), events) if self._is_chunked else events)

    async def send(self, events: bytes) -> None:
        """Send one or more complete events."""
        await write_while_read(self._request, lambda: self.response.write(events), len(events), self._timeout_s)

    async def close(self) -> None:
        """Send the end of the response."""
        await write_while_read(self._request, self.response.write_eof, 0, self._timeout_s)
