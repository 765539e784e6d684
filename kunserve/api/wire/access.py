"""Who may come in: API keys and browsers' origins, and the line that each request leaves in the log."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from hmac import compare_digest

import structlog
from aiohttp import web
from structlog.contextvars import get_contextvars

from kunserve.api.wire.context import API, REQUEST_ID
from kunserve.api.wire.fields import INT64_MAX
from kunserve.errors import ForbiddenError, UnauthorizedError

log = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# Probes and scrapers bring no key, and come too often to be worth a line.
OPEN_PATHS = frozenset({"/health", "/ping", "/ready", "/metrics", "/load"})
# What the server is able to do is no secret either.
DOCUMENT_PATHS = frozenset({"/openapi.json", "/docs"})
PAGE_PREFIX = "/page/"  # with "/": files that everybody has; what they show asks for the key
# These ask for the admin key (admin.py).
ADMIN_PATHS = frozenset({"/kunserve/drop", "/kunserve/restore", "/kunserve/burst"})
DEVICES_PREFIX = "/kunserve/devices/"
_PREFLIGHT_AGE_S = 600
# What a front sends with each request, a resumed one, too: so the same answer comes of it wherever it is computed.
FRONT_KEY, FRONT_SEED, FRONT_CREATED = "X-KunServe-Front", "X-KunServe-Seed", "X-KunServe-Created"


def bearer(request: web.Request) -> str:
    """Return the key a request brings: `Authorization: Bearer KEY`, or `x-api-key: KEY` as Anthropic's clients send."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")


def is_key(given: str, keys: Sequence[str]) -> bool:
    """Return whether `given` is one of `keys`. Looks at all of them, so that the time says nothing."""
    return sum(compare_digest(_bytes(given), _bytes(key)) for key in keys) > 0


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")  # headers may hold any bytes


def needs_key(path: str) -> bool:
    """Return whether the API key is asked for there, if there is one."""
    is_open = path in OPEN_PATHS | DOCUMENT_PATHS or path == "/" or path.startswith(PAGE_PREFIX)
    return not is_open and not is_admin_path(path)


def is_admin_path(path: str) -> bool:
    """Return whether the admin key is asked for there instead."""
    return path in ADMIN_PATHS or path.startswith(DEVICES_PREFIX)


def check_key(request: web.Request) -> None:
    """Raise UnauthorizedError unless the request may come in."""
    keys = request.app[API].settings.api_keys
    if keys and needs_key(request.path) and not is_key(bearer(request), keys):
        raise UnauthorizedError("The API key is missing or wrong (send it as `Authorization: Bearer KEY`).")


def owner_of(request: web.Request, user: str = "") -> str:
    """Return who shares the queue with whom: keys, where there are several; else the users that clients name.

    A key's requests never count as several owners', or a flood could take many shares.
    """
    keys, key = request.app[API].settings.api_keys, bearer(request)
    return f"key {keys.index(key)}" if len(keys) > 1 and key in keys else user  # an admin's is none of them


def keeper_of(request: web.Request) -> str:
    """Return under whose name something of a client's is kept beyond its request, perhaps beyond the server's life.

    Not by the number of the key: with other keys, at the next start, it would be somebody else's.
    """
    keys, key = request.app[API].settings.api_keys, bearer(request)
    return sha256(_bytes(key)).hexdigest() if len(keys) > 1 else ""


@dataclass(frozen=True, slots=True)
class Front:
    """What stands between clients and several servers, and lets another one go on with a stream whose server is gone.

    Its streams say which tokens are in what it has got (`say/marks.py`); clients never see that.
    """

    seed: int | None  # of the first choice, if the client gives none
    created_s: int  # when the answer began, since 1970


def front_of(request: web.Request) -> Front | None:
    """Return the front that a request comes through; None if it does not say so with a front's key."""
    keys, headers = request.app[API].settings.front_keys, request.headers
    if FRONT_KEY not in headers or not is_key(headers[FRONT_KEY], keys):
        return None
    created_s = _number(headers.get(FRONT_CREATED))
    return Front(_number(headers.get(FRONT_SEED)), int(time.time()) if created_s is None else created_s)


def check_front(request: web.Request) -> None:
    """Raise unless the request comes from a front."""
    if not request.app[API].settings.front_keys:
        raise ForbiddenError("This server was started without --front-key, so nobody may do this.")
    if front_of(request) is None:
        raise UnauthorizedError(f"The front's key is missing or wrong (send it as `{FRONT_KEY}: KEY`).")


def created_s(request: web.Request) -> int:
    """Return when the answer to a request began, in seconds since 1970."""
    front = front_of(request)
    return int(time.time()) if front is None else front.created_s


def _number(text: str | None) -> int | None:
    """Return the number that a header holds; None if it holds none."""
    is_number = text is not None and text.isascii() and text.isdigit() and len(text) < 20
    return int(text) & INT64_MAX if text is not None and is_number else None


def is_preflight(request: web.Request) -> bool:
    """Return whether a browser asks if it may ask."""
    return request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers


def preflight_response(request: web.Request) -> web.Response:
    """Tell a browser what it may do; `allow_origin` adds from where."""
    headers = {
        "Access-Control-Allow-Methods": request.headers["Access-Control-Request-Method"],
        "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", "*"),
        "Access-Control-Max-Age": str(_PREFLIGHT_AGE_S),
    }
    return web.Response(status=204, headers=headers)


async def allow_origin(request: web.Request, response: web.StreamResponse) -> None:
    """Let browsers on allowed origins read the answer (an aiohttp on_response_prepare signal)."""
    allowed, origin = request.app[API].settings.allowed_origins, request.headers.get("Origin")
    if origin is None or not allowed:
        return
    if "*" in allowed:
        response.headers["Access-Control-Allow-Origin"] = "*"
    else:
        response.headers["Vary"] = "Origin"
        if origin not in allowed:
            return
        response.headers["Access-Control-Allow-Origin"] = origin
    response.headers["Access-Control-Expose-Headers"] = "X-Request-ID, Retry-After"


@web.middleware
async def log_access(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Log one line per request once its answer is out, or its client gone; at debug level for probes and scrapers."""
    if not request.app[API].settings.logs_access:
        return await handler(request)
    started_s = time.monotonic()
    status = 499  # nginx's word for a client that left
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        line = partial(
            log.debug if request.path in OPEN_PATHS else log.info,
            "request",
            method=request.method,
            path=request.path,
            status=status,
            seconds=round(time.monotonic() - started_s, 3),
            client=request.remote,
            request_id=request.get(REQUEST_ID, ""),
            **get_contextvars(),  # the line may be written later, where they are others
        )
        request.app[API].departures.run(line)
