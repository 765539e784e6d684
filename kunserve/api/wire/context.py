"""What every route shares: the server below it, and the few tools to reach it."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
from aiohttp import web
from structlog.contextvars import bind_contextvars

from kunserve.api.wire.admission import Admission, Door
from kunserve.api.wire.backend import (
    ApiSettings,
    Backend,
    Counters,
    Generator,
    ModelInfo,
    Template,
    TextTokenizer,
)
from kunserve.api.wire.body_memory import BodyMemory
from kunserve.api.wire.fields import pieces
from kunserve.api.wire.grammars import Compiler
from kunserve.api.wire.response_store import Responses
from kunserve.api.wire.turns import Turns
from kunserve.observe.metrics import Metrics

if TYPE_CHECKING:  # needs an extra
    from kunserve.observe.tracer import HttpTrace, RequestTrace, Tracer

T = TypeVar("T")

REQUEST_ID = web.RequestKey("request_id", str)
_REQUEST_ID_HEADER = "X-Request-ID"
_USABLE_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True, slots=True)
class Api:
    """One server's routes and what they stand on; `request.app[API]`."""

    backend: Generator
    tokenizer: TextTokenizer
    chat_template: Template | None
    model: ModelInfo
    metrics: Counters
    settings: ApiSettings
    threads: ThreadPoolExecutor  # for what would hold up the event loop
    arrivals: Turns  # of requests, before anything of them is looked at
    turns: Turns  # on the way in: for about a millisecond of work
    deliveries: Turns  # on the way out: of one output each
    departures: Turns  # of sequences that are over: each frees what it holds
    admission: Door
    bodies: BodyMemory
    grammars: Compiler | None
    responses: Responses
    serials: Iterator[object]  # tell apart requests of clients that chose the same id
    tracer: Tracer | None = None

    async def offload(self, num_chars: int, work: Callable[[], T]) -> T:
        """Return the result of `work` on so much text: done here if it is short, else on a thread."""
        return work() if num_chars <= self.settings.inline_chars else await self.on_thread(work)

    async def on_thread(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, which takes too long for the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)


@dataclass(frozen=True, slots=True)
class Operated:
    """What routes of operators stand on, beside `Api`; `request.app[OPERATED]`."""

    backend: Backend
    metrics: Metrics
    admission: Admission


API = web.AppKey("api", Api)
OPERATED = web.AppKey("operated", Operated)
HTTP_TRACE: ContextVar[HttpTrace | None] = ContextVar("HTTP_TRACE", default=None)  # of the request that is handled


def join_trace(request: web.Request) -> None:
    """Let what is done for a request belong to its client's trace, if traces are wanted; its lines of the log, too."""
    if (tracer := request.app[API].tracer) is not None:
        http_trace = tracer.of(request.headers)
        HTTP_TRACE.set(http_trace)
        if http_trace.trace_id is not None:
            bind_contextvars(trace_id=http_trace.trace_id)


def begin_trace(n: int) -> RequestTrace | None:
    """Begin the span of a sequence, one of `n` of its prompt; None where nothing is traced."""
    if (http_trace := HTTP_TRACE.get()) is None:
        return None
    request_trace = http_trace.begin(n)
    bind_contextvars(**request_trace.ids)
    return request_trace


@dataclass(frozen=True, slots=True)
class Past:
    """One choice of an answer that another server has begun."""

    token_ids: list[int]  # that its client has been told of
    num_cached_tokens: int  # of its prompt, that the other server found in its prefix cache


@dataclass(frozen=True, slots=True)
class Resumed:
    """A stream of another server's that goes on here: its request's body, and its choices as far as they came."""

    body: dict[str, Any]
    past: tuple[Past, ...]


RESUMED = web.RequestKey("resumed", Resumed)


def new_request_id(request: web.Request) -> str:
    """Return the client's X-Request-ID if it is one printable word, else a new id."""
    given = request.headers.get(_REQUEST_ID_HEADER, "")
    return given if _USABLE_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"  # no system call, as uuid4 has


def choose_request_id(request: web.Request, from_body: str | None) -> str:
    """Return the id of this request; an id in the body counts unless the header has one."""
    if from_body and _REQUEST_ID_HEADER not in request.headers and _USABLE_ID.fullmatch(from_body):
        request[REQUEST_ID] = from_body
    return request[REQUEST_ID]


async def echo_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Give every answer the id of its request (an aiohttp on_response_prepare signal)."""
    response.headers[_REQUEST_ID_HEADER] = request.get(REQUEST_ID, "")


def to_json(value: object) -> bytes:
    """Return an answer as JSON."""
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)


def fragment(value: object) -> orjson.Fragment:
    """Return a part of an answer as JSON already: orjson keeps the GIL, so no single call may write all of it."""
    return orjson.Fragment(orjson.dumps(value))


def long_list(values: list[Any] | tuple[Any, ...]) -> orjson.Fragment:
    """Return a list that may have a million values, written in pieces."""
    return orjson.Fragment(b"[" + b",".join(orjson.dumps(piece)[1:-1] for piece in pieces(values)) + b"]")


def long_text(text: str) -> orjson.Fragment:
    """Return a text of megabytes, written in pieces."""
    return orjson.Fragment(b'"' + b"".join(orjson.dumps(piece)[1:-1] for piece in pieces(text)) + b'"')


def json_response(value: object) -> web.Response:
    """Return an answer in JSON; `value` may be JSON already, as bytes."""
    body = value if isinstance(value, bytes) else to_json(value)
    return web.Response(body=body, content_type="application/json")
