"""In a structure's process: a JSON schema as people write it to one that the library takes, and that answers end in.

All that holds for one value at once (a schema, what it refers to, all of its `allOf`) is merged into one schema first.
Only then it is known which properties an object may name, and it can be *closed*: where a schema lists properties and
is silent about others, there are none. By the standard any others may follow, and small models then write others for
ever. What says `additionalProperties`, `unevaluatedProperties`, `patternProperties` or `propertyNames` has spoken.

Where one of several options holds beside properties, each option is merged with them, so that it can be closed as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kunserve.grammar.limits import RefusedError
from kunserve.grammar.schema.finite import check_schema
from kunserve.grammar.schema.merged import (
    OBJECT,
    SPOKEN,
    UnsupportedTextError,
    merged_array,
    merged_object,
    merged_values,
)
from kunserve.grammar.schema.parts import Schema, dict_of, expanded, list_of
from kunserve.grammar.schema.references import REFERENCES, References

_KIND = frozenset({"type", "enum", "const"})
_MAX_OPTIONS = 64  # that are merged with what is beside them

_Chosen = Mapping[int, int]  # which option of a part's `anyOf`, by the part's identity
_Key = tuple[frozenset[int], frozenset[tuple[int, int]], bool]


@dataclass(frozen=True, slots=True)
class _Together:
    """What one value has to satisfy at once."""

    key: _Key
    schemas: Sequence[Any]  # it was collected from
    chosen: _Chosen
    parts: list[Schema]
    choices: dict[int, list[Any]]  # the options of parts of which none is chosen
    is_shared: bool  # a reference led here: perhaps back to itself

    @property
    def closes(self) -> bool:
        """Return whether objects have only the properties that their schema names."""
        return self.key[2]

    @property
    def names_properties(self) -> bool:
        """Return whether the schema says anything about an object's properties."""
        return any(OBJECT & part.keys() for part in self.parts)


class PlainSchemas:
    """Writes schemas that share their definitions."""

    def __init__(self, closes: bool) -> None:
        """Begin to write schemas. `closes`: see the module."""
        self.definitions: dict[str, Any] = {}
        self._closes = closes
        self._references = References(True)
        # Subschemas are told apart by their identity. What is made of them is kept, so that no identity comes again.
        self._expanded: dict[int, tuple[Schema, Schema, list[Any]]] = {}
        self._names: dict[_Key, str] = {}
        self._waiting: list[tuple[str, _Together]] = []

    def add(self, schema: Any) -> Any:
        """Return a schema that means the same to the library, beside `definitions`.

        Raises RefusedError if it cannot be said so, or nothing matches it.
        """
        self._references = References(schema)
        plain = self.write([schema], self._closes)
        while self._waiting:
            name, together = self._waiting.pop()
            self.definitions[name] = self._write(together)
        if plain is False:
            raise RefusedError("nothing matches it")
        check_schema(schema)  # as it came: a reference that leads back to itself says nothing when it is merged
        return plain

    def write(self, schemas: Sequence[Any], closes: bool) -> Any:
        """Return one schema for what satisfies all of `schemas`."""
        return self._written(schemas, {}, closes)

    def resolve(self, reference: object) -> Any:
        """Return what a reference leads to."""
        return self._references.target(reference)

    def _written(self, schemas: Sequence[Any], chosen: _Chosen, closes: bool) -> Any:
        together = self._collect(schemas, chosen, closes)
        if together is None:
            return False
        if not together.is_shared:
            return self._write(together)
        if (name := self._names.get(together.key)) is None:
            name = self._names[together.key] = str(len(self._names))
            self._waiting.append((name, together))
        return {"$ref": f"#/$defs/{name}"}

    def _collect(self, schemas: Sequence[Any], chosen: _Chosen, closes: bool) -> _Together | None:
        """Return what holds together; None if nothing can satisfy it."""
        parts: dict[int, Schema] = {}
        choices: dict[int, list[Any]] = {}
        is_shared = False
        stack = list(reversed(schemas))
        while stack:
            schema = stack.pop()
            if schema is False:
                return None
            if schema is True or id(schema) in parts:
                continue
            part, more = self._expand(schema)
            parts[id(schema)] = part
            for keyword in REFERENCES:
                if keyword in part:
                    is_shared = True
                    more = [self.resolve(part[keyword]), *more]
            if options := list_of(part, "anyOf"):
                if id(schema) in chosen:
                    more = [options[chosen[id(schema)]], *more]
                else:
                    choices[id(schema)] = options
            stack += reversed([*list_of(part, "allOf"), *more])
        key = frozenset(parts), frozenset(chosen.items()), closes
        return _Together(key, schemas, chosen, list(parts.values()), choices, is_shared)

    def _expand(self, schema: Any) -> tuple[Schema, list[Any]]:
        if not isinstance(schema, dict):
            raise RefusedError(f"a schema must be an object or a boolean, not {str(schema)[:50]!r}")
        if id(schema) not in self._expanded:
            self._expanded[id(schema)] = (schema, *expanded(schema, self.resolve))
        return self._expanded[id(schema)][1:]

    def _write(self, together: _Together) -> Any:
        choices, closes = together.choices, together.closes
        is_judged_whole = closes or any("unevaluatedProperties" in part for part in together.parts)
        if not choices or not is_judged_whole:
            return self._merge(together, closes)
        if len(choices) == 1 and not together.names_properties:
            return self._merge(together, closes)  # each option is an object of its own
        if math.prod(map(len, choices.values())) > _MAX_OPTIONS:
            return self._merge(together, closes, self._names_within(together))
        source, options = next(iter(choices.items()))
        ways = ((together.schemas, {**together.chosen, source: index}) for index in range(len(options)))
        return any_of(self._options(ways, closes))

    def _options(self, options: Iterable[tuple[Sequence[Any], _Chosen]], closes: bool) -> list[Any]:
        """Return options as far as they can be held to. What is no more than text, and cannot be, is left out."""
        written, failures = [], []
        for schemas, chosen in options:
            try:
                written.append(self._written(schemas, chosen, closes))
            except UnsupportedTextError as error:
                failures.append(error)
        if failures and not written:
            raise failures[0]
        return written

    def _merge(self, together: _Together, closes: bool, other_names: list[str] | None = None) -> Any:
        """Return what holds together as one schema; the options that are not chosen stand beside it.

        `other_names`: properties that the options name, if they are closed with the rest and not each on its own.
        """
        options_close = closes and other_names is None and len(together.choices) == 1
        either = [
            any_of(self._options((([option], {}) for option in options), options_close))
            for options in together.choices.values()
        ]
        if False in either:
            return False
        parts = together.parts
        names = set().union(*(OBJECT & part.keys() for part in parts)) if parts else set()
        if "patternProperties" in names and sum(bool(OBJECT & part.keys()) for part in parts) > 1:
            # Which pattern speaks of which name of another part, the library finds out.
            pieces = [self._merged([part], False, None) for part in parts]
            return False if False in pieces else all_of(pieces, either)
        merged = self._merged(parts, closes and not (together.choices and other_names is None), other_names)
        return False if merged is False else all_of([merged], either)

    def _merged(self, parts: list[Schema], closes: bool, other_names: list[str] | None) -> Any:
        plain = merged_values(parts)
        plain |= merged_array(self, parts, closes)
        if any(OBJECT & part.keys() for part in parts):
            found = merged_object(self, parts, closes, other_names or ())
            if found is None:
                return False
            plain |= found
            if closes and any("properties" in part for part in parts) and not _KIND & plain.keys():
                plain["type"] = "object"  # nobody who lists properties means anything else
        return plain

    def _names_within(self, together: _Together) -> list[str] | None:
        """Return the properties that any option names; None if one speaks of others."""
        names: dict[str, None] = {}
        waiting, seen = list(together.choices.values()), set[int]()
        while waiting:
            for option in waiting.pop(0):
                within = None if id(option) in seen else self._collect([option], {}, False)
                seen.add(id(option))
                if within is not None:
                    if any(SPOKEN & part.keys() for part in within.parts):
                        return None
                    for part in within.parts:
                        names |= dict.fromkeys(dict_of(part, "properties"))
                    waiting += within.choices.values()
        return list(names)


def any_of(options: list[Any]) -> Any:
    """Return a schema for what satisfies one of them."""
    possible = [option for option in options if option is not False]
    if len(possible) < 2:
        return possible[0] if possible else False
    return {"anyOf": possible}


def all_of(pieces: list[Schema], either: list[Schema]) -> Any:
    """Return a schema for what satisfies all of them."""
    together = [piece for piece in [*pieces, *either] if piece]
    if len(together) < 2:
        return together[0] if together else {}
    if len(together) == 2 and together[1].keys() == {"anyOf"} and "anyOf" not in together[0]:
        return {**together[0], **together[1]}
    return {"allOf": together}


def plain_schema(schema: Any, closes: bool) -> Any:
    """Return a schema on its own in the library's words. Raises RefusedError as `PlainSchemas.add`."""
    schemas = PlainSchemas(closes)
    return {**schemas.add(schema), "$defs": schemas.definitions}


def calls_schema(tools: dict[str, Any], closes: bool) -> Any:
    """Return a schema for a list of calls. `tools`: `functions`, of a `name` and `parameters`, and `is_parallel`.

    Raises RefusedError.
    """
    schemas = PlainSchemas(closes)
    calls = []
    for function in tools["functions"]:
        name = function["name"]
        try:
            parameters = schemas.add(function["parameters"])
        except RefusedError as error:
            raise RefusedError(f"the parameters of `{name}`: {error}") from None
        properties = {"name": {"const": name}, "parameters": parameters}
        # Nothing beside the two: models like to add descriptions, which nobody would see and which may not end.
        closed = {"required": list(properties), "additionalProperties": False}
        calls.append({"type": "object", "properties": properties, **closed})
    schema = {"type": "array", "minItems": 1, "items": any_of(calls), "$defs": schemas.definitions}
    return schema if tools["is_parallel"] else {**schema, "maxItems": 1}
