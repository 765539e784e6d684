"""The HTTP application: routes, and the one place where every error becomes an answer."""

from __future__ import annotations

import itertools
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
from aiohttp import web

from kunserve.api.operate.admin import add_device, drop, remove_device, restore
from kunserve.api.operate.burst import BURSTS, Bursts, start_burst
from kunserve.api.operate.feed import FEED, Feed, events
from kunserve.api.operate.page import PAGE, page_files, show_page
from kunserve.api.remote.guest import Guest
from kunserve.api.remote.proxy import Proxy
from kunserve.api.remote.shared import RemoteDoor, RemoteResponses
from kunserve.api.remote.structures import RemoteGrammars
from kunserve.api.routes import anthropic, openapi
from kunserve.api.routes.chat import chat_completions
from kunserve.api.routes.completions import completions
from kunserve.api.routes.operations import (
    detokenize,
    health,
    list_models,
    ready,
    show_docs,
    show_load,
    show_model,
    show_openapi,
    show_tokenizer,
    show_version,
    state,
    tokenize_text,
)
from kunserve.api.routes.operations import (
    metrics as show_metrics,
)
from kunserve.api.routes.responses import count_input_tokens
from kunserve.api.routes.responses import responses as create_response
from kunserve.api.routes.resume import resume
from kunserve.api.routes.stored_responses import delete_response, list_input_items, show_response
from kunserve.api.wire import anthropic_errors
from kunserve.api.wire.access import allow_origin, check_key, is_preflight, log_access, preflight_response
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
from kunserve.api.wire.context import (
    API,
    OPERATED,
    REQUEST_ID,
    Api,
    Operated,
    echo_request_id,
    join_trace,
    new_request_id,
)
from kunserve.api.wire.errors import ErrorJson, error_of_http, error_response, internal_error, openai_error
from kunserve.api.wire.grammars import Compiler, Grammars
from kunserve.api.wire.response_store import Responses, ResponseStore
from kunserve.api.wire.sse import send_response
from kunserve.api.wire.turns import Turns
from kunserve.errors import KunServeError
from kunserve.observe.metrics import Metrics

if TYPE_CHECKING:  # needs an extra
    from kunserve.observe.tracer import Tracer

log = structlog.get_logger()

ARRIVALS_PER_ROUND = 32  # of the event loop: about 3 ms; a refusal must not wait behind bodies, which take `turns`
DELIVERIES_PER_ROUND = 32  # 2 to 3 ms
DEPARTURES_PER_ROUND = 32  # 1 to 2 ms where each leaves the engine

READ_BYTES = 16 << 10  # of a body may wait twice so many, and one read of the socket, for somebody to take them

# Of clients: a worker answers them itself.
CLIENT_ROUTES = (
    web.post("/v1/completions", completions),
    web.post("/v1/chat/completions", chat_completions),
    web.post("/v1/responses", create_response),
    web.post("/v1/responses/input_tokens", count_input_tokens),
    web.get("/v1/responses/{id}", show_response),
    web.delete("/v1/responses/{id}", delete_response),
    web.get("/v1/responses/{id}/input_items", list_input_items),
    web.post("/v1/messages", anthropic.messages),
    web.post("/v1/messages/count_tokens", anthropic.count_tokens),
    web.get("/v1/models", list_models),
    web.get("/v1/models/{name:.+}", show_model),
    web.post("/tokenize", tokenize_text),
    web.post("/detokenize", detokenize),
    web.get("/tokenizer_info", show_tokenizer),
    web.get("/version", show_version),
    web.get("/openapi.json", show_openapi),
    web.get("/docs", show_docs),
    web.get("/", show_page),
    web.get("/page/{name}", show_page),
    web.post("/kunserve/resume", resume),
)
# Of operators, routers and scrapers: only the engine's process knows what they say.
ENGINE_ROUTES = (
    web.get("/load", show_load),
    web.get("/health", health),
    web.get("/ping", health),
    web.get("/ready", ready),
    web.get("/metrics", show_metrics),
    web.get("/kunserve/state", state),
    web.get("/kunserve/events", events, allow_head=False),
    web.post("/kunserve/burst", start_burst),
    web.post("/kunserve/drop", drop),
    web.post("/kunserve/restore", restore),
    web.post("/kunserve/devices/{index}/remove", remove_device),
    web.post("/kunserve/devices/{index}/add", add_device),
)
ROUTES = (*CLIENT_ROUTES, *ENGINE_ROUTES)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def _respond(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        if is_preflight(request) and request.app[API].settings.allowed_origins:
            return preflight_response(request)
        check_key(request)
        return await handler(request)
    except KunServeError as error:
        if error.status >= 500 and error.status != 503:
            log.error("request failed", path=request.path, error=error.message)
        return _refusal(request, error)
    except web.HTTPException as error:
        response = _refusal(request, error_of_http(error))
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except Exception:
        log.exception("request failed", path=request.path)
        return _refusal(request, internal_error())


async def _with_tidy_path(request: web.Request, handler: Handler) -> tuple[web.Request, Handler]:
    """Return the request and its handler as if its path had no slash too many, if there is a route for that.

    Clients put a base address and a path together without looking at the slashes between them; a redirect would lose
    the body of some.
    """
    path = re.sub("/{2,}", "/", request.path).rstrip("/") or "/"
    if path == request.path:
        return request, handler
    tidy = request.clone(rel_url=request.rel_url.with_path(path).with_query(request.rel_url.query))
    found = await request.app.router.resolve(tidy)
    if isinstance(found.http_exception, web.HTTPNotFound):
        return request, handler
    found.add_app(request.app)
    found.freeze()
    tidy._match_info = found  # as aiohttp's own application does after resolving
    return tidy, found.handler


def _refusal(request: web.Request, error: KunServeError) -> web.Response:
    """Return an error in the shape that this client reads."""
    write: ErrorJson = anthropic_errors.error_json if anthropic_errors.is_ours(request) else openai_error
    return error_response(error, write(error, request[REQUEST_ID]))


@web.middleware
async def answer_always(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Name the request, turn whatever goes wrong into an error that its client reads, and see the answer off."""
    request[REQUEST_ID] = new_request_id(request)
    join_trace(request)
    await request.app[API].arrivals.take()
    if request.match_info.http_exception is not None:
        request, handler = await _with_tidy_path(request, handler)
    response = await _respond(request, handler)
    if not request.content.is_eof():  # what is still to come of its body is thrown away, for a while
        response.force_close()
    if not response.prepared:
        try:
            await send_response(request, response, request.app[API].settings.write_timeout_s)
        except ConnectionError as error:
            log.info("answer cut", path=request.path, reason=str(error))
    return response


@dataclass(frozen=True, slots=True)
class Known:
    """What routes know of the model, and of what they may do: the same in every process that has them."""

    tokenizer: TextTokenizer
    chat_template: Template | None
    model: ModelInfo
    settings: ApiSettings


def _application(
    known: Known,
    backend: Generator,
    metrics: Counters,
    admission: Door,
    grammars: Compiler | None,
    responses: Responses,
    serials: Iterator[object],
    tracer: Tracer | None = None,
) -> web.Application:
    """Make an application with all that routes of clients stand on. Its runner needs no further arguments.

    A client that leaves cancels its handler at once (handler_cancellation), streaming or not, whether or not there
    is a token to write: aiohttp keeps reading the socket and so sees the end of the connection. Connections that do
    not come up with a request's headers in time are closed (keepalive_timeout runs from the accept as well).
    """
    settings = known.settings
    app = web.Application(
        middlewares=[log_access, answer_always],
        client_max_size=settings.max_body_bytes,
        handler_args={
            "handler_cancellation": True,
            "keepalive_timeout": settings.idle_timeout_s,
            "auto_decompress": False,  # no bombs; no client we know compresses its requests
            "read_bufsize": READ_BYTES,
        },
    )
    threads = ThreadPoolExecutor(settings.tokenizer_threads, thread_name_prefix="tokenizer")
    bodies = BodyMemory(metrics, settings)
    turns = (Turns(ARRIVALS_PER_ROUND), Turns(), Turns(DELIVERIES_PER_ROUND), Turns(DEPARTURES_PER_ROUND))
    shared = (settings, threads, *turns, admission, bodies, grammars, responses, serials, tracer)
    app[API] = Api(backend, known.tokenizer, known.chat_template, known.model, metrics, *shared)
    app[PAGE] = page_files()
    openapi.prepare()

    async def stop_threads(_: web.Application) -> AsyncIterator[None]:
        yield
        threads.shutdown(wait=False, cancel_futures=True)

    app.cleanup_ctx.append(stop_threads)
    app.on_response_prepare.append(echo_request_id)
    app.on_response_prepare.append(allow_origin)
    return app


def create_app(
    backend: Backend,
    tokenizer: TextTokenizer,
    chat_template: Template | None,
    model: ModelInfo,
    metrics: Metrics,
    settings: ApiSettings,
    grammars: Grammars | None = None,
    tracer: Tracer | None = None,
) -> web.Application:
    """Make the application: all routes on one engine, in its own process."""
    known = Known(tokenizer, chat_template, model, settings)
    admission = Admission(backend.waiting, metrics, settings)
    responses = ResponseStore(settings.max_response_bytes, settings.response_file)
    app = _application(known, backend, metrics, admission, grammars, responses, itertools.count(), tracer)
    app[OPERATED] = Operated(backend, metrics, admission)
    app[FEED] = Feed(backend.state, metrics, {"model": model.name, "has_admin": bool(settings.admin_keys)})
    app[BURSTS] = Bursts()

    async def close_stores(_: web.Application) -> AsyncIterator[None]:
        if grammars is not None:
            await grammars.open()
        yield
        responses.close()
        if grammars is not None:
            await grammars.close()

    app.cleanup_ctx.append(close_stores)
    app.on_startup.append(app[FEED].open)
    app.on_shutdown.append(app[FEED].close)
    app.add_routes(ROUTES)
    return app


def create_worker_app(known: Known, engine: Guest, proxy: Proxy, name: str) -> web.Application:
    """Make the application of a worker, on an engine in another process; `name` is no other worker's, dead or alive."""
    responses = RemoteResponses(engine, is_on=known.settings.max_response_bytes > 0)
    serials = (f"{name}.{number}" for number in itertools.count())
    app = _application(known, engine, engine, RemoteDoor(engine), RemoteGrammars(engine), responses, serials)

    async def pass_on(_: web.Application) -> AsyncIterator[None]:
        await proxy.open()
        yield
        await proxy.close()

    app.cleanup_ctx.append(pass_on)
    app.add_routes(CLIENT_ROUTES)
    app.add_routes([web.RouteDef(route.method, route.path, proxy.handle, route.kwargs) for route in ENGINE_ROUTES])
    return app
