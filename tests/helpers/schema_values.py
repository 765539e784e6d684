"""Values that fit a JSON schema, or nearly: for tests that hold a check against what the document says."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import strategies as st

SCALARS: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([0.0, 1.0, 16.0, -1.0, 1e19, 1e30, 0.5])
    | st.text(st.characters(codec="utf-8"), max_size=6)
)
NAMES = st.text("abc", max_size=2)
JSON: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=4
)


def near(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of which most fit `schema`, or do but for one place; as the server reads them from JSON."""
    return _near(schema, is_wild=True).map(lambda value: orjson.loads(orjson.dumps(value)))


def fitting(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that fit `schema`, but for bounds that only a value as a whole can break."""
    return _near(schema, is_wild=False).map(lambda value: orjson.loads(orjson.dumps(value)))


def _near(schema: dict[str, Any], is_wild: bool) -> st.SearchStrategy[Any]:
    of_schema = _of_schema(schema, is_wild)
    return st.one_of(of_schema, of_schema, of_schema, JSON) if is_wild else of_schema


def _of_schema(schema: dict[str, Any], is_wild: bool) -> st.SearchStrategy[Any]:
    if "anyOf" in schema:
        return st.one_of(*(_near(each, is_wild) for each in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    match schema.get("type"):
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            return _integers(schema, is_wild)
        case "number":
            low, high = schema.get("minimum", -1e6), schema.get("maximum", 1e6)
            wide = 1.0 if is_wild else 0.0
            return st.floats(low - wide, high + wide) | st.sampled_from([low, high])
        case "string":
            if "pattern" in schema:  # with what is nearly right: a key that ends with a line break
                return st.from_regex(schema["pattern"], alphabet="0123456789x\n")
            least, most = schema.get("minLength", 0), min(schema.get("maxLength", 5), 300)
            slack = 1 if is_wild else 0
            return st.text("ab\u00e9", min_size=max(least - slack, 0), max_size=min(least + 4, most + slack)) | st.just(
                "x" * (most + slack)
            )
        case "array":
            least, slack = schema.get("minItems", 0), 1 if is_wild else 0
            most = min(least + 3, schema.get("maxItems", least + 3) + slack)
            return st.lists(_near(schema.get("items", {}), is_wild), min_size=max(least - slack, 0), max_size=most)
        case "object":
            return _objects(schema, is_wild)
    return JSON


def _integers(schema: dict[str, Any], is_wild: bool) -> st.SearchStrategy[Any]:
    low, high = schema.get("minimum", -(1 << 63)), schema.get("maximum", (1 << 64) - 1)
    slack = 1 if is_wild else 0
    least, most = max(low - slack, -(1 << 63)), min(high + slack, (1 << 64) - 1)
    return st.integers(least, most) | st.sampled_from([low, least, most]) | st.integers(0, 100).map(float)


def _objects(schema: dict[str, Any], is_wild: bool) -> st.SearchStrategy[Any]:
    if isinstance(values := schema.get("additionalProperties"), dict):
        names = _near({"type": "string", **schema.get("propertyNames", {})}, is_wild=False)
        return st.dictionaries(names | NAMES if is_wild else names, _near(values, is_wild), max_size=3)
    known = {name: _near(each, is_wild) for name, each in schema.get("properties", {}).items()}
    required = {} if is_wild else {name: known[name] for name in schema.get("required", ())}
    optional = {name: each for name, each in known.items() if name not in required}
    return st.fixed_dictionaries(required, optional=optional)
