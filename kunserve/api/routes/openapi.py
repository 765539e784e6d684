"""GET /openapi.json: the routes and what they take, as an OpenAPI 3.1 document. A test holds it against the routes."""

from __future__ import annotations

import re
from typing import Any

from kunserve.api.ask.declared.chat import Chat, Tokenize
from kunserve.api.ask.declared.fields import body_schema
from kunserve.api.ask.declared.generation import Completion
from kunserve.api.ask.declared.others import Burst, Detokenize, Groups

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
STRINGS: Schema = {"type": "array", "items": STRING}
TOKEN_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}


def _integer(low: int | None = None, high: int | None = None) -> Schema:
    bounds = {"minimum": low, "maximum": high}
    return {"type": "integer", **{name: bound for name, bound in bounds.items() if bound is not None}}


def _number(low: float, high: float | None = None) -> Schema:
    return {"type": "number", "minimum": low} | ({} if high is None else {"maximum": high})


def _any_of(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _fields(required: tuple[str, ...], **properties: Schema) -> Schema:
    """An object; fields that are not required may be null, unknown ones are ignored."""
    shown = {
        name: schema if name in required else _any_of(schema, {"type": "null"}) for name, schema in properties.items()
    }
    return {"type": "object", "required": list(required), "properties": shown}


_TOP_P = _number(0, 1)
COMPLETION, CHAT = body_schema(Completion), body_schema(Chat)
RESPONSE = _fields(
    ("input",),
    input=_any_of(STRING, {"type": "array", "items": OBJECT}),
    instructions=STRING,
    max_output_tokens=_integer(1),
    model=STRING,
    temperature=_number(0),
    top_p=_TOP_P,
    tools={"type": "array", "items": OBJECT},
    tool_choice=_any_of(STRING, OBJECT),
    parallel_tool_calls=BOOLEAN,
    text=_fields((), format=OBJECT),
    reasoning=_fields((), effort=STRING),
    metadata=OBJECT,
    store=BOOLEAN,
    previous_response_id=STRING,
    include=STRINGS,
    top_logprobs=_integer(0, 20),
    truncation={"enum": ["auto", "disabled"]},
    max_tool_calls=_integer(1),
    safety_identifier=STRING,
    prompt_cache_key=STRING,
    service_tier=STRING,
    stream=BOOLEAN,
)
_ANTHROPIC: dict[str, Schema] = {
    "messages": {
        "type": "array",
        "items": _fields(("role", "content"), role=STRING, content=_any_of(STRING, {"type": "array"})),
    },
    "system": _any_of(STRING, {"type": "array", "items": OBJECT}),
    "model": STRING,
    "tools": {"type": "array", "items": _fields(("name",), name=STRING, input_schema=OBJECT)},
    "tool_choice": _fields(("type",), type={"enum": ["auto", "any", "tool", "none"]}, name=STRING),
    "thinking": _fields(("type",), type=STRING),
}
MESSAGES = _fields(
    ("messages", "max_tokens"),
    max_tokens=_integer(1),
    stop_sequences=STRINGS,
    temperature=_number(0),
    top_p=_TOP_P,
    top_k=_integer(-1),
    stream=BOOLEAN,
    metadata=OBJECT,
    output_config=_fields((), format=_fields(("type", "schema"), type={"const": "json_schema"}, schema=OBJECT)),
    **_ANTHROPIC,
)
COUNT_TOKENS = _fields(("messages",), **_ANTHROPIC)
TOKENIZE, DETOKENIZE, BURST, GROUPS = map(body_schema, (Tokenize, Detokenize, Burst, Groups))

# path -> method, summary, body
ROUTES: tuple[tuple[str, str, str, Schema | None], ...] = (
    ("/v1/completions", "post", "Continue a prompt", COMPLETION),
    ("/v1/chat/completions", "post", "Answer a conversation", CHAT),
    ("/v1/responses", "post", "Answer a conversation, as OpenAI's Responses", RESPONSE),
    ("/v1/responses/input_tokens", "post", "Tokens of a conversation", RESPONSE),
    ("/v1/responses/{id}", "get", "A stored response", None),
    ("/v1/responses/{id}", "delete", "Forget a stored response", None),
    ("/v1/responses/{id}/input_items", "get", "What a stored response answered", None),
    ("/v1/messages", "post", "Answer a conversation, as Anthropic's Messages", MESSAGES),
    ("/v1/messages/count_tokens", "post", "Tokens of a conversation", COUNT_TOKENS),
    ("/v1/models", "get", "Names of the model", None),
    ("/v1/models/{name}", "get", "One name of the model", None),
    ("/tokenize", "post", "Text or a conversation to token ids", TOKENIZE),
    ("/detokenize", "post", "Token ids to text", DETOKENIZE),
    ("/tokenizer_info", "get", "Special tokens and the chat template", None),
    ("/load", "get", "How many requests there are", None),
    ("/health", "get", "200 while the engine makes progress", None),
    ("/ping", "get", "As /health", None),
    ("/ready", "get", "200 while new requests are welcome", None),
    ("/version", "get", "Version of the server", None),
    ("/openapi.json", "get", "This document", None),
    ("/docs", "get", "This document, to read", None),
    ("/metrics", "get", "Prometheus metrics", None),
    ("/", "get", "A page that shows the server", None),
    ("/page/{name}", "get", "A file of that page", None),
    ("/kunserve/state", "get", "Devices, groups, requests", None),
    ("/kunserve/events", "get", "What /kunserve/state shows, as it changes: server-sent events", None),
    ("/kunserve/burst", "post", "A burst of made-up requests; answers when it is over; needs the admin key", BURST),
    ("/kunserve/drop", "post", "Merge groups; needs the admin key", GROUPS),
    ("/kunserve/restore", "post", "Split groups; needs the admin key", GROUPS),
)
_ERRORS = {
    "400": "A wrong type or value; the error names the field",
    "401": "The key is missing or wrong",
    "403": "Nobody may do this",
    "404": "No such model",
    "409": "Not now: another transition runs",
    "413": "The body is too large",
    "500": "A step failed",
    "503": "The queue is full, or the server loads or stops; Retry-After says when to come back",
}
_ERROR = _fields(
    ("error",), error=_fields(("message", "type"), message=STRING, type=STRING, param=STRING, code=_integer())
)


def openapi_document(version: str) -> dict[str, Any]:
    """The whole document."""
    paths: dict[str, Any] = {}
    for path, method, summary, body in ROUTES:
        paths.setdefault(path, {})[method] = _operation(path, summary, body)
    return {
        "openapi": "3.1.0",
        "info": {"title": "KunServe", "version": version},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(path: str, summary: str, body: Schema | None) -> dict[str, Any]:
    error = {"application/json": {"schema": OBJECT if path.startswith("/v1/messages") else _ERROR}}
    answers: dict[str, Any] = {"200": {"description": "The answer"}}
    answers |= {status: {"description": text, "content": error} for status, text in _ERRORS.items()}
    operation: dict[str, Any] = {"summary": summary, "responses": answers, "security": [{}, {"key": []}]}
    if body is not None:
        is_required = bool(body["required"])
        operation["requestBody"] = {"required": is_required, "content": {"application/json": {"schema": body}}}
    if names := re.findall("{(.+?)}", path):
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": STRING} for name in names]
    return operation
