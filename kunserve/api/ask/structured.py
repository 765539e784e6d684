"""Structured output: what a client asks for (a schema, a regex, choices, a grammar), read and compiled."""

from __future__ import annotations

from typing import Any, Literal

import orjson
from aiohttp import web

from kunserve.api.ask.declared.chat import ChatOptions
from kunserve.api.ask.declared.generation import Completion, ResponseFormat, StructuredOutputs
from kunserve.api.wire.access import owner_of
from kunserve.api.wire.context import Api
from kunserve.api.wire.fields import wrong_type
from kunserve.api.wire.grammars import Begun, Structure
from kunserve.errors import InvalidRequestError


def json_structure(schema: object, param: str) -> Structure:
    """Return a structure: JSON that matches `schema`. InvalidRequestError if it is nested too deeply."""
    return Structure("json", _json(schema, param), param)


def calls_structure(tools: object, param: str) -> Structure:
    """Return a structure: a list of calls of `tools` (`Structure.value`). Errors as of `json_structure`."""
    return Structure("calls", _json(tools, param), param)


def _json(value: object, param: str) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # orjson reads more levels than it writes
        raise InvalidRequestError(f"`{param}` is nested too deeply.", param=param) from None


def read_structure(asked: Completion | ChatOptions) -> Structure | None:
    """Return the structure that one of the fields for it asks for, if one does."""
    format, options = asked.response_format, asked.structured_outputs
    found = [] if format is None else _of_response_format(format)
    found += [] if options is None else _of_options(options)
    found += [
        _of_option(kind, value, name)
        for name, kind in PLACES.items()
        if (value := getattr(asked, name)) is not None and value != ""
    ]
    if len(found) > 1:
        params = " and ".join(f"`{structure.param}`" for structure in found[:2])
        raise InvalidRequestError(f"{params} exclude each other.", param=found[1].param)
    return found[0] if found else None


Kind = Literal["json", "regex", "choice", "grammar"]
KINDS: tuple[Kind, ...] = ("json", "regex", "choice", "grammar")
# Fields beside the messages, or the prompt: of older vLLM, of SGLang and of llama.cpp.
PLACES: dict[str, Kind] = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
    "grammar": "grammar",
}


def _of_response_format(format: ResponseFormat) -> list[Structure]:
    match format.type:
        case "text" | None:
            return []
        case "json_object" | "json_schema" | "json":
            return [_of_json_format(format)]
    text = format.value or (format.regex if format.type == "regex" else format.grammar) or format.pattern
    if not isinstance(text, str):
        wrong_type(f"response_format.{format.type}", "a string", text)
    return [Structure(format.type, text, "response_format")]


def _of_json_format(format: ResponseFormat) -> Structure:
    """Read a schema in any of the places where servers look for it: OpenAI's, or beside the type."""
    inner = format.json_schema
    fields: dict[str, object] = {
        "response_format.schema": format.schema,
        "response_format.value": format.value,
    }
    if inner is not None and "schema" not in inner and _is_schema(inner):
        fields["response_format.json_schema"] = inner
    elif inner is not None:
        fields["response_format.json_schema.schema"] = inner.get("schema")
    given = {field: schema for field, schema in fields.items() if schema is not None}
    if len(given) > 1:
        text = f"{' and '.join(f'`{field}`' for field in given)} exclude each other."
        raise InvalidRequestError(text, param="response_format")
    if not given and format.type == "json_object":
        return json_structure({"type": "object"}, "response_format")
    field, schema = next(iter(given.items()), ("response_format.json_schema.schema", None))
    if not isinstance(schema, dict | bool):
        wrong_type(field, "a JSON schema", schema)
    return json_structure(schema, "response_format")


def _is_schema(inner: dict[str, Any]) -> bool:
    """Return whether what should hold a schema is one. /v1/responses repeats the format's own type there."""
    return bool(inner.keys() & _SCHEMA_WORDS) and inner.get("type") != "json_schema"


_SCHEMA_WORDS = frozenset({"type", "properties", "$ref", "anyOf", "oneOf", "allOf", "enum", "const", "items"})


def _of_options(options: StructuredOutputs) -> list[Structure]:
    found = [
        _of_option(kind, value, f"structured_outputs.{kind}")
        for kind in KINDS
        if (value := getattr(options, kind)) is not None
    ]
    if options.json_object:
        found.append(json_structure({"type": "object"}, "structured_outputs.json_object"))
    return found


def _of_option(kind: Kind, value: Any, param: str) -> Structure:
    if kind == "json":
        return _of_schema(value, param)
    return Structure(kind, orjson.dumps(value).decode() if kind == "choice" else value, param)


def _of_schema(value: object, param: str) -> Structure:
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            raise InvalidRequestError(f"`{param}` is not JSON.", param=param) from None
    if not isinstance(value, dict | bool):
        wrong_type(param, "a JSON schema", value)
    return json_structure(value, param)


async def compile_structure(
    request: web.Request, api: Api, structure: Structure | None, user: str, reasons: bool
) -> Begun | None:
    """Return the constraint that the client asked for. Clients take turns, by address if nothing else is known."""
    if structure is None:
        return None
    grammars = api.grammars
    if grammars is None:
        raise InvalidRequestError(f"`{structure.param}` is not supported by this server.", param=structure.param)
    owner = owner_of(request, user) or f"address {request.remote}"
    return await grammars.compile(structure, reasons, owner)
