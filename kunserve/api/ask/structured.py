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
    try:
        return Structure("json", orjson.dumps(schema).decode(), param)
    except TypeError:  # orjson reads more levels than it writes
        raise InvalidRequestError(f"`{param}` is nested too deeply.", param=param) from None


def read_structure(fields: Fields) -> Structure | None:
    """The structure that `response_format`, `structured_outputs` or the older `guided_*` ask for, if one does."""
    found = [*_of_response_format(fields), *_of_options(fields.object("structured_outputs"), "structured_outputs.", "")]
    found += _of_options(fields, "", "guided_")
    if len(found) > 1:
        params = " and ".join(f"`{structure.param}`" for structure in found[:2])
        raise InvalidRequestError(f"{params} exclude each other.", param=found[1].param)
    return found[0] if found else None


def _of_response_format(fields: Fields) -> list[Structure]:
    form = fields.object("response_format")
    match form.string("type", "text"):
        case "text":
            return []
        case "json_object":
            return [json_structure({"type": "object"}, "response_format")]
        case "json_schema":
            described = form.object("json_schema")
            schema = described.any("schema")
            if not isinstance(schema, dict | bool):
                wrong_type("response_format.json_schema.schema", "a JSON schema", schema)
            return [json_structure(schema, "response_format")]
    raise InvalidRequestError(
        "`response_format` must have type text, json_object or json_schema.", param="response_format"
    )


def _of_options(options: Fields, prefix: str, name_prefix: str) -> list[Structure]:
    found = []
    for kind in ("json", "regex", "choice", "grammar"):
        name = name_prefix + kind
        param, value = prefix + name, options.any(name)
        if value is None:
            continue
        if kind == "json":
            found.append(_of_schema(value, param))
        elif kind == "choice":
            if not is_str_list(value) or not value:
                wrong_type(param, "a list of strings", value)
            found.append(Structure("choice", orjson.dumps(value).decode(), param))
        elif not isinstance(value, str):
            wrong_type(param, "a string", value)
        else:
            found.append(Structure("regex" if kind == "regex" else "grammar", value, param))
    if name_prefix == "":
        options.unsupported("structural_tag")
        if options.boolean("json_object"):
            found.append(json_structure({"type": "object"}, prefix + "json_object"))
    return found


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
