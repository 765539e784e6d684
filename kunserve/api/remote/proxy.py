"""What a worker passes on to the engine's process: routes of operators, whose answers are the same from any worker."""

from __future__ import annotations

from functools import partial

import aiohttp
from aiohttp import web
from yarl import URL

from kunserve.api.wire.backend import ApiSettings
from kunserve.api.wire.body_memory import too_large
from kunserve.api.wire.context import REQUEST_ID
from kunserve.api.wire.sse import write_while_read
from kunserve.errors import OverloadedError

# Of one connection, or written again here.
_OWN = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "content-length", "host", "expect"}
    | {"x-request-id", "date", "server"}
)


class Proxy:
    """Passes requests on to the application that answers them, on a Unix socket."""

    def __init__(self, path: str, settings: ApiSettings) -> None:
        """Pass requests on to the socket at `path`."""
        self._path, self._settings = path, settings
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Get ready; on the event loop."""
        connector = aiohttp.UnixConnector(self._path, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)  # a burst answers when it has ended
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)

    async def close(self) -> None:
        """End all that is passed on."""
        if self._session is not None:
            await self._session.close()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a request as the engine's process does."""
        assert self._session is not None
        if (request.content_length or 0) > self._settings.largest_body_bytes:  # nobody would read it to its end
            raise too_large(self._settings.largest_body_bytes)
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _OWN]
        headers.append(("X-Request-ID", request[REQUEST_ID]))
        method = "GET" if request.method == "HEAD" else request.method
        body = request.content if request.can_read_body else None
        url = URL(f"http://engine{request.raw_path}", encoded=True)
        try:
            async with self._session.request(method, url, headers=headers, data=body) as answer:
                return await self._pass_back(request, answer)
        except aiohttp.ClientError:
            raise OverloadedError("The server is stopping.", retry_after_s=5) from None

    async def _pass_back(self, request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        headers = [(name, value) for name, value in answer.headers.items() if name.lower() not in _OWN]
        if answer.content_length is not None:
            return web.Response(status=answer.status, headers=headers, body=await answer.read())
        response = web.StreamResponse(status=answer.status, headers=headers)
        try:
            await response.prepare(request)
            request.writer.send_headers()
            async for piece in answer.content.iter_any():
                await write_while_read(
                    request, partial(response.write, piece), len(piece), self._settings.write_timeout_s
                )
            await write_while_read(request, response.write_eof, 0, self._settings.write_timeout_s)
        except ConnectionError:
            pass  # viewers come and go
        return response
