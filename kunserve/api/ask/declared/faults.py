"""What is wrong with a value, in a sentence that names the field, what was expected and what came.

msgspec tells where the fault is; what was expected there stands in the schema that the document shows.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

import msgspec

from kunserve.api.ask.declared.fields import HELD, Schema, has_kind
from kunserve.api.wire.fields import INT64_MAX, show
from kunserve.errors import InvalidRequestError

_PATH = re.compile(rf" - at `\$\.{HELD}(.*)`$")
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_INDEXES = re.compile(r"(\[\d+\])+$")
_SIZES = (
    ("minLength", "maxLength", "character"),
    ("minItems", "maxItems", ""),
    ("minProperties", "maxProperties", "field"),
)
_MISSING = re.compile(r"^Object missing required field `(.+?)`")
_WORDS = {
    "string": "a string",
    "boolean": "true or false",
    "integer": "an integer",
    "number": "a number",
    "array": "a list",
    "object": "an object",
}


def raise_missing(param: str) -> NoReturn:
    """Raise the error for a field that has to be there."""
    raise InvalidRequestError(f"`{param}` is required.", param=param)


def raise_fault(error: msgspec.ValidationError, value: object, schema: Schema, param: str) -> NoReturn:
    """Raise the error for `value`, the field `param`, of which msgspec has said where it does not fit `schema`."""
    path = _PATH.search(str(error))
    for name, index in _STEP.findall(path[1] if path else ""):
        if name:
            value, schema = value.get(name), _property(schema, name)  # type: ignore[attr-defined]
            param = f"{param}.{name}"
        else:
            value, schema = value[int(index)], _items(schema)  # type: ignore[index]
            param = f"{param}[{index}]"
    if missing := _MISSING.match(str(error)):
        raise_missing(f"{param}.{missing[1]}")
    if value is None and not param.endswith("]"):
        raise_missing(param)
    raise_unfit(value, [schema], param)


def raise_unfit(value: object, schemas: list[Schema], param: str) -> NoReturn:
    """Raise the error for `value`, the field `param`, which fits none of `schemas`."""
    fitting = [each for schema in schemas for each in alternatives_of(schema) if has_kind(each, value)]
    bounds = _bounds(fitting[0], value) if fitting else None
    expected = bounds or f"be {words(schemas)}"
    # Plain values in lists are no fields: what is complained about is their list.
    is_field = any(each.get("type") == "object" for schema in schemas for each in alternatives_of(schema))
    field = param if is_field else _INDEXES.sub("", param)
    came = str(len(value)) if isinstance(value, str | list | dict) and "at most" in expected else show(value)
    raise InvalidRequestError(f"`{param}` must {expected}, not {came}.", param=field)


def _bounds(schema: Schema, value: Any) -> str | None:
    """Return the bounds that a value of the right type exceeds, in words; None if it exceeds none."""
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and (value < low or value > schema.get("maximum", value)):
        return _range(low, high, schema["type"] == "integer", value < low)
    for least, most, item in _SIZES:
        count = len(value) if isinstance(value, str | list | dict) else 0
        if count < schema.get(least, 0):
            return f"have at least {_count(schema[least], item or _item_noun(schema))}"
        if schema.get(most) == 0 < count:
            return "be empty"
        if count > schema.get(most, count):
            return f"have at most {_count(schema[most], item or _item_noun(schema))}"
    return None


def _range(low: float, high: float | None, is_integer: bool, is_below: bool) -> str:
    if high is None or (high == INT64_MAX and is_below):
        return f"be at least {low:g}"
    if high == INT64_MAX:
        return f"be at most {high}"
    return f"be between {low} and {high}" if is_integer else f"be at least {low:g} and at most {high:g}"


def _item_noun(schema: Schema) -> str:
    return " or ".join(_each(_items(schema), is_item=True)).removeprefix("an ").removeprefix("a ")


def _count(number: int, noun: str) -> str:
    return f"one {noun}" if number == 1 else f"{number} {_plural(f'a {noun}')}"


def words(schemas: list[Schema]) -> str:
    """Return what may be there, in words."""
    found = list(dict.fromkeys(word for schema in schemas for word in _each(schema)))
    return " or ".join(filter(None, [", ".join(found[:-1]), found[-1]]))


def _each(schema: Schema, is_item: bool = False) -> list[str]:
    """Return what one schema allows. `is_item`: an object goes by what it is ("a message")."""
    told = schema.get("description", "")
    if told.startswith(("a ", "an ")):
        return [told]
    if is_item and told.startswith(("A ", "An ")):
        return [told[0].lower() + told[1:].removesuffix(".")]
    if "anyOf" in schema:
        return [word for each in alternatives_of(schema) for word in _each(each, is_item)]
    if "enum" in schema or "const" in schema:
        return [str(each) for each in schema.get("enum") or [schema["const"]]]
    if schema.get("type") == "array" and schema.get("items"):
        items = [_WORDS["string"]] if "enum" in schema["items"] else _each(schema["items"], is_item=True)
        return [f"a list of {' or '.join(map(_plural, items))}"]
    return [_WORDS[schema["type"]]]


def _plural(word: str) -> str:
    """Return several of "a token id" or "a list of token ids"."""
    noun, of, rest = word.removeprefix("an ").removeprefix("a ").partition(" of ")
    return f"{noun}s{of}{rest}"


def alternatives_of(schema: Schema) -> list[Schema]:
    """Return what a schema allows, null left out."""
    return [each for each in schema.get("anyOf", [schema]) if each != {"type": "null"}]


def _property(schema: Schema, name: str) -> Any:
    return next(each["properties"][name] for each in alternatives_of(schema) if name in each.get("properties", {}))


def _items(schema: Schema) -> Any:
    return next(each["items"] for each in alternatives_of(schema) if each.get("items"))
