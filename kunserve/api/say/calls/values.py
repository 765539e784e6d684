"""Arguments that a model writes as plain text, to JSON: of the type that the tool's own schema wants."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import orjson

_MOST_DEEP = 16  # references and options within each other
_INTEGER = re.compile(r"[+-]?\d{1,400}(\.0*)?")
_WORDS = {"true": "true", "false": "false", "True": "true", "False": "false"}  # Python's too: models know both
_NOTHING = ("null", "None")


class ArgumentTypes:
    """What types the arguments of one function may have."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        """Learn the types of arguments. `parameters`: the function's schema, as the client sent it."""
        self._root = parameters
        self._properties = _mapping(parameters.get("properties"))

    def is_text(self, name: str) -> bool:
        """Return whether an argument is nothing but a string, so that it can go out as it comes."""
        return self._types(self._properties.get(name)) <= {"string"}

    def to_json(self, name: str, text: str) -> str:
        """Return an argument as JSON: a string if nothing else is wanted that the text could be."""
        types = self._types(self._properties.get(name))
        for kind, convert in _CONVERTERS.items():
            if kind in types and (value := convert(text.strip())) is not None:
                return value
        return orjson.dumps(text).decode()

    def _types(self, schema: object, depth: int = 0) -> set[str]:
        """Return the types that a schema speaks of; none if it does not."""
        if not isinstance(schema, dict) or depth > _MOST_DEEP:
            return set()
        kind = schema.get("type")
        types = {kind} if isinstance(kind, str) else {each for each in _list(kind) if isinstance(each, str)}
        if not types:
            values = [schema["const"]] if "const" in schema else _list(schema.get("enum"))
            types = {_type_of(value) for value in values}
        if isinstance(reference := schema.get("$ref"), str):
            types |= self._types(self._target(reference), depth + 1)
        for options in ("anyOf", "oneOf", "allOf"):
            for option in _list(schema.get(options)):
                types |= self._types(option, depth + 1)
        return types

    def _target(self, reference: str) -> object:
        """Return what a reference within the schema leads to; None if nothing."""
        found: object = self._root
        for step in reference.removeprefix("#").split("/")[1:]:
            found = _mapping(found).get(step.replace("~1", "/").replace("~0", "~"))
        return found


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _type_of(value: object) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _integer(text: str) -> str | None:
    return str(int(text.partition(".")[0])) if _INTEGER.fullmatch(text) else None


def _number(text: str) -> str | None:
    if (value := _loaded(text)) is not None and type(value[0]) in (int, float):
        return value[1]
    try:
        number = float(text)
    except ValueError:
        return None
    return repr(number) if math.isfinite(number) else None


def _container(kind: type) -> Callable[[str], str | None]:
    def convert(text: str) -> str | None:
        value = _loaded(text)
        return value[1] if value is not None and isinstance(value[0], kind) else None

    return convert


def _loaded(text: str) -> tuple[Any, str] | None:
    """Return what JSON text says, and strict JSON that says it; None if it says nothing."""
    try:
        return orjson.loads(text), text
    except orjson.JSONDecodeError:
        pass
    try:
        value = json.loads(text, strict=False)
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
        written.encode()
    except (ValueError, RecursionError):
        return None
    return value, written


_CONVERTERS: dict[str, Callable[[str], str | None]] = {
    "null": lambda text: "null" if text in _NOTHING else None,
    "boolean": _WORDS.get,
    "integer": _integer,
    "number": _number,
    "object": _container(dict),
    "array": _container(list),
}
