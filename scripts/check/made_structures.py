"""Schemas, grammars and regexes as nobody should send them: deep, wide, cyclic, doubling, in all alphabets; some fine.

Used by fuzz_structures.py. The same seed makes the same ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

ALPHABETS = [
    "abcdefgh",
    "äöüßéñ",
    "日本語漢字",
    "🙂🚀👩‍🚀",
    "\u202eab\u0301\u200b",
    '"\\/{}[]()|*+?.$^',
    "\x01\t\n\u2028",
]

Made = tuple[str, Any]  # "json", "regex", "grammar" or "choice", and the structure


def word(rng: random.Random) -> str:
    """Return a few characters of one alphabet."""
    return "".join(rng.choices(rng.choice(ALPHABETS), k=rng.randrange(1, 6)))


def number(rng: random.Random, most: int) -> int:
    """Draw a number, as often small as large."""
    return int(most ** rng.random())


def _leaf(rng: random.Random) -> dict[str, Any]:
    size = number(rng, 10**6)
    return rng.choice(
        [
            {"type": rng.choice(["string", "integer", "number", "boolean", "null"])},
            {"type": "string", "minLength": number(rng, 5000), "maxLength": size},
            {"type": "string", "pattern": regex(rng)},
            {"type": "string", "format": rng.choice(["date-time", "email", "uuid", "ipv6", "nothing"])},
            {"type": "integer", "minimum": -size, "maximum": 10 ** number(rng, 300)},
            {"type": "number", "multipleOf": rng.choice([0.001, 7, 1e-9])},
            {"enum": [word(rng) for _ in range(number(rng, 1000))]},
            {"const": word(rng)},
        ]
    )


def deep_schema(rng: random.Random) -> Any:
    """Make schemas inside each other, by one keyword or several."""
    schema = _leaf(rng)
    for _ in range(number(rng, 900)):
        name = word(rng)
        schema = rng.choice(
            [
                {"items": schema},
                {"type": "object", "properties": {name: schema}, "required": [name]},
                {"anyOf": [schema, {"type": "null"}]},
                {"allOf": [schema]},
                {"additionalProperties": schema},
            ]
        )
    return schema


def wide_schema(rng: random.Random) -> Any:
    """Make a schema with up to 3000 properties, alternatives, items or values."""
    count = number(rng, 3000)
    leaves = [_leaf(rng) for _ in range(min(count, 20))]
    parts = [leaves[i % len(leaves)] for i in range(count)]
    names = [f"{word(rng)}{i}" for i in range(count)]
    required = rng.sample(names, rng.choice([0, min(count, 5), count]))
    return rng.choice(
        [
            {"type": "object", "properties": dict(zip(names, parts, strict=True)), "required": required},
            {"anyOf": parts},
            {"allOf": [{"anyOf": parts[:3]} for _ in range(min(count, 60))]},
            {"type": "array", "prefixItems": parts, "minItems": count},
            {"type": "array", "items": parts[0], "minItems": count, "maxItems": number(rng, 10**7) + count},
            {"enum": names},
            {"type": "object", "patternProperties": dict.fromkeys(names, parts[0])},
        ]
    )


def linked_schema(rng: random.Random) -> Any:
    """Make definitions that refer to each other: in a chain, in a circle, twice to the next, or anyhow."""
    count, shape = number(rng, 3000), rng.choice(["chain", "circle", "doubling", "any"])
    definitions: dict[str, Any] = {}
    for i in range(count):
        following = rng.randrange(count) if shape == "any" else i + 1
        following = 0 if shape == "circle" and following == count else following
        reference = {"$ref": f"#/$defs/{following}"}
        both = {"type": "object", "properties": {"x": reference, "y": reference}, "required": ["x", "y"]}
        one = {"type": "object", "properties": {"x": reference}, "required": ["x"] * rng.randrange(2)}
        options = [reference, {"items": reference}, one, {"anyOf": [reference, {"type": "null"}]}]
        definitions[str(i)] = both if shape == "doubling" else rng.choice(options) if shape == "any" else options[i % 4]
    if rng.random() < 0.5:  # all alike: as the chains that overflow a stack
        definitions = {name: {"items": {"$ref": f"#/$defs/{int(name) + 1}"}} for name in definitions}
    definitions[str(count)] = _leaf(rng)
    return {"$ref": "#/$defs/0", "$defs": definitions}


def regex(rng: random.Random) -> str:
    """Make repetitions, nested parentheses, classes, counts of counts, or nonsense."""
    part = rng.choice(["(a|b)*", "(a+)+", ".*a", r"\p{L}{0,50}", "[\\w\\s]", "(x|y|)", "(?i)ß", word(rng)])
    counts = f"{{{number(rng, 100)},{number(rng, 10**5) + 100}}}"
    return rng.choice(
        [
            part * number(rng, 8000),
            "(" * (depth := number(rng, 9000)) + part + ")" * depth,
            f"({part}){counts}",
            f"(({part}){{1,{number(rng, 900)}}}){counts}",
            "|".join(word(rng) for _ in range(number(rng, 3000))),
            f".*{part}.{{{number(rng, 3000)}}}",
            word(rng) + rng.choice(["(", "[", "(?!x)", "\\", "{2,1}", "*"]),
            "[0-9]{1,5}",
        ]
    )[:65000]


def grammar(rng: random.Random) -> str:
    """Make a grammar in Lark or GBNF: chains, circles, rules that double, deep, wide, ambiguous, or nonsense."""
    is_gbnf, count = rng.random() < 0.3, number(rng, 3500)
    colon, start = (" ::= ", "root") if is_gbnf else (": ", "start")
    letter = rng.choice(["r", "R"]) if not is_gbnf else "r"
    last = rng.choice(
        [f"{letter}0", '"a"', json.dumps(word(rng), ensure_ascii=False), "[a-z]+" if is_gbnf else "/[a-z]+/"]
    )
    twice = rng.random() < 0.4
    rules = [
        f"{letter}{i}{colon}{letter}{i + 1}" + f" {letter}{i + 1}" * twice
        for i in range(min(count, 60 if twice else count))
    ]
    chain = "\n".join([f"{start}{colon}{letter}0", *rules, f"{letter}{len(rules)}{colon}{last}"])
    depth = number(rng, 5000)
    return rng.choice(
        [
            chain,
            chain,
            f'{start}{colon}{start} "a"',
            f'{start}{colon}"a" {start}',
            f'{start}{colon}"a" {start} | "b"',
            f'{start}{colon}a\na{colon}a a a a | {json.dumps(word(rng))} | ""',
            f'{start}{colon}{"(" * depth}"a"{")" * depth}',
            f"{start}{colon}" + " | ".join(json.dumps(word(rng), ensure_ascii=False) for _ in range(number(rng, 3000))),
            f"start: x\nx: %json {json.dumps(linked_schema(rng))}",
            "".join(rng.choices('start: "ab"|()*?+~{}[]/\\\n%', k=number(rng, 500))),
            f'{start}{colon}"yes" | "no"',
        ]
    )[:65000]


def make(rng: random.Random) -> Made:
    """Make a structure of any kind."""
    schemas: list[Callable[[random.Random], Any]] = [deep_schema, wide_schema, linked_schema, linked_schema, _leaf]
    kinds: list[Callable[[], Made]] = [
        lambda: ("json", rng.choice(schemas)(rng)),
        lambda: ("json", rng.choice(schemas)(rng)),
        lambda: ("regex", regex(rng)),
        lambda: ("grammar", grammar(rng)),
        lambda: ("choice", [word(rng) for _ in range(number(rng, 3000))]),
    ]
    return rng.choice(kinds)()


def asked(rng: random.Random, made: Made) -> tuple[str, dict[str, Any]]:
    """Make a request with a structure: some endpoint, some field."""
    kind, value = made
    more = {"max_tokens": rng.choice([1, 8]), "stream": rng.random() < 0.3}
    chat = {"messages": [{"role": "user", "content": "Say something."}], **more}
    tools = [{"type": "function", "function": {"name": "f", "parameters": value}}]
    name = rng.choice(["guided_", ""]) + kind
    plain = {name: value} if name.startswith("guided") else {"structured_outputs": {name: value}}
    ways: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": "x", **more, **plain}),
        ("/v1/chat/completions", {**chat, **plain}),
    ]
    if kind == "json":
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": value}}
        named = {"type": "function", "function": {"name": "f"}}
        anthropic = {**chat, "tools": [{"name": "f", "input_schema": value}], "tool_choice": {"type": "any"}}
        output = {"input": "x", "max_output_tokens": 8, "stream": more["stream"]}
        ways += [
            ("/v1/chat/completions", {**chat, "response_format": form}),
            ("/v1/chat/completions", {**chat, "tools": tools, "tool_choice": rng.choice(["required", named])}),
            ("/v1/messages", anthropic),
            ("/v1/messages", {**chat, "output_config": {"format": {"type": "json_schema", "schema": value}}}),
            ("/v1/responses", {**output, "text": {"format": {"type": "json_schema", "name": "n", "schema": value}}}),
            (
                "/v1/responses",
                {
                    **output,
                    "tools": [{"type": "function", "name": "f", "parameters": value}],
                    "tool_choice": "required",
                },
            ),
        ]
    return rng.choice(ways)
