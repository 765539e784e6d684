"""In a structure's process: what several schemas say of one value, keyword by keyword, as one schema."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from kunserve.grammar.limits import RefusedError
from kunserve.grammar.schema.parts import Resolve, Schema, dict_of, list_of, values_of
from kunserve.grammar.schema.patterns import FORMATS, KNOWN_FORMATS, plain_patterns

# Of an object's other properties, by one who has spoken of them.
SPOKEN = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames"})
OBJECT = SPOKEN | {"properties", "required"}
_VALUES = (
    *("type", "enum", "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
)


class UnsupportedTextError(RefusedError):
    """A string cannot be held to the format that is asked for."""


class Writer(Protocol):
    """Writes subschemas."""

    def write(self, schemas: Sequence[Any], closes: bool) -> Any:
        """Return one schema for what satisfies all of `schemas`."""

    def resolve(self, reference: object) -> Any:
        """Return what a reference leads to."""


def merged_values(parts: Iterable[Schema]) -> Schema:
    """Return what is said of numbers, strings, lengths and types; what is said twice is in `allOf`."""
    plain: Schema = {}
    again: list[Schema] = []

    def say(keyword: str, value: Any) -> None:
        if keyword not in plain:
            plain[keyword] = value
        elif keyword == "type" and (types := _common_types(plain["type"], value)):
            plain["type"] = types
        elif repr(plain[keyword]) != repr(value):
            again.append({keyword: value})

    for part in parts:
        for keyword in _VALUES:
            if keyword in part:
                say(keyword, part[keyword])
        if part.get("format") in KNOWN_FORMATS:  # any other is an annotation
            say("format", part["format"])
        if isinstance(pattern := part.get("pattern"), str):
            for one in _usable(pattern):
                say("pattern", one)
        elif pattern is not None:
            raise RefusedError("`pattern` must be a string")
    return {**plain, "allOf": again} if again else plain


def _usable(pattern: str) -> tuple[str, ...]:
    patterns = plain_patterns(pattern)
    if patterns is None:
        raise UnsupportedTextError(f"the pattern {pattern[:100]!r} is not supported: it looks around, or back")
    return patterns


def _common_types(one: Any, other: Any) -> Any:
    """Return the types in both; nothing if there is none, or one is no type."""
    ours, theirs = ([types] if isinstance(types, str) else types for types in (one, other))
    if not (isinstance(ours, list) and isinstance(theirs, list)):
        return None
    common = [name for name in ours if name in theirs or (name == "integer" and "number" in theirs)]
    common += [name for name in theirs if name == "integer" and "number" in ours and name not in common]
    return common[0] if len(common) == 1 else common


def merged_array(writer: Writer, parts: Iterable[Schema], closes: bool) -> Schema:
    """Return what is said of items: of each of the first ones, and of all others."""
    speaking = [part for part in parts if part.keys() & {"items", "prefixItems"}]
    plain: Schema = {}
    prefixes = [list_of(part, "prefixItems") for part in speaking]
    if num_first := max(map(len, prefixes), default=0):
        plain["prefixItems"] = [
            writer.write([_item(part, prefix, index) for part, prefix in zip(speaking, prefixes, strict=True)], closes)
            for index in range(num_first)
        ]
    if rest := [part["items"] for part in speaking if "items" in part]:
        plain["items"] = writer.write(rest, closes)
    return plain


def _item(part: Schema, prefix: list[Any], index: int) -> Any:
    return prefix[index] if index < len(prefix) else part.get("items", True)


def merged_object(writer: Writer, parts: list[Schema], closes: bool, other_names: Iterable[str]) -> Schema | None:
    """Return what is said of properties; None if nothing can satisfy it.

    With `closes`, there are no others than those that are named here or in `other_names`, unless a part has spoken.
    """
    spoken = any(SPOKEN & part.keys() for part in parts)
    is_closed = closes and not spoken and any("properties" in part for part in parts)
    required = _required(parts)
    names = dict.fromkeys(name for part in parts for name in dict_of(part, "properties"))
    names |= dict.fromkeys(required if is_closed or len(parts) > 1 else ())
    others = [part["additionalProperties"] for part in parts if "additionalProperties" in part]
    others = others or [part["unevaluatedProperties"] for part in parts if "unevaluatedProperties" in part]
    said = {name: [found for part in parts if (found := _of_name(part, name)) is not None] for name in names}
    name_schemas = [part["propertyNames"] for part in parts if "propertyNames" in part]
    patterns = {
        pattern: writer.write([schema], closes)
        for part in parts
        for pattern, schema in dict_of(part, "patternProperties").items()
    }
    allowed, pattern = _names_allowed(name_schemas, writer.resolve)
    if (allowed is not None or pattern is not None) and patterns:
        raise RefusedError("`propertyNames` is not supported beside `patternProperties`")
    if allowed is not None:
        said = {name: said.get(name, others) for name in allowed}
        others = [False]
    elif pattern is not None:
        patterns, others = {pattern: writer.write(others, closes)}, [False]
    properties = {name: writer.write(schemas, closes) for name, schemas in said.items()}
    if is_closed:
        properties |= {name: True for name in other_names if name not in properties}
        others = [False]
    if any(properties.get(name) is False for name in required):
        return None
    plain: Schema = {"properties": properties} if properties or is_closed else {}
    if required:
        plain["required"] = required
    if patterns:
        plain["patternProperties"] = patterns
    if others:
        plain["additionalProperties"] = writer.write(others, closes)
    return plain


def _required(parts: Iterable[Schema]) -> list[str]:
    names: dict[str, None] = {}
    for part in parts:
        given = part.get("required")
        if isinstance(given, bool):  # of the property itself, as draft 3 had it: it means nothing here
            continue
        listed = list_of(part, "required")
        if not all(isinstance(name, str) for name in listed):
            raise RefusedError("`required` must be a list of names")
        names |= dict.fromkeys(listed)
    return list(names)


def _of_name(part: Schema, name: str) -> Any:
    """Return what a part says of a property; None if nothing."""
    properties = dict_of(part, "properties")
    if name in properties:
        return properties[name]
    return None if "patternProperties" in part else part.get("additionalProperties")


def _names_allowed(schemas: Sequence[Any], resolve: Resolve) -> tuple[list[str] | None, str | None]:
    """Return the names that properties may have, or a regex that they match; neither if there may be any."""
    allowed: list[str] | None = None
    patterns: dict[str, None] = {}
    for schema in schemas:
        values = values_of(schema, resolve)
        if values is not None:
            names = [value for value in values if isinstance(value, str)]
            allowed = names if allowed is None else [name for name in allowed if name in names]
        else:
            patterns |= dict.fromkeys(_patterns_of_names(schema, resolve))
    if len(patterns) > 1 or (patterns and allowed is not None):
        raise RefusedError("`propertyNames` is supported with values, a pattern, lengths or a format, one at a time")
    return allowed, next(iter(patterns), None)


def _patterns_of_names(schema: Any, resolve: Resolve) -> list[str]:
    if isinstance(schema, dict) and "$ref" in schema:
        schema = resolve(schema["$ref"])
    if schema is True:
        return []
    if not isinstance(schema, dict) or schema.keys() & {"anyOf", "oneOf", "allOf", "not", "if", "$ref"}:
        raise RefusedError("`propertyNames` is supported with values, a pattern, lengths or a format")
    found: list[str] = []
    if isinstance(schema.get("pattern"), str):
        found += _usable(schema["pattern"])
    if "minLength" in schema or "maxLength" in schema:
        found.append(rf"^[\s\S]{{{int(schema.get('minLength', 0))},{schema.get('maxLength', '')}}}$")
    if schema.get("format") in FORMATS:
        found.append(FORMATS[schema["format"]])
    return found
