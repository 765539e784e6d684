"""GET /openapi.json: the routes and what they take, as an OpenAPI 3.1 document. A test holds it against the routes."""

from __future__ import annotations

import re
from typing import Any

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


_STREAM = {"stream": BOOLEAN, "stream_options": _fields((), include_usage=BOOLEAN, continuous_usage_stats=BOOLEAN)}

GENERATION: dict[str, Schema] = {
    "model": STRING,
    "max_tokens": _integer(0),
    "max_completion_tokens": _integer(0),
    "min_tokens": _integer(0),
    "n": _integer(1, 128),
    "best_of": _integer(1),
    "temperature": _number(0),
    "top_p": _number(0, 1),
    "top_k": _integer(-1),
    "min_p": _number(0, 1),
    "seed": _integer(),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.01, 100),
    "logit_bias": {"type": "object", "additionalProperties": _number(-100, 100)},
    "stop": _any_of(STRING, STRINGS),
    "stop_token_ids": TOKEN_IDS,
    "include_stop_str_in_output": BOOLEAN,
    "ignore_eos": BOOLEAN,
    "skip_special_tokens": BOOLEAN,
    "add_special_tokens": BOOLEAN,
    "bad_words": STRINGS,
    "allowed_token_ids": TOKEN_IDS,
    "prompt_logprobs": _integer(0, 20),
    "truncate_prompt_tokens": _integer(-1),
    "truncation_side": {"enum": ["left", "right"]},
    "return_token_ids": BOOLEAN,
    "priority": _integer(-(2**31), 2**31 - 1),
    "cache_salt": STRING,
    "request_id": STRING,
    "user": STRING,
    "safety_identifier": STRING,
    "return_tokens_as_token_ids": BOOLEAN,
    "response_format": _fields(
        ("type",), type={"enum": ["text", "json_object", "json_schema", "regex", "grammar"]}, json_schema=OBJECT
    ),
    "structured_outputs": _fields(
        (), json=_any_of(OBJECT, STRING), regex=STRING, choice=STRINGS, grammar=STRING, json_object=BOOLEAN
    ),
    **_STREAM,
}
COMPLETION = _fields(
    ("prompt",),
    prompt=_any_of(STRING, STRINGS, TOKEN_IDS, {"type": "array", "items": TOKEN_IDS}),
    echo=BOOLEAN,
    logprobs=_integer(0, 20),
    **GENERATION,
)
_MESSAGE = _fields(
    ("role",),
    role=STRING,
    content=_any_of(STRING, {"type": "array"}),
    tool_calls={"type": "array"},
    tool_call_id=STRING,
)
_FUNCTION = _fields(("name",), name=STRING, description=STRING, parameters=OBJECT)
_TOOL = _fields(("type", "function"), type={"const": "function"}, function=_FUNCTION)
_MESSAGES = {"type": "array", "items": _MESSAGE, "minItems": 1}
CHAT = _fields(
    ("messages",),
    messages=_MESSAGES,
    tools={"type": "array", "items": _TOOL},
    tool_choice=_any_of({"enum": ["none", "auto", "required"]}, OBJECT),
    parallel_tool_calls=BOOLEAN,
    logprobs=BOOLEAN,
    top_logprobs=_integer(0, 20),
    add_generation_prompt=BOOLEAN,
    continue_final_message=BOOLEAN,
    chat_template_kwargs=OBJECT,
    reasoning_effort=STRING,
    modalities={"const": ["text"]},
    **GENERATION,
)
RESPONSE = _fields(
    ("input",),
    input=_any_of(STRING, {"type": "array", "items": OBJECT}),
    instructions=STRING,
    max_output_tokens=_integer(1),
    model=STRING,
    temperature=_number(0),
    top_p=GENERATION["top_p"],
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
    top_p=GENERATION["top_p"],
    top_k=_integer(-1),
    stream=BOOLEAN,
    metadata=OBJECT,
    output_config=_fields((), format=_fields(("type", "schema"), type={"const": "json_schema"}, schema=OBJECT)),
    **_ANTHROPIC,
)
COUNT_TOKENS = _fields(("messages",), **_ANTHROPIC)
TOKENIZE = _fields(
    (), prompt=STRING, messages=_MESSAGES, model=STRING, add_special_tokens=BOOLEAN, return_token_strs=BOOLEAN
)
DETOKENIZE = _fields(("tokens",), tokens=TOKEN_IDS, model=STRING)
BURST = _fields(
    (),
    requests=_integer(1, 1000),
    rate={"type": "number", "minimum": 0.01, "maximum": 1000},
    prompt_tokens=_integer(1),
    output_tokens=_integer(1),
)
GROUPS = _fields((), groups={"type": "array", "items": {"type": "integer"}})

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
