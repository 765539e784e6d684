"""How an error looks on the wire: the response and, in OpenAI's words, its JSON and the server-sent event.

Families of routes whose clients read errors otherwise have a shape of their own (`ErrorJson`).
"""

from __future__ import annotations

from collections.abc import Callable

import orjson
from aiohttp import web

from kunserve.errors import (
    ConflictError,
    EngineError,
    InvalidRequestError,
    KunServeError,
    NotFoundError,
    PayloadTooLargeError,
    UnauthorizedError,
)

ErrorJson = Callable[[KunServeError, str], bytes]  # the body of an error answer; it may name the request's id

_KNOWN = {
    error.status: error
    for error in (InvalidRequestError, UnauthorizedError, NotFoundError, ConflictError, PayloadTooLargeError)
}


def openai_error(error: KunServeError, request_id: str = "") -> bytes:
    """Return the body of an error answer, as OpenAI clients read it."""
    details = {"message": error.message, "type": error.type, "param": error.param, "code": error.status}
    return orjson.dumps({"error": details})


def error_event(error: KunServeError) -> bytes:
    """Return an error after the answer has begun: one server-sent event."""
    return b"data: " + openai_error(error) + b"\n\n"


def error_response(error: KunServeError, body: bytes) -> web.Response:
    """Return an error before the answer has begun. Every 503 says when to come back."""
    response = web.Response(status=error.status, body=body, content_type="application/json")
    if error.status == 503:
        response.headers["Retry-After"] = str(error.retry_after_s or 1)
    return response


def error_of_http(error: web.HTTPException) -> KunServeError:
    """Return what aiohttp refuses (no such route, wrong method) as an error of ours."""
    ours = _KNOWN.get(error.status, InvalidRequestError)(error.reason)
    ours.status = error.status
    return ours


def internal_error() -> KunServeError:
    """Return what a client learns of an error that we did not expect; the log has the rest."""
    return EngineError("Internal error; the server's log says more.")
