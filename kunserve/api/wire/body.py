"""The way in: a request's body to what it asks for, within bounds of size and time, without holding the loop up.

orjson keeps the GIL from the first byte to the last: a few milliseconds for what most clients send, a third of a second
for eight MiB. So a large body is read on a thread by the standard library's decoder, which comes back to Python
for each number and object, and there other threads get their turn.
"""

from __future__ import annotations

import asyncio
import re
from codecs import BOM_UTF8
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from json import JSONDecoder
from math import isinf
from typing import Any, NoReturn, TypeVar

import orjson
from aiohttp import web

from kunserve.api.wire.access import owner_of
from kunserve.api.wire.backend import ApiSettings
from kunserve.api.wire.body_memory import Body, too_large
from kunserve.api.wire.context import RESUMED, Api
from kunserve.api.wire.fields import pieces
from kunserve.errors import InvalidRequestError

T = TypeVar("T")

SMALL_BYTES = 1 << 17  # up to 10 ms with orjson, for nested lists; 2 ms for token ids
# Bounds of what takes Python long to make or to forget in one piece: lists and objects within lists (no request has so
# many prompts or messages), and strings, true, false and null, for which no decoder comes back to Python.
MAX_LISTS, MAX_SCALARS = 1 << 15, 1 << 18
# Of lists and objects in each other. Parts of a request are written again, in answers and for other libraries, whose
# own bounds are 254 levels (orjson) and more; what is around them takes a few.
MAX_DEPTH = 200
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_call(request: web.Request, api: Api, read: Callable[[dict[str, Any]], T]) -> T:
    """Return what `read_body` does, for a route that generates: 503 if the queue has no room for one sequence more.

    It is asked before the body is read, and once it is there; from then on it has a reservation in the queue. Else all
    who come while one is free would wait for their turn to be parsed, one after the other, to be refused then.
    """
    owner = owner_of(request)
    await api.admission.check(owner)
    return await read_body(request, api, read, lambda: api.admission.accepted(owner, 1, 0))


async def read_body(
    request: web.Request,
    api: Api,
    read: Callable[[dict[str, Any]], T],
    held_while_parsed: Callable[[], AbstractAsyncContextManager[object]] = nullcontext,
) -> T:
    """Return what `read` makes of the JSON object in the body; of a large one on a thread.

    `held_while_parsed`: from the body's last byte until it is parsed. 413 beyond the bound, 503 if there is no memory
    for it now, 400 if it is no JSON or does not come in time; KunServeError of `read`.
    """
    if (resumed := request.get(RESUMED)) is not None:  # it stood in another body, which has been read
        return await api.on_thread(lambda: read(resumed.body))
    settings, deadline = api.settings, asyncio.timeout(api.settings.body_timeout_s)
    _check_headers(request, settings)

    def give_way() -> None:
        if not deadline.expired():
            deadline.reschedule(0.0)  # now

    with api.bodies.held(owner_of(request), give_way) as body:
        try:
            async with deadline:
                await _receive(request, body)
        except TimeoutError:
            body.end()  # it may have had to give way
            raise InvalidRequestError(f"The body took longer than {settings.body_timeout_s:g} s.") from None
        async with held_while_parsed():
            await api.turns.take()
            if body.num_bytes <= SMALL_BYTES:
                return read(_object(body.whole, parse_small(body.whole)))
            return await api.on_thread(lambda: read(_object(body.whole, parse_large(body.whole))))


def _check_headers(request: web.Request, settings: ApiSettings) -> None:
    """Refuse before the first byte is read what its headers say cannot be read."""
    if (request.content_length or 0) > settings.largest_body_bytes:
        raise too_large(settings.largest_body_bytes)
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise InvalidRequestError("Compressed bodies are not supported.")


async def _receive(request: web.Request, body: Body) -> None:
    """Read a body to its end, piece by piece: what has come counts, not what the client says will come."""
    now_s, content = asyncio.get_running_loop().time, request.content
    try:
        while not content.at_eof():  # no name here for a piece: the last would be kept while the next one is waited for
            body.add(await content.readany(), now_s())
    except web.RequestPayloadError:
        raise InvalidRequestError("The body is not what its headers say.") from None
    body.end()


def _object(body: bytes, values: object) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    if sum(piece.count(b"[") + piece.count(b"{") for piece in pieces(body)) > MAX_DEPTH:
        for name, value in values.items():
            _check_depth(value, name)
    return values


def _check_depth(value: object, name: str) -> None:
    """Raise InvalidRequestError if lists and objects are nested too deeply in a field."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        if not level:
            return
        insides = [inside.values() if isinstance(inside, dict) else inside for inside in level]
        level = [value for values in insides for value in values if isinstance(value, dict | list)]
    if level:
        raise InvalidRequestError(f"`{name}` is nested more than {MAX_DEPTH} levels deep.", param=name)


def parse_small(body: bytes) -> object:
    """Read JSON at once. Raises InvalidRequestError."""
    try:
        return orjson.loads(body.removeprefix(BOM_UTF8))
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.") from None


def parse_large(body: bytes) -> object:
    """Read the same values as `parse_small`, in pieces."""
    num_lists = num_scalars = 0
    for piece in pieces(body):  # what a cut goes through does not count
        num_lists += sum([piece.count(mark) for mark in (b"[[", b",[", b", [", b"[{", b",{", b", {")])
        num_scalars += sum([piece.count(mark) for mark in (b'",', b"e,", b"l,")])
    if num_lists > MAX_LISTS:
        raise InvalidRequestError(f"The body has more than {MAX_LISTS} lists or objects within lists.")
    if num_scalars > MAX_SCALARS:
        raise InvalidRequestError(f"The body has more than {MAX_SCALARS} strings, truth values and nulls.")
    may_have_halves = any(mark in body for mark in (b"\\ud", b"\\uD"))  # of characters: to be checked as orjson does
    if may_have_halves and _SURROGATE.search(body):
        return parse_small(body)
    try:
        return _DECODER.decode(body.removeprefix(BOM_UTF8).decode())
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.") from None


def _integer(text: str) -> int | float:
    """Return an integer; beyond 64 bits a float, as orjson reads it."""
    value = int(text) if len(text) <= 20 else 1 << 64
    return value if -(1 << 63) <= value < 1 << 64 else _float(text)


def _float(text: str) -> float:
    if isinf(value := float(text)):
        raise ValueError(f"{text[:40]} is out of range")
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _same(values: dict[str, Any]) -> dict[str, Any]:
    return values


_DECODER = JSONDecoder(parse_int=_integer, parse_float=_float, parse_constant=_constant, object_hook=_same)
