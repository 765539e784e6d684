"""The ASGI application before the replicas: a body passes to one of them as it came, and its answer comes back.

No client learns that a replica has died. A request whose client has been told nothing is sent to another replica; a
stream goes on in another one from the last token that its client has (POST /kunserve/resume). The seed and the time of
an answer are chosen here, so that it is the same whoever computes it.
"""

from __future__ import annotations

import asyncio
import random
import re
import string
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote

import orjson
import structlog

from kunserve.api.routes.resume import RESUMABLE
from kunserve.api.wire.access import FRONT_CREATED, FRONT_KEY, FRONT_SEED
from kunserve.api.wire.anthropic_errors import PREFIX, error_json
from kunserve.api.wire.backend import ApiSettings
from kunserve.api.wire.errors import error_event, openai_error
from kunserve.api.wire.sse import DONE
from kunserve.errors import KunServeError, OverloadedError, PayloadTooLargeError
from kunserve.ray.broken import Passed, num_choices_of
from kunserve.ray.upstream import Head, Headers

log = structlog.get_logger()

MOST_ATTEMPTS = 6  # without a token more for the client: then the request may be what ends replicas
FIRST_PAUSE_S = 0.2  # doubled with each attempt: in all, the six seconds in which Serve learns of a death
MOST_BODY_BYTES = ApiSettings().max_body_bytes  # servers take no more
_OURS = re.compile(rb"x-kunserve-.*|host|connection|keep-alive|transfer-encoding|te|upgrade|expect|content-length")
_PLAIN = "/:@!$&'()*+,;=~"  # in a path
_HOPS = frozenset({b"connection", b"keep-alive", b"transfer-encoding"})

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


class ReplicaGoneError(Exception):
    """The replica, its server or its answer has come to an end too early."""


class Replicas(Protocol):
    """The replicas of one model."""

    def answer(self, method: str, path: str, headers: Headers, body: bytes) -> AsyncGenerator[Head | bytes, None]:
        """Yield status and headers of one replica's answer, then its body. Raises ReplicaGoneError if it dies."""


@dataclass(slots=True)
class Asked:
    """One request, and what its client has been told."""

    method: str
    path: str  # without the query
    target: str  # with it
    headers: Headers
    body: bytes
    send: Send
    has_begun: bool = False  # its client has a status
    was_refused: bool = False  # once, by a replica that is full or stops
    passed: Passed = field(default_factory=Passed)

    @property
    def may_be_repeated(self) -> bool:
        """Return whether it does no harm twice, if its client has been told nothing: what operators ask for may."""
        return self.method in ("GET", "HEAD") or not self.path.startswith("/kunserve/")

    @property
    def is_resumable(self) -> bool:
        """Return whether another replica can go on with the stream that answers it."""
        return self.method == "POST" and self.path in RESUMABLE

    def attempt(self) -> tuple[str, bytes]:
        """Return the path and body of the next attempt: the request, or the rest of its stream."""
        if not self.passed.num_tokens:
            return self.target, self.body
        body = orjson.loads(self.body)
        return "/kunserve/resume", self.passed.resumption(self.path, body, num_choices_of(body))


class Front:
    """See the module. An ASGI application."""

    def __init__(self, models: Mapping[str, Replicas], key: str) -> None:
        """Serve `models`: replicas by the names that requests give; the first get what names none. `key`: a front's."""
        self._models, self._key = dict(models), key
        self.num_repeated = self.num_resumed = 0  # requests sent again whole; streams gone on with

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request; see the ASGI specification."""
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": f"{message['type']}.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["type"] != "http":
            raise ValueError(f"{scope['type']} is not served")
        asked = self._asked(scope, send)
        try:
            asked.body = await _read(receive)
        except PayloadTooLargeError as error:
            await _refuse(asked, error)
            return
        answering = asyncio.create_task(self._answer(asked))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answering, leaving):
                task.cancel()  # a client that has left ends the work for it
            await asyncio.gather(leaving, return_exceptions=True)
        if not answering.cancelled():
            await asyncio.gather(answering, return_exceptions=leaving.done() and not leaving.cancelled())

    def _asked(self, scope: Message, send: Send) -> Asked:
        """Return the request with what makes its answer the same wherever it is computed."""
        query = quote(scope.get("query_string", b""), safe=string.punctuation)
        headers = [(name, value) for name, value in scope["headers"] if not _OURS.fullmatch(name)]
        if all(name != b"x-request-id" for name, _ in headers):
            headers.append((b"x-request-id", f"{random.getrandbits(128):032x}".encode()))
        own = {FRONT_KEY: self._key, FRONT_SEED: str(random.getrandbits(62)), FRONT_CREATED: str(int(time.time()))}
        headers += [(name.encode(), value.encode()) for name, value in own.items()]
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        target = quote(path, safe=_PLAIN)  # what comes to us is decoded, line breaks as well
        return Asked(scope["method"], path, f"{target}?{query}" if query else target, headers, b"", send)

    async def _answer(self, asked: Asked) -> None:
        if asked.path == "/v1/models" and len(self._models) > 1:
            await self._list_models(asked)
            return
        replicas, num_attempts = self._replicas_for(asked), 0
        while True:
            num_tokens = asked.passed.num_tokens
            try:
                await _attempt(replicas, asked)
                return
            except ReplicaGoneError as gone:
                num_attempts = 1 if asked.passed.num_tokens > num_tokens else num_attempts + 1
                is_lost = not (asked.is_resumable if asked.has_begun else asked.may_be_repeated)
                if is_lost or num_attempts == MOST_ATTEMPTS:
                    await _give_up(asked, str(gone))
                    return
                log.warning("elsewhere again", path=asked.path, because=str(gone)[:300], tokens=asked.passed.num_tokens)
            asked.passed.forget()
            is_begun = asked.passed.num_tokens > 0
            self.num_resumed, self.num_repeated = self.num_resumed + is_begun, self.num_repeated + (not is_begun)
            await asyncio.sleep(FIRST_PAUSE_S * 2 ** (num_attempts - 1) * random.uniform(0.5, 1.0))

    def _replicas_for(self, asked: Asked) -> Replicas:
        """Return the replicas of the model that a request names; its servers refuse a name that nobody has."""
        first = next(iter(self._models.values()))
        if len(self._models) == 1 or not asked.body:
            return first
        try:
            name = orjson.loads(asked.body)["model"]
            return self._models.get(name, first)
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return first

    async def _list_models(self, asked: Asked) -> None:
        """Answer GET /v1/models with those of all servers."""
        found: list[Any] = []
        for replicas in dict.fromkeys(self._models.values()):
            status, _, body = await _whole(replicas, asked)
            if status != 200:
                await _send_whole(asked, status, [(b"content-type", b"application/json")], body)
                return
            found += orjson.loads(body)["data"]
        body = orjson.dumps({"object": "list", "data": found})
        await _send_whole(asked, 200, [(b"content-type", b"application/json")], body)


async def _attempt(replicas: Replicas, asked: Asked) -> None:
    """Let one replica answer, or go on. Raises ReplicaGoneError if it does not come to the end."""
    path, body = asked.attempt()
    async with aclosing(replicas.answer(asked.method, path, asked.headers, body)) as parts:
        status, headers = await _head(parts)
        if asked.has_begun and status != 200:
            raise ReplicaGoneError(f"status {status} to a stream that has begun")
        if status == 503 and not asked.was_refused and asked.may_be_repeated:
            asked.was_refused = True
            raise ReplicaGoneError("status 503")
        if not _is_stream(headers):
            await _send_whole(asked, status, headers, await _rest(parts))
            return
        if not asked.has_begun:
            await _begin(asked, status, headers)
        async for part in parts:
            assert isinstance(part, bytes)
            if data := asked.passed.take(part) if asked.is_resumable else part:
                await asked.send({"type": "http.response.body", "body": data, "more_body": True})
        if asked.passed.last_words:
            raise ReplicaGoneError("an error of the server")
        await asked.send({"type": "http.response.body", "body": asked.passed.end(), "more_body": False})


async def _whole(replicas: Replicas, asked: Asked) -> tuple[int, Headers, bytes]:
    """Return a short answer."""
    async with aclosing(replicas.answer(asked.method, asked.target, asked.headers, asked.body)) as parts:
        status, headers = await _head(parts)
        return status, headers, await _rest(parts)


async def _rest(parts: AsyncGenerator[Head | bytes, None]) -> bytes:
    """Return all of an answer behind its head."""
    return b"".join([part async for part in parts if isinstance(part, bytes)])


async def _head(parts: AsyncGenerator[Head | bytes, None]) -> Head:
    """Return what an answer begins with."""
    async for part in parts:
        assert not isinstance(part, bytes)
        return part
    raise ReplicaGoneError("no answer")


def _is_stream(headers: Headers) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)


async def _begin(asked: Asked, status: int, headers: Headers) -> None:
    asked.has_begun = True
    kept = [(name, value) for name, value in headers if name not in _HOPS]
    await asked.send({"type": "http.response.start", "status": status, "headers": kept})


async def _send_whole(asked: Asked, status: int, headers: Headers, body: bytes) -> None:
    is_head = asked.method == "HEAD"
    others = [(name, value) for name, value in headers if is_head or name != b"content-length"]
    length = [] if is_head else [(b"content-length", str(len(body)).encode())]
    await _begin(asked, status, [*others, *length])
    await asked.send({"type": "http.response.body", "body": body, "more_body": False})


async def _give_up(asked: Asked, why: str) -> None:
    """End an answer that nobody can go on with, in the words of its API; a replica's own words if it has left some."""
    log.error("given up", path=asked.path, because=why[:300], tokens=asked.passed.num_tokens)
    error = OverloadedError("No server could finish this request; try again.", retry_after_s=1)
    if not asked.has_begun:
        await _refuse(asked, error)
        return
    is_anthropic = asked.path.startswith(PREFIX)
    events = b"event: error\ndata: " + error_json(error) + b"\n\n" if is_anthropic else error_event(error) + DONE
    last = asked.passed.last_words or events
    await asked.send({"type": "http.response.body", "body": last, "more_body": False})


async def _refuse(asked: Asked, error: KunServeError) -> None:
    headers = [(b"content-type", b"application/json")]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    write = error_json if asked.path.startswith(PREFIX) else openai_error
    await _send_whole(asked, error.status, headers, write(error, ""))


async def _read(receive: Receive) -> bytes:
    """Return the body. Raises PayloadTooLargeError."""
    pieces, num_bytes = list[bytes](), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(pieces)
        pieces.append(message.get("body", b""))
        num_bytes += len(pieces[-1])
        if num_bytes > MOST_BODY_BYTES:
            raise PayloadTooLargeError(f"The body has more than {MOST_BODY_BYTES} bytes.")
        if not message.get("more_body", False):
            return b"".join(pieces)


async def _left(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
