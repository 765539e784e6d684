"""However an output is cut into pieces, and wherever it ends: the same message, and no part of a call in its text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from kunserve.api.say.calls.formats import TOOL_FORMATS
from kunserve.api.say.calls.parser import CallsParser
from kunserve.api.say.deltas import Message
from kunserve.api.say.reasoning import MessageParser

Calls = list[tuple[str, dict[str, Any]]]
LETTERS = ["a", "B", " ", "\n", '"', "\\", "{", "}", "[", "]", "<", ">", "|", "/", "é", "😀", "</", "<|", "tool", "```"]
NAMES = ["f", "get_weather", "a.b-c:d", "name"]


def hermes(calls: Calls) -> str:
    return "\n".join(f"<tool_call>\n{named(name, arguments)}\n</tool_call>" for name, arguments in calls)


def llama(calls: Calls) -> str:
    return "<|python_tag|>" + "; ".join(named(*call, key="parameters") for call in calls)


def mistral(calls: Calls) -> str:
    return f"[TOOL_CALLS] [{', '.join(named(*call) for call in calls)}]"


def mistral_named(calls: Calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}" for name, arguments in calls)


def named(name: str, arguments: dict[str, Any], key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments})


WRITERS: list[tuple[str, Callable[[Calls], str]]] = [
    ("hermes", hermes),
    ("llama3_json", llama),
    ("mistral", mistral),
    ("mistral", mistral_named),
]


def text_of(rng: random.Random, most: int) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randrange(most)))


def value_of(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(4 if depth > 2 else 6)
    if kind == 4:
        return [value_of(rng, depth + 1) for _ in range(rng.randrange(3))]
    if kind == 5:
        return {text_of(rng, 4): value_of(rng, depth + 1) for _ in range(rng.randrange(3))}
    return (text_of(rng, 12), rng.randrange(-99, 99), None, rng.random())[kind]


def calls_of(rng: random.Random) -> Calls:
    return [
        (rng.choice(NAMES), {f"key{i}": value_of(rng) for i in range(rng.randrange(4))})
        for _ in range(rng.randrange(1, 4))
    ]


def read(form: str, text: str, rng: random.Random | None = None, is_cut: bool = False) -> Message:
    """What a parser makes of a text, in one piece or in some of random sizes."""
    parser, message = MessageParser(None, CallsParser(TOOL_FORMATS[form])), Message()
    while rng is not None and text:
        size = rng.randrange(1, 12) if rng.random() < 0.8 else 1
        message.add(parser.push(text[:size]))
        text = text[size:]
    message.add(parser.push(text, is_last=True, is_cut=is_cut))
    return message


def shape(message: Message) -> tuple[str, list[tuple[str, str]]]:
    return message.text, [(call.name, call.arguments) for call in message.calls]


@pytest.mark.parametrize(("form", "write"), WRITERS)
def test_what_was_written_is_read_and_a_cut_leaks_nothing(form: str, write: Callable[[Calls], str]) -> None:
    rng = random.Random(f"{form} {write.__name__}")
    for _ in range(40):
        text, calls = "x" + text_of(rng, 12), calls_of(rng)
        output = text + write(calls)
        whole = read(form, output)
        assert whole.text == text
        assert [(call.name, json.loads(call.arguments)) for call in whole.calls] == calls
        assert shape(read(form, output, rng)) == shape(whole)
        for end in range(len(output)):
            cut = read(form, output[:end], is_cut=True)
            assert text.startswith(cut.text), (output, end)
            assert [call.name for call in cut.calls] == [name for name, _ in calls[: len(cut.calls)]]
            for call, complete in zip(cut.calls, whole.calls, strict=False):
                assert complete.arguments.startswith(call.arguments)
            assert shape(read(form, output[:end], rng, is_cut=True)) == shape(cut)


@pytest.mark.parametrize("form", sorted(TOOL_FORMATS))
@pytest.mark.parametrize("is_cut", [False, True])
def test_any_output_is_read_the_same_in_any_pieces(form: str, is_cut: bool) -> None:
    rng = random.Random(f"{form} {is_cut}")
    tags = TOOL_FORMATS[form].tags
    marks = (
        [*TOOL_FORMATS[form].marks, *(mark for pair in (tags.name, tags.key, tags.value) for mark in pair)]
        if tags
        else [*TOOL_FORMATS[form].marks]
    )
    pieces = [*marks, *marks, *(mark[:-1] for mark in marks), *LETTERS, *NAMES, '{"name": "f", "arguments": {"a": 1}}']
    pieces += ['{"name": "f", "parameters": null', '{"a":', '"arguments": ', "{}", "[ARGS]", ",", ":", "text "]
    for _ in range(300):
        output = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 14)))
        assert shape(read(form, output, rng, is_cut)) == shape(read(form, output, None, is_cut)), output
