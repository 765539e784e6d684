"""One request to a server's Unix socket, and its answer as it comes.

An answer is a great many small pieces, and a general client spends more on each than everything else on its way. Here
the server is known: it is KunServe's own, so that this reads no more of HTTP/1.1 than that writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

Headers = list[tuple[bytes, bytes]]
Head = tuple[int, Headers]  # status and headers of an answer

_READ_BYTES = 1 << 18
_MOST_HEAD_BYTES = 1 << 16
_NO_BODY = frozenset({204, 304})


class Plain:
    """A body of so many bytes, or one that ends with its connection."""

    def __init__(self, num_bytes: int | None) -> None:
        """`num_bytes`: None if nobody has said."""
        self._left = num_bytes
        self.may_end = num_bytes is None  # with the connection

    @property
    def is_over(self) -> bool:
        """Return whether all of it has come."""
        return self._left == 0

    def take(self, data: bytes) -> bytes:
        """Return what the bytes bring of the body."""
        if self._left is not None:
            data = data[: self._left]
            self._left -= len(data)
        return data


class Chunked:
    """A body in chunks, whose bytes come cut anywhere."""

    may_end = False

    def __init__(self) -> None:
        """Begin before the first chunk."""
        self.is_over = False
        self._line = b""  # the beginning of what says how long the next chunk is
        self._left = 0  # bytes of this chunk
        self._skip = 0  # the line break that ends a chunk, before the line of the next

    def take(self, data: bytes) -> bytes:
        """Return what the bytes bring of the body. Raises ConnectionError if they are no chunks."""
        data, self._line = self._line + data, b""
        pieces, at = list[bytes](), 0
        while at < len(data) and not self.is_over:
            if self._left:
                pieces.append(data[at : at + self._left])
                at += len(pieces[-1])
                self._left -= len(pieces[-1])
                continue
            if (end := data.find(b"\r\n", at + self._skip)) < 0:
                self._line = data[at:]
                break
            try:
                self._left = int(data[at + self._skip : end], 16)
            except ValueError:
                raise ConnectionError("the server does not speak HTTP") from None
            at, self._skip, self.is_over = end + 2, 2, self._left == 0
        return b"".join(pieces)


async def answer_of(
    socket: str, method: str, target: str, headers: Sequence[tuple[bytes, bytes]], body: bytes
) -> AsyncGenerator[Head | bytes, None]:
    """Yield status and headers of a server's answer, then the body as it comes. Raises OSError if the server dies.

    `target`: a path, perhaps with a query, quoted. Leaving early closes the connection, and so ends the work for it.
    """
    reader, writer = await asyncio.open_unix_connection(socket, limit=_MOST_HEAD_BYTES)
    try:
        lines = [b"%b: %b\r\n" % header for header in headers]
        own = b"host: kunserve\r\nconnection: close\r\ncontent-length: %d\r\n" % len(body)
        writer.write(b"%b %b HTTP/1.1\r\n%b%b\r\n%b" % (method.encode(), target.encode(), own, b"".join(lines), body))
        status, found = _read_head(await reader.readuntil(b"\r\n\r\n"))
        yield status, found
        content = _content(method, status, dict(found))
        while not content.is_over:
            if data := await reader.read(_READ_BYTES):
                if piece := content.take(data):
                    yield piece
            elif content.may_end:
                return
            else:
                raise ConnectionError("the answer has broken off")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise ConnectionError(f"no answer: {error}") from None
    finally:
        writer.close()


def _read_head(head: bytes) -> Head:
    first, *lines = head[:-4].split(b"\r\n")
    try:
        status = int(first.split(b" ", 2)[1])
    except (IndexError, ValueError):
        raise ConnectionError("the server does not speak HTTP") from None
    pairs = [line.partition(b":") for line in lines]
    return status, [(name.lower(), value.strip()) for name, _, value in pairs]


def _content(method: str, status: int, headers: dict[bytes, bytes]) -> Plain | Chunked:
    if method == "HEAD" or status in _NO_BODY:
        return Plain(0)
    if b"chunked" in headers.get(b"transfer-encoding", b""):
        return Chunked()
    return Plain(int(headers[b"content-length"]) if b"content-length" in headers else None)
