from __future__ import annotations

import json
from typing import Any

import pytest

from kunserve.api.say.calls.values import ArgumentTypes

OBJECT = {"type": "object"}
REFERENCE = {"$ref": "#/$defs/Size"}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "string"}, "null", "null"),
        ({}, "5", "5"),
        (None, "5", "5"),
        ({"type": "integer"}, " 5\n", 5),
        ({"type": "integer"}, "+5", 5),
        ({"type": "integer"}, "-007", -7),
        ({"type": "integer"}, "5.0", 5),
        ({"type": "integer"}, "five", "five"),
        ({"type": "integer"}, "1" * 5000, "1" * 5000),
        ({"type": "number"}, "5", 5),
        ({"type": "number"}, "1e3", 1000.0),
        ({"type": "number"}, ".5", 0.5),
        ({"type": "number"}, "nan", "nan"),
        ({"type": "number"}, "true", "true"),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "boolean"}, "yes", "yes"),
        ({"type": "null"}, "None", None),
        ({"type": "array"}, '[1, "a\\n"]', [1, "a\n"]),
        ({"type": "array"}, "{}", "{}"),
        (OBJECT, '{"a": "b\nc"}', {"a": "b\nc"}),
        (OBJECT, '{"a": NaN}', '{"a": NaN}'),
        (OBJECT, "{broken", "{broken"),
        (OBJECT, "[" * 100_000, "[" * 100_000),
        ({"type": ["integer", "null"]}, "null", None),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "5", 5),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "five", "five"),
        ({"anyOf": [REFERENCE, {"type": "null"}]}, "5", 5),
        (REFERENCE, "5", 5),
        ({"$ref": "#/$defs/none"}, "5", "5"),
        ({"$ref": "#/$defs/Loop"}, "5", "5"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": True}, "true", True),
        ({"type": {"odd": 1}, "anyOf": 5}, "5", "5"),
    ],
)
def test_text_becomes_what_the_schema_wants(schema: Any, text: str, value: Any) -> None:
    definitions = {"Size": {"type": "integer"}, "Loop": {"$ref": "#/$defs/Loop"}}
    types = ArgumentTypes({"properties": {"a": schema}, "$defs": definitions})
    found = json.loads(types.to_json("a", text))
    assert found == value and type(found) is type(value)


def test_only_strings_go_out_as_they_come() -> None:
    types = ArgumentTypes({"properties": {"a": {"type": "string"}, "b": {"type": ["string", "null"]}}})
    assert types.is_text("a") and types.is_text("other") and not types.is_text("b")
    assert ArgumentTypes({"properties": 5}).is_text("a")
