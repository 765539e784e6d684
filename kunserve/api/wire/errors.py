"""How an error looks on the wire: the JSON body, the response, the server-sent event."""

from __future__ import annotations

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
    UnprocessableError,
)

_TYPES = {
    error.status: error.type
    for error in (
        InvalidRequestError,
        UnauthorizedError,
        NotFoundError,
        ConflictError,
        PayloadTooLargeError,
        UnprocessableError,
    )
}


def error_json(message: str, type_: str, param: str | None, code: int) -> bytes:
    """The body of every error answer, as OpenAI clients read it."""
    return orjson.dumps({"error": {"message": message, "type": type_, "param": param, "code": code}})


def error_event(error: KunServeError) -> bytes:
    """An error after the answer has begun: one server-sent event."""
    return b"data: " + error_json(error.message, error.type, error.param, error.status) + b"\n\n"


def error_response(error: KunServeError) -> web.Response:
    """An error before the answer has begun. Every 503 says when to come back."""
    body = error_json(error.message, error.type, error.param, error.status)
    response = web.Response(status=error.status, body=body, content_type="application/json")
    if error.status == 503:
        response.headers["Retry-After"] = str(error.retry_after_s or 1)
    return response


def http_error_response(error: web.HTTPException) -> web.Response:
    """An answer that aiohttp made (no such route, wrong method), in our words."""
    body = error_json(error.reason, _TYPES.get(error.status, InvalidRequestError.type), None, error.status)
    response = web.Response(status=error.status, body=body, content_type="application/json")
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def internal_error() -> KunServeError:
    """What a client learns of an error that we did not expect; the log has the rest."""
    return EngineError("Internal error; the server's log says more.")
