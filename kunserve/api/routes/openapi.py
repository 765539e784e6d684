"""GET /openapi.json: the routes and what they are declared to take, as an OpenAPI 3.1 document."""

from __future__ import annotations

import re
from typing import Any

from msgspec import Struct

from kunserve.api.ask.declared.anthropic import AnthropicMessages, Counted
from kunserve.api.ask.declared.chat import Chat, Tokenize
from kunserve.api.ask.declared.fields import body_schema
from kunserve.api.ask.declared.generation import Completion
from kunserve.api.ask.declared.others import Burst, Detokenize, Drop, Groups, Remove, Resume
from kunserve.api.ask.declared.responses import Response

Schema = dict[str, Any]

# path -> method, summary, body
ROUTES: tuple[tuple[str, str, str, type[Struct] | None], ...] = (
    ("/v1/completions", "post", "Continue a prompt", Completion),
    ("/v1/chat/completions", "post", "Answer a conversation", Chat),
    ("/v1/responses", "post", "Answer a conversation, as OpenAI's Responses", Response),
    ("/v1/responses/input_tokens", "post", "Tokens of a conversation", Response),
    ("/v1/responses/{id}", "get", "A stored response", None),
    ("/v1/responses/{id}", "delete", "Forget a stored response", None),
    ("/v1/responses/{id}/input_items", "get", "What a stored response answered", None),
    ("/v1/messages", "post", "Answer a conversation, as Anthropic's Messages", AnthropicMessages),
    ("/v1/messages/count_tokens", "post", "Tokens of a conversation", Counted),
    ("/v1/models", "get", "Names of the model", None),
    ("/v1/models/{name}", "get", "One name of the model", None),
    ("/tokenize", "post", "Text or a conversation to token ids", Tokenize),
    ("/detokenize", "post", "Token ids to text", Detokenize),
    ("/tokenizer_info", "get", "Special tokens and the chat template", None),
    ("/load", "get", "How many requests there are", None),
    ("/health", "get", "200 while the engine makes progress; status `degraded` if some devices do not", None),
    ("/ping", "get", "As /health", None),
    ("/ready", "get", "200 while new requests are welcome; answers as /health", None),
    ("/version", "get", "Version of the server", None),
    ("/openapi.json", "get", "This document", None),
    ("/docs", "get", "This document, to read", None),
    ("/metrics", "get", "Prometheus metrics", None),
    ("/", "get", "A page that shows the server", None),
    ("/page/{name}", "get", "A file of that page", None),
    ("/kunserve/state", "get", "Devices, groups, requests", None),
    ("/kunserve/events", "get", "What /kunserve/state shows, as it changes: server-sent events", None),
    ("/kunserve/resume", "post", "The rest of a stream that another server has begun; needs a front's key", Resume),
    ("/kunserve/burst", "post", "A burst of made-up requests; answers when it is over; needs the admin key", Burst),
    ("/kunserve/drop", "post", "Merge groups; needs the admin key", Drop),
    ("/kunserve/restore", "post", "Split groups; needs the admin key", Groups),
    ("/kunserve/devices/{index}/remove", "post", "Take a device out of service; needs the admin key", Remove),
    ("/kunserve/devices/{index}/add", "post", "Take a device back into service; needs the admin key", None),
)
_ERRORS = {
    "400": "A wrong type or value; the error names the field",
    "401": "The key is missing or wrong",
    "403": "Nobody may do this",
    "404": "No such model, or no such device",
    "409": "Not now, for instance because another transition runs",
    "413": "The body is too large",
    "500": "A step failed",
    "503": "The queue is full, or the server loads or stops; Retry-After says when to come back",
}
_NULLABLE = {"type": ["string", "null"]}
_DETAILS = {"message": {"type": "string"}, "type": {"type": "string"}, "param": _NULLABLE, "code": {"type": "integer"}}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type"], "properties": _DETAILS}},
}
_ANTHROPIC_ERROR = {"type": "object"}


def prepare() -> None:
    """Work out what the bodies are declared to be, so that no request has to wait for that."""
    for _, _, _, body in ROUTES:
        if body is not None:
            body_schema(body)


def openapi_document(version: str) -> dict[str, Any]:
    """Return the whole document."""
    paths: dict[str, Any] = {}
    for path, method, summary, body in ROUTES:
        paths.setdefault(path, {})[method] = _operation(path, summary, body)
    return {
        "openapi": "3.1.0",
        "info": {"title": "KunServe", "version": version},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(path: str, summary: str, body: type[Struct] | None) -> dict[str, Any]:
    error = {"application/json": {"schema": _ANTHROPIC_ERROR if path.startswith("/v1/messages") else _ERROR}}
    answers: dict[str, Any] = {"200": {"description": "The answer"}}
    answers |= {status: {"description": text, "content": error} for status, text in _ERRORS.items()}
    operation: dict[str, Any] = {"summary": summary, "responses": answers, "security": [{}, {"key": []}]}
    if body is not None:
        schema = body_schema(body)
        is_required = bool(schema["required"])
        operation["requestBody"] = {"required": is_required, "content": {"application/json": {"schema": schema}}}
    if names := re.findall("{(.+?)}", path):
        operation["parameters"] = [
            {
                "name": name,
                "in": "path",
                "required": True,
                "schema": {"type": "integer" if name == "index" else "string"},
            }
            for name in names
        ]
    return operation
