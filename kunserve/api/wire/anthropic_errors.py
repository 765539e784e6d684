"""How errors look to Anthropic's clients, and which clients those are."""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import web

from kunserve.errors import KunServeError, UnsupportedThreadError

PREFIX = "/v1/messages"
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}


def error_details(error: KunServeError) -> dict[str, Any]:
    """Return an error in Anthropic's words."""
    shown: dict[str, Any] = {"type": _ERROR_TYPES.get(error.status, "api_error"), "message": error.message}
    if isinstance(error, UnsupportedThreadError):  # by this code the client knows that it has to go on without one
        shown["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return shown


def error_json(error: KunServeError, request_id: str = "") -> bytes:
    """Return the body of an error answer, as Anthropic's clients read it."""
    return orjson.dumps({"type": "error", "error": error_details(error), "request_id": request_id})


def is_ours(request: web.BaseRequest) -> bool:
    """Return whether the client that asks is one of Anthropic's; only they tell a version of that API."""
    return request.path.startswith(PREFIX) or "anthropic-version" in request.headers
