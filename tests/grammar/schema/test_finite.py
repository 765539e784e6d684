from __future__ import annotations

import json
from typing import Any

import pytest

from kunserve.grammar.limits import RefusedError
from kunserve.grammar.schema.finite import check_schema

ROOT = {"$ref": "#"}
NULL = {"type": "null"}


def requires(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def definitions(first: str, **schemas: Any) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{first}", "$defs": schemas}


def to(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


INFINITE: list[Any] = [
    ROOT,
    {"allOf": [ROOT]},
    {"anyOf": [ROOT, ROOT]},
    {"anyOf": [{"allOf": [ROOT]}]},
    definitions("a", a=to("b"), b=to("a")),
    definitions("a", a={"anyOf": [to("b")]}, b={"oneOf": [to("a"), to("a")]}),
    requires(a=ROOT),
    requires(a=NULL, b=requires(c=ROOT)),
    requires(a={"$ref": "#/properties/a"}),
    requires(a={"anyOf": [ROOT, requires(b=ROOT)]}),
    {"type": "object", "required": ["x"], "additionalProperties": ROOT},
    {"type": "object", "minProperties": 1, "additionalProperties": ROOT},
    {"type": "array", "minItems": 1, "items": ROOT},
    {"type": "array", "minItems": 2, "prefixItems": [NULL, ROOT]},
    {"type": "array", "minItems": 3, "prefixItems": [NULL, NULL], "items": ROOT},
    {"type": ["array", "object"], "minItems": 1, "items": ROOT, "required": ["a"], "properties": {"a": ROOT}},
    {"type": "object", "allOf": [{"required": ["a"]}, {"properties": {"a": ROOT}}]},
    {"type": "object", "anyOf": [requires(a=ROOT), requires(b=ROOT)]},
    {"type": "object", "anyOf": [{"required": ["a"]}, {"required": ["b"]}], "properties": {"a": ROOT, "b": ROOT}},
    definitions("n", n=requires(m=to("m")), m=requires(n=to("n"))),
    definitions("a/b", **{"a": {"b": 1}, "a~/b": 1}) | {"$ref": "#/$defs/x%25y", "$defs": {"x%y": requires(a=ROOT)}},
    requires(a=False),
]
FINITE: list[Any] = [
    True,
    {},
    {"items": ROOT},
    {"properties": {"a": ROOT}, "required": ["a"]},  # a number, for instance
    {"type": "object", "properties": {"a": ROOT}},
    {"type": "array", "items": ROOT},
    {"type": "array", "minItems": 1, "prefixItems": [NULL, ROOT]},
    {"type": "array", "minItems": 10**12, "items": NULL},
    {"anyOf": [ROOT, NULL]},
    {"oneOf": [ROOT, True]},
    requires(a={"anyOf": [ROOT, NULL]}),
    requires(a={"type": ["object", "null"], "properties": {"a": ROOT}, "required": ["a"]}),
    definitions("n", n=requires(v=NULL, next={"anyOf": [to("n"), NULL]})),
    definitions("a", a=requires(b=to("b")), b={"type": "array", "items": to("a")}),
    {"type": "object", "required": ["x"]},
    {"type": "object", "required": ["x"], "patternProperties": {".*": ROOT}, "additionalProperties": False},
    {"type": "object", "minProperties": 1, "properties": {"a": NULL}, "additionalProperties": ROOT},
    {"$ref": "https://example.com/other"},
    {"$ref": "#/nowhere"},
    {"const": {"a": 1}, "required": ["a"]},
    definitions("0", **{str(i): requires(a=to(str(i + 1))) for i in range(900)}, **{"900": NULL}),
    {"allOf": [{"anyOf": [{"type": "object"}, {"type": "array"}]} for _ in range(30)]},  # too much to find out
]


def copied(schema: Any) -> Any:
    """As it comes from a client: no two parts are one object."""
    return json.loads(json.dumps(schema))


@pytest.mark.parametrize("schema", INFINITE, ids=str)
def test_no_instance_ever_ends(schema: Any) -> None:
    with pytest.raises(RefusedError, match="no answer to it ever ends"):
        check_schema(copied(schema))


@pytest.mark.parametrize("schema", FINITE, ids=lambda schema: str(schema)[:80])
def test_a_schema_with_an_instance_that_ends_is_not_refused(schema: Any) -> None:
    check_schema(copied(schema))
