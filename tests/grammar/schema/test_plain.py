"""What people write in schemas besides what the library knows: held to, or refused with a reason; never ignored."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from answers import allows, answer, compiled
from llguidance import LLTokenizer

from kunserve.grammar.limits import RefusedError

INT = {"type": "integer"}


def requires(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


A = requires(a=INT)
CAT = {"type": "object", "properties": {"t": {"const": "cat", "default": "cat"}, "n": INT}}
DOG = {"type": "object", "properties": {"t": {"const": "dog", "default": "dog"}, "m": INT}}
ORDER = requires(kind={"enum": ["gift", "sale"]}, price=INT)
DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"
MONEY = r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,3}|(?=[\d.]{1,6}0*$)\d{0,3}\.\d{0,2}0*$)"
DIGITS = r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,4}|(?=[\d.]{1,5}0*$)\d*\.\d*0*$)"

# schema, answers that are allowed, answers that are not
CASES: dict[str, tuple[Any, list[str], list[str]]] = {
    "closed": (A, ['{"a":1}'], ['{"a":1,"b":2}', "{}"]),
    "closed without a type": ({"properties": {"a": INT}}, ["{}", '{"a":1}'], ['{"b":1}', "5"]),
    "no properties at all": ({"type": "object", "properties": {}}, ["{}"], ['{"a":1}']),
    "nothing named": ({"type": "object"}, ['{"a":1}'], ["1"]),
    "it says that there may be others": ({**A, "additionalProperties": True}, ['{"a":1,"b":2}'], []),
    "beside a pattern": (
        {**A, "patternProperties": {"^x": INT}},
        ['{"a":1,"x":2}', '{"a":1,"c":"d"}'],
        ['{"a":1,"x":""}'],
    ),
    "unevaluated true": ({**A, "unevaluatedProperties": True}, ['{"a":1,"b":2}'], ["{}"]),
    "unevaluated false": ({**A, "unevaluatedProperties": False}, ['{"a":1}'], ['{"a":1,"b":2}']),
    "unevaluated over allOf": (
        {"allOf": [A, {"properties": {"b": INT}}], "unevaluatedProperties": False},
        ['{"a":1,"b":2}'],
        ['{"a":1,"c":2}'],
    ),
    "unevaluated over anyOf": (
        {**A, "anyOf": [requires(b=INT), requires(c=INT)], "unevaluatedProperties": False},
        ['{"a":1,"b":2}', '{"a":1,"c":2}'],
        ['{"a":1,"d":2}', '{"a":1}'],
    ),
    "allOf": ({"allOf": [A, {"properties": {"b": INT}}]}, ['{"a":1,"b":2}', '{"a":1}'], ['{"a":1,"c":2}']),
    "allOf of references": (
        {"allOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}], "$defs": {"A": A, "B": requires(b=INT)}},
        ['{"a":1,"b":2}'],
        ['{"a":1}', '{"a":1,"b":2,"c":3}'],
    ),
    "allOf within allOf": (
        {"allOf": [{"allOf": [A]}, {"allOf": [{"properties": {"b": INT}}], "properties": {"c": INT}}]},
        ['{"a":1,"c":2,"b":3}'],
        ['{"a":1,"d":2}'],
    ),
    "allOf about the same property": (
        {
            "type": "object",
            "required": ["x"],
            "allOf": [{"properties": {"x": A}}, {"properties": {"x": requires(b=INT)}}],
        },
        ['{"x":{"a":1,"b":2}}'],
        ['{"x":{"a":1}}', '{"x":{"a":1,"b":2,"c":3}}'],
    ),
    "allOf with a closed branch": (
        {"allOf": [{**A, "additionalProperties": False}, {"properties": {"b": INT}}]},
        ['{"a":1}'],
        ['{"a":1,"b":2}'],
    ),
    "a reference with more beside it": (
        {"$ref": "#/$defs/A", "properties": {"b": INT}, "$defs": {"A": A}},
        ['{"b":2,"a":1}'],
        ['{"b":2}', '{"a":1,"c":1}'],
    ),
    "options beside properties": (
        {**A, "anyOf": [requires(b=INT), requires(c=INT)]},
        ['{"a":1,"b":2}', '{"a":1,"c":2}'],
        ['{"a":1}', '{"a":1,"b":2,"d":3}'],
    ),
    "two times options": (
        {"anyOf": [requires(a=INT), requires(b=INT)], "oneOf": [requires(c=INT), requires(d=INT)]},
        ['{"a":1,"c":2}', '{"b":1,"d":2}'],
        ['{"a":1}', '{"c":1}'],
    ),
    "many options beside properties": (
        {**A, "allOf": [{"anyOf": [requires(**{f"{x}{i}": INT}) for i in range(9)]} for x in "bc"]},
        ['{"a":1,"b3":2,"c8":1}'],
        ['{"a":1,"b3":2}', '{"a":1,"b3":2,"c8":1,"d":1}'],
    ),
    "required and not named": ({**A, "required": ["a", "b"]}, ['{"a":1,"b":"x"}'], ['{"a":1}', '{"a":1,"b":1,"c":1}']),
    "if, then": (
        {**ORDER, "if": {"properties": {"kind": {"const": "gift"}}}, "then": requires(to={"type": "string"})},
        ['{"kind":"gift","price":1,"to":"Ann"}', '{"kind":"sale","price":1}'],
        ['{"kind":"gift","price":1}'],
    ),
    "if, then, else": (
        {
            **ORDER,
            "if": {"properties": {"kind": {"const": "gift"}}, "required": ["kind"]},
            "then": {"properties": {"price": {"const": 0}}},
            "else": {"properties": {"price": {"minimum": 1}}},
        },
        ['{"kind":"gift","price":0}', '{"kind":"sale","price":3}'],
        ['{"kind":"gift","price":3}', '{"kind":"sale","price":0}', '{"kind":"sale","price":1,"x":1}'],
    ),
    "if of an open value": (
        {
            "type": "object",
            "properties": {"country": {"type": "string"}, "code": {"type": "string"}},
            "required": ["country", "code"],
            "if": {"properties": {"country": {"const": "US"}}},
            "then": {"properties": {"code": {"pattern": "^[0-9]{5}$"}}},
        },
        ['{"country":"US","code":"12345"}'],
        ['{"country":"US","code":"1"}'],
    ),
    "not a type": ({"not": {"type": ["string", "object"]}}, ["1", "[]"], ['"x"', "{}"]),
    "not a value": ({"enum": ["a", "b", "c"], "not": {"const": "b"}}, ['"a"'], ['"b"']),
    "not required": (
        {**A, "properties": {"a": INT, "b": INT}, "not": {"required": ["b"]}},
        ['{"a":1}'],
        ['{"a":1,"b":2}'],
    ),
    "dependentRequired": (
        {"properties": {"card": INT, "name": INT}, "dependentRequired": {"card": ["name"]}},
        ["{}", '{"name":1}', '{"card":1,"name":1}'],
        ['{"card":1}'],
    ),
    "dependentSchemas": (
        {"properties": {"card": INT}, "dependentSchemas": {"card": requires(name=INT)}},
        ["{}", '{"card":1,"name":1}'],
        ['{"card":1}', '{"x":1}'],
    ),
    "dependencies": (
        {"properties": {"a": INT, "b": INT}, "dependencies": {"a": ["b"]}},
        ['{"b":1}', '{"a":1,"b":1}'],
        ['{"a":1}'],
    ),
    "propertyNames of values": (
        {"type": "object", "additionalProperties": INT, "propertyNames": {"enum": ["x", "y"]}},
        ['{"x":1}', '{"y":1}', "{}"],
        ['{"z":1}', '{"x":""}'],
    ),
    "propertyNames by reference": (
        {"type": "object", "propertyNames": {"$ref": "#/$defs/N"}, "$defs": {"N": {"enum": ["x"]}}},
        ['{"x":[1]}'],
        ['{"z":1}'],
    ),
    "propertyNames of a length": (
        {"type": "object", "additionalProperties": INT, "propertyNames": {"minLength": 2, "maxLength": 3}},
        ['{"ab":1}'],
        ['{"a":1}', '{"abcd":1}'],
    ),
    "propertyNames of a pattern": (
        {"type": "object", "additionalProperties": INT, "propertyNames": {"pattern": "^k[0-9]$"}},
        ['{"k1":1}'],
        ['{"k":1}'],
    ),
    "propertyNames of a format": (
        {"type": "object", "additionalProperties": INT, "propertyNames": {"format": "date"}},
        ['{"2024-02-03":1}'],
        ['{"x":1}'],
    ),
    "unlike items of a few": (
        {"type": "array", "uniqueItems": True, "items": {"enum": ["a", "b"]}},
        ["[]", '["a"]', '["b","a"]'],
        ['["a","a"]'],
    ),
    "unlike items of some": (
        {
            "type": "array",
            "uniqueItems": True,
            "minItems": 1,
            "items": {"$ref": "#/$defs/E"},
            "$defs": {"E": {"enum": [*"abcdef"]}},
        },
        ['["a","b","f"]'],
        ["[]", '["a","b","a"]'],
    ),
    "contains": (
        {"type": "array", "items": INT, "contains": {"const": 5}},
        ["[5]", "[5,1]"],
        ["[]", "[1]"],
    ),
    "first items": (
        {"type": "array", "items": [INT, {"const": "x"}], "additionalItems": False},
        ['[1,"x"]'],
        ['["x"]', '[1,"x",2]'],
    ),
    "first items and more": (
        {"allOf": [{"type": "array", "prefixItems": [INT]}, {"items": {"minimum": 3}}], "minItems": 2},
        ["[3,4]"],
        ["[1,4]", "[3]"],
    ),
    "oneOf told apart by what has a default": (
        {
            "oneOf": [{"$ref": "#/$defs/C"}, {"$ref": "#/$defs/D"}],
            "discriminator": {"propertyName": "t"},
            "$defs": {"C": CAT, "D": DOG},
        },
        ['{"t":"cat","n":1}', '{"t":"dog"}'],
        ['{"n":1}', '{"t":"cat","m":1}'],
    ),
    "oneOf without a discriminator": ({"oneOf": [CAT, DOG]}, ['{"t":"cat","n":1}'], ['{"n":1}', "{}"]),
    "oneOf of numbers": ({"oneOf": [{"type": "number"}, INT]}, ["1.5"], ['"x"']),
    "unknown formats": ({"type": "string", "format": "file-path"}, ['"/x"'], ["1"]),
    "known formats": ({"type": "string", "format": "date"}, ['"2024-01-02"'], ['"x"']),
    "a decimal": ({"type": "string", "pattern": DECIMAL}, ['"1.5"', '"-.5"', '"7"'], ['"."', '""', '"x"']),
    "money": ({"type": "string", "pattern": MONEY}, ['"1.50"', '"123"'], ['"-"', '"+.-"']),
    "few digits": ({"type": "string", "pattern": DIGITS}, ['"1.234"', '"1234"', '"12.3400"'], ['"."', '"-"']),
    "a password": ({"type": "string", "pattern": r"^(?=.*[A-Z])(?=.*\d).{4,}$"}, ['"Abc1"'], ['"abc1"', '"Ab1"']),
    "text that is no option": ({"anyOf": [INT, {"type": "string", "pattern": r"(\w)\1"}]}, ["1"], ['"aa"']),
    "names with blanks": (
        {"properties": {"x": {"$ref": "#/$defs/My Type"}}, "required": ["x"], "$defs": {"My Type": INT}},
        ['{"x":1}'],
        ['{"x":""}'],
    ),
    "names in other letters": (
        {"properties": {"x": {"$ref": "#/$defs/地址"}}, "required": ["x"], "$defs": {"地址": {"enum": [1]}}},
        ['{"x":1}'],
        ['{"x":2}'],
    ),
    "escaped names": (
        {"properties": {"x": {"$ref": "#/$defs/a~1b%25c"}}, "required": ["x"], "$defs": {"a/b%c": {"enum": [1]}}},
        ['{"x":1}'],
        ['{"x":2}'],
    ),
    "anchors": (
        {"properties": {"x": {"$ref": "#here"}}, "required": ["x"], "$defs": {"y": {"$anchor": "here", "const": 1}}},
        ['{"x":1}'],
        ['{"x":2}'],
    ),
    "its own address": (
        {
            "$id": "https://x.org/s",
            "properties": {"x": {"$ref": "https://x.org/s#/$defs/y"}},
            "$defs": {"y": {"const": 1}},
        },
        ['{"x":1}'],
        ['{"x":2}'],
    ),
    "itself": (
        {"properties": {"v": INT, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["v"]},
        ['{"v":1}', '{"v":1,"next":{"v":2,"next":null}}'],
        ['{"v":1,"next":{"v":2,"x":1}}'],
    ),
    "a part of itself": ({"properties": {"a": INT, "b": {"$ref": "#/properties/a"}}}, ['{"a":1,"b":2}'], ['{"b":""}']),
    "anything": (True, ["1", '{"a":[]}'], []),
    "draft 4": (
        {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "type": "integer",
            "minimum": 3,
            "exclusiveMinimum": True,
        },
        ["4"],
        ["3"],
    ),
    "some of many": ({"properties": {"a": INT, "b": INT}, "minProperties": 1}, ['{"b":1}'], ["{}"]),
    "words of one's own": ({**A, "x-order": 5, "title": "T", "examples": [{}]}, ['{"a":1}'], ["{}"]),
    "a property that is called like a keyword": (
        requires(properties=requires(**{"$ref": INT, "allOf": INT})),
        ['{"properties":{"$ref":1,"allOf":2}}'],
        ['{"properties":{"$ref":1}}'],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_keywords_mean_what_the_standard_says(vocabulary: LLTokenizer, name: str) -> None:
    schema, good, bad = CASES[name]
    matcher = compiled(vocabulary, "json", json.dumps(schema))
    assert [text for text in good if not allows(matcher, text)] == []
    assert [text for text in bad if allows(matcher, text)] == []


@pytest.mark.parametrize("name", [name for name in CASES if name != "oneOf of numbers"])
def test_all_that_is_answered_matches(vocabulary: LLTokenizer, name: str) -> None:
    schema = CASES[name][0]
    validator_of = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    if name in ("first items", "dependencies"):  # as older drafts had it
        validator_of = jsonschema.Draft7Validator
    matcher, rng = compiled(vocabulary, "json", json.dumps(schema)), random.Random(name)
    answers = [json.loads(answer(matcher, rng)) for _ in range(5)]
    assert [value for value in answers if not validator_of(schema).is_valid(value)] == []


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"$ref": "#/$defs/missing"}, "leads to no schema"),
        ({"$ref": "https://example.org/other.json"}, "leads to no schema"),
        ({"$ref": 5}, "must be a string"),
        ({"type": "string", "pattern": r"(\w)\1"}, "is not supported"),
        ({"not": {"pattern": "x"}}, "`not` is supported only"),
        ({"type": "array", "contains": INT, "maxContains": 2}, "`contains` is supported"),
        ({"type": "object", "propertyNames": {"anyOf": [INT]}}, "`propertyNames` is supported"),
        ({"properties": {"a": "string"}}, "must be an object or a boolean"),
        ({"properties": ["a"]}, "`properties` must be an object"),
        ({"required": "a"}, "`required` must be a list"),
        ({"anyOf": {}}, "`anyOf` must be a list"),
        ({"allOf": [INT, {"type": "string"}]}, "no answer|nsatisfiable"),
        (False, "nothing matches"),
        ({"$ref": "#"}, "no answer to it ever ends"),
    ],
)
def test_what_cannot_be_held_to_is_refused(vocabulary: LLTokenizer, schema: Any, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        compiled(vocabulary, "json", json.dumps(schema))


def test_objects_stay_open_where_that_is_wanted(vocabulary: LLTokenizer) -> None:
    matcher = compiled(vocabulary, "open_json", json.dumps(A))
    assert allows(matcher, '{"a":1,"b":2}') and not allows(matcher, '{"b":2}')


def test_a_large_form_is_taken(vocabulary: LLTokenizer) -> None:
    schema = {
        "type": "object",
        "properties": {
            f"field_{i}": {"type": "string", "title": f"Field {i}", "description": "words " * 20} for i in range(500)
        },
        "required": [f"field_{i}" for i in range(500)],
    }
    text = json.dumps(schema)
    assert len(text) > 80_000
    matcher = compiled(vocabulary, "json", text)
    assert allows(matcher, json.dumps({f"field_{i}": "x" for i in range(500)}, separators=(",", ":")))


def call(name: str, **parameters: Any) -> dict[str, Any]:
    return {"name": name, "parameters": parameters}


def test_references_move_with_their_tool(vocabulary: LLTokenizer) -> None:
    city, place = requires(city={"enum": ["Paris"]}), requires(lat={"enum": [1]})
    tools = {
        "is_parallel": False,
        "functions": [
            call("a", **requires(loc={"$ref": "#/$defs/Loc"}), **{"$defs": {"Loc": city}}),
            call("b", **requires(loc={"$ref": "#/$defs/Loc"}), **{"$defs": {"Loc": place}}),
            call("c", **requires(loc={"$ref": "#/definitions/Loc"}), definitions={"Loc": city}),
            call("d", type="object", properties={"v": INT, "next": {"$ref": "#"}}, required=["v"]),
            call("e", type="object", properties={"a": INT, "b": {"$ref": "#/properties/a"}}, required=["b"]),
        ],
    }
    matcher = compiled(vocabulary, "calls", json.dumps(tools))
    for name, parameters, is_allowed in (
        ("a", {"loc": {"city": "Paris"}}, True),
        ("a", {"loc": {"lat": 1}}, False),
        ("b", {"loc": {"lat": 1}}, True),
        ("b", {"loc": {"city": "Paris"}}, False),
        ("c", {"loc": {"city": "Paris"}}, True),
        ("c", {"loc": {"lat": 1}}, False),
        ("d", {"v": 1, "next": {"v": 2}}, True),
        ("d", {"v": 1, "next": [{"name": "d", "parameters": {"v": 1}}]}, False),
        ("e", {"b": 2}, True),
        ("e", {"b": "x"}, False),
    ):
        assert allows(matcher, json.dumps([call(name, **parameters)])) is is_allowed, (name, parameters)
    assert not allows(matcher, json.dumps([call("e", b=2), call("e", b=3)]))


def test_the_tool_that_cannot_be_called_is_named(vocabulary: LLTokenizer) -> None:
    functions = [call("good", **A), call("bad", **requires(x={"type": "string", "pattern": r"\bx"}))]
    with pytest.raises(RefusedError, match="the parameters of `bad`: the pattern"):
        compiled(vocabulary, "calls", json.dumps({"is_parallel": True, "functions": functions}))
