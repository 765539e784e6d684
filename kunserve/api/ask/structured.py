"""Structured output: what a client asks for (a schema, a regex, choices, a grammar), read and compiled."""

from __future__ import annotations

import orjson
from aiohttp import web

from kunserve.api.wire.access import owner_of
from kunserve.api.wire.context import Api
from kunserve.api.wire.fields import Fields, is_str_list, wrong_type
from kunserve.api.wire.grammars import Structure
from kunserve.engine.text.constraint import GrammarConstraint
from kunserve.errors import InvalidRequestError


def json_structure(schema: object, param: str) -> Structure:
    """Output is JSON that matches `schema`. InvalidRequestError if it is nested too deeply."""
    return Structure("json", _json(schema, param), param)


def calls_structure(tools: object, param: str) -> Structure:
    """Output is a list of calls of `tools` (`Structure.value`). InvalidRequestError as of `json_structure`."""
    return Structure("calls", _json(tools, param), param)


def _json(value: object, param: str) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # orjson reads more levels than it writes
        raise InvalidRequestError(f"`{param}` is nested too deeply.", param=param) from None


def read_structure(fields: Fields) -> Structure | None:
    """The structure that `response_format`, `structured_outputs` or the older `guided_*` ask for, if one does."""
    found = [*_of_response_format(fields), *_of_options(fields.object("structured_outputs"), "structured_outputs.", "")]
    found += [*_of_options(fields, "", "guided_"), *_of_other_servers(fields)]
    if len(found) > 1:
        params = " and ".join(f"`{structure.param}`" for structure in found[:2])
        raise InvalidRequestError(f"{params} exclude each other.", param=found[1].param)
    return found[0] if found else None


def _of_response_format(fields: Fields) -> list[Structure]:
    form = fields.object("response_format")
    match form.string("type", "text"):
        case "text":
            return []
        case "json_object" | "json_schema" | "json" as kind:
            return [_of_json_format(form, kind)]
        case "regex" | "grammar" as kind:  # TGI and others
            text = form.string("value", None) or form.string(kind, None) or form.string("pattern", None)
            if text is None:
                wrong_type(f"response_format.{kind}", "a string", None)
            return [Structure(kind, text, "response_format")]
    raise InvalidRequestError(
        "`response_format` must have type text, json_object, json_schema, regex or grammar.", param="response_format"
    )


def _of_json_format(form: Fields, kind: str) -> Structure:
    """Read a schema in any of the places where servers look for it: OpenAI's, or beside the type."""
    inner = form.any("json_schema")
    places = {"response_format.schema": form.any("schema"), "response_format.value": form.any("value")}
    if isinstance(inner, dict) and "schema" not in inner and _is_schema(inner):
        places["response_format.json_schema"] = inner
    elif inner is not None:
        places["response_format.json_schema.schema"] = form.object("json_schema").any("schema")
    given = {place: schema for place, schema in places.items() if schema is not None}
    if len(given) > 1:
        text = f"{' and '.join(f'`{place}`' for place in given)} exclude each other."
        raise InvalidRequestError(text, param="response_format")
    if not given and kind == "json_object":
        return json_structure({"type": "object"}, "response_format")
    place, schema = next(iter(given.items()), ("response_format.json_schema.schema", None))
    if not isinstance(schema, dict | bool):
        wrong_type(place, "a JSON schema", schema)
    return json_structure(schema, "response_format")


def _is_schema(inner: dict[str, object]) -> bool:
    """Whether what should hold a schema is one. /v1/responses repeats the format's own type there."""
    return bool(inner.keys() & _SCHEMA_WORDS) and inner.get("type") != "json_schema"


_SCHEMA_WORDS = frozenset({"type", "properties", "$ref", "anyOf", "oneOf", "allOf", "enum", "const", "items"})
_OTHERS = {"json_schema": "json", "regex": "regex", "ebnf": "grammar", "grammar": "grammar"}  # SGLang, llama.cpp


def _of_other_servers(fields: Fields) -> list[Structure]:
    """Return what stands where SGLang and llama.cpp look for it: beside the messages, or the prompt."""
    return [
        _of_option(kind, value, name) for name, kind in _OTHERS.items() if (value := fields.any(name)) not in (None, "")
    ]


def _of_options(options: Fields, prefix: str, name_prefix: str) -> list[Structure]:
    found = []
    for kind in ("json", "regex", "choice", "grammar"):
        if (value := options.any(name_prefix + kind)) is not None:
            found.append(_of_option(kind, value, prefix + name_prefix + kind))
    if name_prefix == "":
        options.unsupported("structural_tag")
        if options.boolean("json_object"):
            found.append(json_structure({"type": "object"}, prefix + "json_object"))
    return found


def _of_option(kind: str, value: object, param: str) -> Structure:
    if kind == "json":
        return _of_schema(value, param)
    if kind == "choice":
        if not is_str_list(value) or not value:
            wrong_type(param, "a list of strings", value)
        return Structure("choice", orjson.dumps(value).decode(), param)
    if not isinstance(value, str):
        wrong_type(param, "a string", value)
    return Structure("regex" if kind == "regex" else "grammar", value, param)


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
) -> GrammarConstraint | None:
    """The constraint for what the client asked for. Clients take turns, by address where nothing else is known."""
    if structure is None:
        return None
    grammars = api.grammars
    if grammars is None:
        raise InvalidRequestError(f"`{structure.param}` is not supported by this server.", param=structure.param)
    owner = owner_of(request, user) or f"address {request.remote}"
    return await grammars.compile(structure, reasons, owner)
