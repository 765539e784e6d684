"""One request to a server's Unix socket, and its answer as it comes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import aiohttp
from multidict import CIMultiDict
from yarl import URL

Headers = list[tuple[bytes, bytes]]
Head = tuple[int, Headers]  # status and headers of an answer

_SERVER = "http://kunserve"
_OWN_HEADERS = (
    "Accept",
    "Accept-Encoding",
    "Content-Type",
    "User-Agent",
)  # that a client would add: they are not asked for
_FOR_EVER = aiohttp.ClientTimeout(total=None, sock_connect=None)  # whether a server is alive, its replica says


async def answer_of(
    socket: str, method: str, target: str, headers: Sequence[tuple[bytes, bytes]], body: bytes
) -> AsyncGenerator[Head | bytes, None]:
    """Yield status and headers of a server's answer, then the body as it comes. Raises OSError if the server dies.

    `target`: a path, perhaps with a query, quoted. Leaving early closes the connection, and so ends the work for it.
    """
    asked = CIMultiDict((name.decode("latin-1"), value.decode("latin-1")) for name, value in headers)
    url = URL(_SERVER + target, encoded=True)
    try:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(socket, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=_OWN_HEADERS,
                auto_decompress=False,
                timeout=_FOR_EVER,
            ) as session,
            session.request(method, url, headers=asked, data=body, allow_redirects=False) as response,
        ):
            yield response.status, [(name.lower(), value) for name, value in response.raw_headers]
            async for piece in response.content.iter_any():
                yield piece
    except aiohttp.ClientError as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from None
