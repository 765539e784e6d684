"""In a structure's process: keywords of JSON schemas that the library does not know, said with those that it does.

What is made of a schema may allow less than the schema does, never more; two keywords apart. `uniqueItems` holds only
where the items are a few known values, for nothing that is compiled ahead can remember what was written before. And
`oneOf` is read as `anyOf`: that an answer matches two options is no harm to anybody, and what tells options apart is
required.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from kunserve.grammar.limits import RefusedError

Schema = dict[str, Any]
Resolve = Callable[[object], Any]  # from a reference to what it means

_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_MAX_CONTAINED = 16
_MAX_PERMUTED, _MAX_LISTED = 4, 7  # unlike items: so many in any order, so many in the order of the schema
_MAX_HOPS = 32


def dict_of(schema: Schema, keyword: str) -> dict[str, Any]:
    """Return what a keyword names. RefusedError if it is no object."""
    value = schema.get(keyword)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RefusedError(f"`{keyword}` must be an object")
    return value


def list_of(schema: Schema, keyword: str) -> list[Any]:
    """Return what a keyword lists. RefusedError if it is no list."""
    value = schema.get(keyword)
    if value is None:
        return []
    if not isinstance(value, list):
        raise RefusedError(f"`{keyword}` must be a list")
    return value


def expanded(schema: Schema, resolve: Resolve) -> tuple[Schema, list[Any]]:
    """Return the schema without the keywords that the library lacks, and what has to hold besides."""
    more: list[Any] = []
    more += _of_condition(schema)
    more += _of_dependencies(schema)
    if "not" in schema:
        more.append(_opposite(schema["not"], schema, "`not`"))
    if "contains" in schema:
        more.append(_containing(schema))
    if schema.get("uniqueItems") is True:
        more += _of_unlike_items(schema, resolve)
    plain = {name: value for name, value in schema.items() if name not in _REPLACED}
    if "oneOf" in schema:
        more.append({"anyOf": _told_apart(schema, resolve)})
    for bound, side in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(plain.get(bound), bool):  # as draft 4 had it
            is_exclusive = plain.pop(bound)
            if is_exclusive and side in plain:
                plain[bound] = plain.pop(side)
    if isinstance(plain.get("items"), list):  # as it was before `prefixItems`
        plain["prefixItems"] = plain.pop("items")
        if "additionalItems" in plain:
            plain["items"] = plain["additionalItems"]
    plain.pop("additionalItems", None)
    if "unevaluatedItems" in plain:
        unevaluated = plain.pop("unevaluatedItems")
        plain.setdefault("items", unevaluated)
    return plain, more


_REPLACED = frozenset(
    {"if", "then", "else", "not", "contains", "minContains", "maxContains", "uniqueItems", "oneOf"}
    | {"dependentRequired", "dependentSchemas", "dependencies"}
)


def _of_condition(schema: Schema) -> list[Any]:
    """Say `if`, `then`, `else` as options: both hold, or the condition surely does not and the other holds."""
    if "if" not in schema or not {"then", "else"} & schema.keys():
        return []
    condition, then, other = schema["if"], schema.get("then", True), schema.get("else", True)
    try:
        otherwise = [_opposite(condition, schema, "`if`"), other]
    except RefusedError:
        otherwise = [then, other]  # whether it holds or not
    return [{"anyOf": [{"allOf": [condition, then]}, {"allOf": otherwise}]}]


def _opposite(schema: Any, beside: Schema, where: str) -> Any:
    """Return a schema that only what does not match another satisfies. `beside`: what holds for the same value."""
    if isinstance(schema, bool):
        return not schema
    if not isinstance(schema, dict):
        raise RefusedError(f"{where} must be a schema")
    said = {name: value for name, value in schema.items() if name in _SAID}
    match sorted(said):
        case []:
            return False
        case ["const"] | ["enum"]:
            return _other_values([said["const"]] if "const" in said else list_of(said, "enum"), beside, where)
        case ["type"]:
            types = said["type"] if isinstance(said["type"], list) else [said["type"]]
            left = [name for name in _TYPES if name not in types and not (name == "integer" and "number" in types)]
            if "integer" not in types:
                return {"type": left}
        case ["anyOf"]:
            return {"allOf": [_opposite(option, beside, where) for option in list_of(said, "anyOf")]}
        case ["required"]:
            names = list_of(said, "required")
            return {"anyOf": [{"properties": {name: False}} for name in names]}
        case ["properties"] | ["properties", "required"] | ["properties", "type"] | ["properties", "required", "type"]:
            known = dict_of(beside, "properties")
            options = []
            for name, value in dict_of(said, "properties").items():
                there = known.get(name)
                unlike = _opposite(value, there if isinstance(there, dict) else {}, where)
                options.append({"properties": {name: unlike}, "required": [name]})
            options += [{"properties": {name: False}} for name in list_of(said, "required")]
            return {"anyOf": options}
    raise RefusedError(f"{where} is supported only of values, types and properties")


_SAID = frozenset(
    {"const", "enum", "type", "anyOf", "oneOf", "allOf", "not", "if", "required", "properties", "items", "$ref"}
    | {"pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength"}
    | {"minItems", "maxItems", "minProperties", "maxProperties", "additionalProperties", "patternProperties"}
    | {"propertyNames", "contains", "uniqueItems", "prefixItems", "dependentRequired", "dependentSchemas"}
)


def _other_values(values: list[Any], beside: Schema, where: str) -> Schema:
    """Return the other values that may stand here, or, where these are not listed, the types of others."""
    known = [True, False] if beside.get("type") == "boolean" else beside.get("enum")
    if isinstance(known, list):
        return {"enum": [value for value in known if not any(_is_same(value, other) for other in values)]}
    types = {_type_of(value) for value in values}
    if isinstance(beside.get("type"), str) and beside["type"] in types | {"integer"}:
        raise RefusedError(f"{where} excludes values of an open type")
    return {"type": [name for name in _TYPES if name not in types and not (name == "integer" and "number" in types)]}


def _type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
    return "array" if isinstance(value, list) else "object"


def _is_same(one: Any, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _of_dependencies(schema: Schema) -> list[Any]:
    """Say what a property brings with it as options: it is not there, or it is, and the rest holds."""
    needs: list[tuple[str, Any]] = []
    for name, names in dict_of(schema, "dependentRequired").items():
        needs.append((name, {"required": names}))
    needs += dict_of(schema, "dependentSchemas").items()
    for name, need in dict_of(schema, "dependencies").items():
        needs.append((name, {"required": need} if isinstance(need, list) else need))
    return [{"anyOf": [{"properties": {name: False}}, {"allOf": [{"required": [name]}, need]}]} for name, need in needs]


def _containing(schema: Schema) -> Any:
    """Return that the first items are what an array must contain."""
    least = schema.get("minContains", 1)
    if "maxContains" in schema or not isinstance(least, int) or not 0 <= least <= _MAX_CONTAINED:
        raise RefusedError(f"`contains` is supported without `maxContains`, with `minContains` up to {_MAX_CONTAINED}")
    return {"prefixItems": [schema["contains"]] * least, "minItems": least} if least else True


def _of_unlike_items(schema: Schema, resolve: Resolve) -> list[Any]:
    """Return the arrays that have none of a few values twice; nothing if the items may be more than a few."""
    values = values_of(schema.get("items"), resolve)
    if values is None or len(values) > _MAX_LISTED:
        return []
    least, most = schema.get("minItems", 0), min(schema.get("maxItems", len(values)), len(values))
    pick: Callable[[list[Any], int], Iterable[tuple[Any, ...]]] = itertools.combinations
    if len(values) <= _MAX_PERMUTED:
        pick = itertools.permutations
    picked = (list(some) for size in range(least, most + 1) for some in pick(values, size))
    return [{"enum": list(picked)}]


def values_of(schema: Any, resolve: Resolve) -> list[Any] | None:
    """Return all values that match a schema, if it lists them."""
    for _ in range(_MAX_HOPS):
        if not isinstance(schema, dict):
            return None
        if isinstance(schema.get("enum"), list):
            return list(schema["enum"])
        if "const" in schema:
            return [schema["const"]]
        if schema.get("type") in ("boolean", "null"):
            return [True, False] if schema["type"] == "boolean" else [None]
        if "$ref" not in schema:
            return None
        schema = resolve(schema["$ref"])
    return None


def _told_apart(schema: Schema, resolve: Resolve) -> list[Any]:
    """Return the options of `oneOf`, each with the property required that tells it from the others, if one does."""
    options = list_of(schema, "oneOf")
    discriminator = schema.get("discriminator")
    name = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
    names = [name] if isinstance(name, str) else _names_that_tell(options, resolve)
    if not names:
        return options
    required = {"required": names[:1]}
    return [{"allOf": [option, required]} if names[0] in _properties(option, resolve) else option for option in options]


def _names_that_tell(options: list[Any], resolve: Resolve) -> list[str]:
    """Return the properties that have other values in each option."""
    if len(options) < 2:
        return []
    known = [_properties(option, resolve) for option in options]
    found = []
    for name in known[0]:
        values = [values_of(properties.get(name), resolve) for properties in known]
        listed = [repr(value) for some in values if some is not None for value in some]
        if None not in values and len(set(listed)) == len(listed):
            found.append(name)
    return found


def _properties(schema: Any, resolve: Resolve) -> dict[str, Any]:
    """Return the properties that an option names itself."""
    for _ in range(_MAX_HOPS):
        if not isinstance(schema, dict) or "properties" in schema or "$ref" not in schema:
            break
        schema = resolve(schema["$ref"])
    return dict_of(schema, "properties") if isinstance(schema, dict) else {}
