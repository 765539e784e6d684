"""A declared body, field by field: what a value may be, as msgspec checks it and as the document shows it.

A body is a msgspec Struct. Beyond what msgspec knows, a field may be one of several lists (a prompt is strings or token
ids), may be checked as something and kept as it came (`Kept`), or may have to ask for nothing (`Refused`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec

Schema = dict[str, Any]
# A Struct with a value of some type: msgspec works out what a type means once for a Struct, every time for others.
Holder = type[msgspec.Struct]
HELD = "value"

# What asks for nothing: clients send the fields of features that they do not use.
NOTHING: Schema = {
    "anyOf": [
        {"const": False},
        {"type": "string", "maxLength": 0},
        {"type": "array", "maxItems": 0},
        {"type": "object", "maxProperties": 0},
        {"type": "null"},
    ]
}
KINDS: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
    NoneType: "null",
}
NOT_TAKEN = "not taken: it "  # begins the description of a refused field
_ORDER = "x-order"  # key of a field's words in the order in which they are declared


@dataclass(frozen=True, slots=True)
class Kept:
    """Says in an annotation that the value is checked as another type, and stays as it came."""

    type: Any


@dataclass(frozen=True, slots=True)
class Refused:
    """Says in an annotation that the field must ask for nothing; `reason` is how the error about it ends."""

    reason: str = "is not supported"


def in_order(*words: str) -> msgspec.Meta:
    """Return an annotation that keeps the order of a field's words, which msgspec sorts, in schema and errors."""
    return msgspec.Meta(extra_json_schema={_ORDER: list(words)})


@dataclass(frozen=True, slots=True)
class Alternative:
    """One type that a value may have."""

    schema: Schema
    holder: Holder
    list_holder: Holder  # of a list of such values
    item: Alternative | None = None  # of a list; of an object, its values
    key: Alternative | None = None  # of an object

    def has_kind(self, value: object) -> bool:
        """Return whether a value is of this JSON type, whatever its bounds."""
        return has_kind(self.schema, value)


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a body."""

    name: str
    alternatives: tuple[Alternative, ...]
    is_required: bool
    holder: Holder | None = None  # of all alternatives in one, if msgspec takes them so
    keeps: bool = False
    refused: Refused | None = None
    schema: Schema = field(default_factory=dict)


def convert(value: object, holder: Holder) -> Any:
    """Return what msgspec makes of a value; msgspec.ValidationError if it does not fit."""
    return getattr(msgspec.convert({HELD: value}, holder), HELD)


def has_kind(schema: Schema, value: object) -> bool:
    """Return whether a value is of one of the JSON types that a schema without alternatives has."""
    if "enum" in schema or "const" in schema:
        known = schema.get("enum") or [schema["const"]]
        return any(type(value) is type(each) or (_is_whole(value) and type(each) is int) for each in known)
    kinds = ("integer", "number") if type(value) is int or _is_whole(value) else (KINDS[type(value)],)
    return schema.get("type", kinds[0]) in kinds


def _is_whole(value: object) -> bool:
    return type(value) is float and value.is_integer()


@cache
def fields_of(declared: type[msgspec.Struct]) -> dict[str, Field]:
    """Return the fields of a body by their names. The first time takes some ten milliseconds."""
    hints = get_type_hints(declared, include_extras=True)
    fields = msgspec.structs.fields(declared)
    return {each.name: _field(each.name, hints[each.name], each.default, each.required) for each in fields}


@cache
def required_of(declared: type[msgspec.Struct]) -> tuple[str, ...]:
    """Return the names of the fields that a body must have."""
    return tuple(name for name, field in fields_of(declared).items() if field.is_required)


def _field(name: str, hint: Any, default: Any, is_required: bool) -> Field:
    marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    refused = next((mark for mark in marks if isinstance(mark, Refused)), None)
    if refused is not None:
        return Field(
            name, (), False, refused=refused, schema={"description": f"{NOT_TAKEN}{refused.reason}", **NOTHING}
        )
    kept = next((mark for mark in marks if isinstance(mark, Kept)), None)
    types = _types(hint if kept is None else kept.type)
    alternatives = tuple(map(_alternative, types))
    schemas = [each.schema for each in alternatives]
    if not is_required:
        schemas.append({"type": "null"})
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    if not is_required and isinstance(default, str | int | float):
        schema = {**schema, "default": default}
    num_lists = sum(each.item is not None and each.key is None for each in alternatives)
    whole = None if num_lists > 1 else _holder(Union[*types])
    return Field(name, alternatives, is_required, whole, keeps=kept is not None, schema=schema)


def _types(hint: Any) -> list[Any]:
    """Return the types that a hint allows, None left out: absent and null are one."""
    if get_origin(hint) in (Union, UnionType):
        return [each for part in get_args(hint) for each in _types(part)]
    return [] if hint is NoneType else [hint]


def _alternative(hint: Any) -> Alternative:
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    origin, parts = get_origin(bare), get_args(bare)
    made = (schema_of(hint), _holder(hint), _holder(list[hint]))
    if origin is list and not _is_any(parts[0]):
        return Alternative(*made, item=_alternative(parts[0]))
    if origin is dict and not _is_any(parts[1]):
        return Alternative(*made, item=_alternative(parts[1]), key=_alternative(parts[0]))
    return Alternative(*made)


def _holder(hint: Any) -> Holder:
    return msgspec.defstruct("Holder", [(HELD, hint)])


def _is_any(hint: Any) -> bool:
    return hint is Any or get_args(hint)[:1] == (Any,)


def schema_of(hint: Any) -> Schema:
    """Return the JSON schema of a type, with everything in its place."""
    [schema], components = msgspec.json.schema_components([hint], ref_template="{name}")
    placed: Schema = _in_place(schema, components)
    return placed


def _in_place(schema: Any, components: Mapping[str, Any]) -> Any:
    """Put what is referred to where it is referred to; titles and nulls as defaults tell nothing."""
    if isinstance(schema, list):
        return [_in_place(each, components) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if _ORDER in schema:
        return {"enum": schema[_ORDER]}
    if "$ref" in schema:
        return _in_place({**components[schema["$ref"]], **{k: v for k, v in schema.items() if k != "$ref"}}, components)
    return {
        name: (
            {key: _in_place(each, components) for key, each in value.items()}
            if name == "properties"
            else _in_place(value, components)
        )
        for name, value in schema.items()
        if name != "title" and not (name == "default" and value is None)
    }


@cache
def body_schema(declared: type[msgspec.Struct]) -> Schema:
    """Return the schema of a body: fields that are not required may be null, unknown ones are ignored."""
    return {
        "type": "object",
        "required": list(required_of(declared)),
        "properties": {name: each.schema for name, each in fields_of(declared).items()},
    }
