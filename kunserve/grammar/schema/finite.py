"""Whether a JSON schema has an instance that ends: an object may require itself, and so on for ever.

A schema has one if some value satisfies all that is said about it at once, and the values within it likewise: the
least fixpoint over sets of subschemas that hold together (a schema, what it refers to, all of its `allOf`). Only what
surely has none is refused: whatever a keyword could mean beyond that is taken to allow an instance, and so is all
that would take long to find out. A reference that leads back to itself without anything between has none either.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

from kunserve.grammar.limits import RefusedError

_TYPES: Final = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
_CHOICES: Final = ("anyOf", "oneOf")
_MAX_WORK = 20_000  # subschemas to look at, each as often as it is met
_MAX_ITEMS = 1 << 12  # that are looked at one by one

# Subschemas are told apart by their identity: they all are parts of one schema, which stays alive meanwhile.
_Choices = dict[tuple[int, str], Any]  # what was chosen of which `anyOf` or `oneOf`
_Key = tuple[frozenset[int], frozenset[tuple[int, str, int]]]


class _TooMuchError(Exception):
    """Finding out would take long."""


@dataclass(frozen=True, slots=True)
class _Together:
    """What one value has to satisfy at once."""

    schemas: tuple[dict[str, Any], ...]
    choices: _Choices


def check_schema(schema: Any) -> None:
    """Raise RefusedError if the schema surely has no finite instance."""
    try:
        is_finite = _Search(schema).has_instance()
    except _TooMuchError:
        return
    if not is_finite:
        raise RefusedError("no answer to it ever ends: it requires itself")


class _Search:
    def __init__(self, schema: Any) -> None:
        self._root = schema
        self._met: dict[_Key, _Together] = {}
        self._finite: set[_Key] = set()
        self._waiting: list[_Key] = []  # to be looked at, again if something they need has become finite
        self._needed_by: defaultdict[_Key, set[_Key]] = defaultdict(set)
        self._looking_at: _Key | None = None
        self._num_left = _MAX_WORK

    def has_instance(self) -> bool:
        """Return whether the schema has a finite instance."""
        self._is_finite([self._root])
        root = self._waiting[:1]  # none if nothing can satisfy it
        while self._waiting and root[0] not in self._finite:
            self._looking_at = key = self._waiting.pop()
            if key not in self._finite and self._may_end(self._met[key]):
                self._finite.add(key)
                self._waiting += self._needed_by.pop(key, ())
        return any(key in self._finite for key in root)

    def _is_finite(self, schemas: list[Any], choices: _Choices | None = None) -> bool:
        """Return whether a value that satisfies all of them is known to end; if it is not, look for that."""
        choices = choices or {}
        together = self._together(schemas, choices)
        if together is None:
            return False
        made = frozenset((owner, name, id(option)) for (owner, name), option in choices.items())
        key = frozenset(map(id, together)), made
        if key not in self._met:
            self._met[key] = _Together(tuple(together), choices)
            self._waiting.append(key)
        if key not in self._finite and self._looking_at is not None:
            self._needed_by[key].add(self._looking_at)
        return key in self._finite

    def _together(self, schemas: list[Any], choices: _Choices) -> list[dict[str, Any]] | None:
        """Return the schemas, what they refer to, their `allOf` and what was chosen, once each.

        None if nothing satisfies them: one is false, or leads back to itself.
        """
        found: dict[int, dict[str, Any]] = {}
        path: set[int] = set()
        stack: list[tuple[Any, bool]] = [(schema, False) for schema in reversed(schemas)]
        while stack:
            schema, is_left = stack.pop()
            if is_left:
                path.discard(id(schema))
            elif schema is False or id(schema) in path:
                return None
            elif isinstance(schema, dict) and id(schema) not in found:
                self._num_left -= 1
                if self._num_left < 0:
                    raise _TooMuchError
                found[id(schema)] = schema
                path.add(id(schema))
                stack.append((schema, True))
                chosen = [choices[id(schema), name] for name in _CHOICES if (id(schema), name) in choices]
                stack += [(part, False) for part in (*self._referred(schema), *_list(schema.get("allOf")), *chosen)]
        return list(found.values())

    def _referred(self, schema: dict[str, Any]) -> list[Any]:
        """Return what its `$ref` leads to, if that is in this schema."""
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            return []
        target: Any = self._root
        for part in reference.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and name in target:
                target = target[name]
            elif isinstance(target, list) and name.isdecimal() and int(name) < len(target):
                target = target[int(name)]
            else:
                return []  # the library says what is wrong
        return [target]

    def _may_end(self, together: _Together) -> bool:
        """Return whether a value that satisfies all of these can end, by what is known so far."""
        schemas, choices = together.schemas, together.choices
        for schema in schemas:
            for name in _CHOICES:
                options = _list(schema.get(name))
                if options and True not in options and (id(schema), name) not in choices:
                    made = ({**choices, (id(schema), name): option} for option in options)
                    return any(self._is_finite(list(schemas), each) for each in made)
        types = _TYPES
        for schema in schemas:
            types &= _types(schema)
        if types - {"array", "object"} or any("enum" in schema or "const" in schema for schema in schemas):
            return True
        return ("object" in types and self._object_may_end(schemas)) or (
            "array" in types and self._array_may_end(schemas)
        )

    def _object_may_end(self, schemas: Sequence[dict[str, Any]]) -> bool:
        required = {name for schema in schemas for name in _list(schema.get("required")) if isinstance(name, str)}
        if not all(self._is_finite(_of_property(schemas, name)) for name in required):
            return False
        if required or not any(_number(schema.get("minProperties")) for schema in schemas):
            return True
        named = {name for schema in schemas for name in _dict(schema.get("properties"))}
        if any(_dict(schema.get("patternProperties")) for schema in schemas):
            return True
        others = [schema.get("additionalProperties") for schema in schemas]
        return self._is_finite(others) or any(self._is_finite(_of_property(schemas, name)) for name in named)

    def _array_may_end(self, schemas: Sequence[dict[str, Any]]) -> bool:
        least = max((_number(schema.get("minItems")) for schema in schemas), default=0)
        first = max((len(_prefix(schema)) for schema in schemas), default=0)
        indices = range(min(least, first + 1, _MAX_ITEMS))  # the items after the first few are all alike
        return all(self._is_finite([_item(schema, index) for schema in schemas]) for index in indices)


def _types(schema: dict[str, Any]) -> frozenset[str]:
    """Return the types that a schema allows, as far as it says so."""
    given = schema.get("type")
    if given is None:
        return _TYPES
    return frozenset(name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str))


def _of_property(schemas: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """Return what is said about a property."""
    found = []
    for schema in schemas:
        properties = _dict(schema.get("properties"))
        if name in properties:
            found.append(properties[name])
        elif not _dict(schema.get("patternProperties")):
            found.append(schema.get("additionalProperties"))
    return found


def _item(schema: dict[str, Any], index: int) -> Any:
    """Return what a schema says about one item."""
    prefix = _prefix(schema)
    if index < len(prefix):
        return prefix[index]
    return schema.get("additionalItems") if isinstance(schema.get("items"), list) else schema.get("items")


def _prefix(schema: dict[str, Any]) -> list[Any]:
    """Return what a schema says about the first items, one by one."""
    return _list(schema.get("prefixItems")) or _list(schema.get("items"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and 0 < value < 1 << 62 else 0
