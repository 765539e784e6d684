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


NOT_TAKEN = "not taken: it "


@dataclass(frozen=True, slots=True)
class Kept:
    """In an annotation: the value is checked as another type, and stays as it came."""

    type: Any


@dataclass(frozen=True, slots=True)
class Refused:
    """In an annotation: the field must ask for nothing; `reason` is how the error about it ends."""

    reason: str = "is not supported"


@dataclass(frozen=True, slots=True)
class Alternative:
    """One type that a value may have."""

    type: Any
    schema: Schema
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
    type: Any = None  # all alternatives in one, if msgspec takes them so
    keeps: bool = False
    refused: Refused | None = None
    schema: Schema = field(default_factory=dict)


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
def fields_of(declared: type[msgspec.Struct]) -> tuple[Field, ...]:
    """Return the fields of a body."""
    hints = get_type_hints(declared, include_extras=True)
    return tuple(
        _field(each.name, hints[each.name], each.default, each.required) for each in msgspec.structs.fields(declared)
    )


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
    whole = None if sum(each.item is not None and each.key is None for each in alternatives) > 1 else Union[*types]
    return Field(name, alternatives, is_required, whole, keeps=kept is not None, schema=schema)


def _types(hint: Any) -> list[Any]:
    """Return the types that a hint allows, None left out: absent and null are one."""
    if get_origin(hint) in (Union, UnionType):
        return [each for part in get_args(hint) for each in _types(part)]
    return [] if hint is NoneType else [hint]


def _alternative(hint: Any) -> Alternative:
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    origin, parts = get_origin(bare), get_args(bare)
    if origin is list and not _is_any(parts[0]):
        return Alternative(hint, schema_of(hint), item=_alternative(parts[0]))
    if origin is dict and not _is_any(parts[1]):
        return Alternative(hint, schema_of(hint), item=_alternative(parts[1]), key=_alternative(parts[0]))
    return Alternative(hint, schema_of(hint))


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
    fields = fields_of(declared)
    return {
        "type": "object",
        "required": [each.name for each in fields if each.is_required],
        "properties": {each.name: each.schema for each in fields},
    }
