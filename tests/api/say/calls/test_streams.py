"""However an output is cut into pieces, and wherever it ends: the same message, and no part of a call in its text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from kunserve.api.say.calls.formats import HARMONY, TOOL_FORMATS
from kunserve.api.say.calls.harmony import Channels
from kunserve.api.say.calls.parser import CallsParser, ToolParser
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


def granite(calls: Calls) -> str:
    return f"<|tool_call|>[{', '.join(named(*call) for call in calls)}]"


def granite_20b(calls: Calls) -> str:
    return "\n".join(f"<function_call> {named(*call)}" for call in calls)


def qwen3_coder(calls: Calls) -> str:
    return "\n".join(f"<tool_call>\n{function_tag(*call)}\n</tool_call>" for call in calls)


def qwen3_coder_without_marks(calls: Calls) -> str:
    return "\n".join(function_tag(*call) for call in calls)


def function_tag(name: str, arguments: dict[str, Any]) -> str:
    parameters = "".join(f"<parameter={key}>\n{plain(value)}\n</parameter>\n" for key, value in arguments.items())
    return f"<function={name}>\n{parameters}</function>"


def glm(calls: Calls) -> str:
    def arguments_of(arguments: dict[str, Any]) -> str:
        return "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{plain(value)}</arg_value>\n" for key, value in arguments.items()
        )

    return "\n".join(f"<tool_call>{name}\n{arguments_of(arguments)}</tool_call>" for name, arguments in calls)


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def kimi(calls: Calls) -> str:
    def call_of(index: int, name: str, arguments: dict[str, Any]) -> str:
        head = f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>"
        return f"{head}{json.dumps(arguments)}<|tool_call_end|>"

    inner = "".join(call_of(index, *call) for index, call in enumerate(calls))
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def deepseek_v3(calls: Calls) -> str:
    inner = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{json.dumps(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def deepseek_v31(calls: Calls) -> str:
    inner = "".join(
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json.dumps(arguments)}<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def harmony(calls: Calls) -> str:
    """Calls behind a preamble, which the test has begun."""
    return "<|end|>" + "".join(
        f"<|start|>assistant<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        f"{json.dumps(arguments)}<|call|>"
        for name, arguments in calls
    )


def named(name: str, arguments: dict[str, Any], key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments})


WRITERS: list[tuple[str, Callable[[Calls], str]]] = [
    ("hermes", hermes),
    ("llama3_json", llama),
    ("mistral", mistral),
    ("mistral", mistral_named),
    ("granite", granite),
    ("granite-20b-fc", granite_20b),
    ("granite4", hermes),
    ("qwen3_coder", qwen3_coder),
    ("qwen3_coder", qwen3_coder_without_marks),
    ("glm45", glm),
    ("kimi_k2", kimi),
    ("deepseek_v3", deepseek_v3),
    ("deepseek_v31", deepseek_v31),
    ("openai", harmony),
]
TYPES: list[Any] = [{"type": "string"}, {"type": ["integer", "null", "number"]}, {"type": "array"}, {"type": "object"}]
PARAMETERS = {"type": "object", "properties": {f"key{index}": schema for index, schema in enumerate(TYPES)}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in NAMES]


def text_of(rng: random.Random, most: int) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randrange(most)))


def value_of(rng: random.Random, kind: int, depth: int = 0) -> Any:
    """A value of one of `TYPES`."""
    if kind == 0:
        return text_of(rng, 12)
    if kind == 1:
        return rng.choice([None, rng.randrange(-99, 99), rng.random()])
    inner = [value_of(rng, rng.randrange(2 if depth > 2 else 4), depth + 1) for _ in range(rng.randrange(3))]
    return inner if kind == 2 else {text_of(rng, 4): value for value in inner}


def calls_of(rng: random.Random) -> Calls:
    return [
        (rng.choice(NAMES), {f"key{kind}": value_of(rng, kind) for kind in range(rng.randrange(5))})
        for _ in range(rng.randrange(1, 4))
    ]


def parser_of(form: str) -> ToolParser:
    return Channels(TOOLS) if TOOL_FORMATS[form] is HARMONY else CallsParser(TOOL_FORMATS[form], TOOLS)


def read(form: str, text: str, rng: random.Random | None = None, is_cut: bool = False) -> Message:
    """What a parser makes of a text, in one piece or in some of random sizes."""
    parser, message = MessageParser(None, parser_of(form)), Message()
    while rng is not None and text:
        size = rng.randrange(1, 12) if rng.random() < 0.8 else 1
        message.add(parser.push(text[:size]))
        text = text[size:]
    message.add(parser.push(text, is_last=True, is_cut=is_cut))
    return message


def shape(message: Message) -> tuple[str, str, list[tuple[str, str]]]:
    return message.text, message.reasoning, [(call.name, call.arguments) for call in message.calls]


@pytest.mark.parametrize(("form", "write"), WRITERS)
def test_what_was_written_is_read_and_a_cut_leaks_nothing(form: str, write: Callable[[Calls], str]) -> None:
    rng = random.Random(f"{form} {write.__name__}")
    for _ in range(8):
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


def marks_of(form: str) -> list[str]:
    if TOOL_FORMATS[form] is HARMONY:
        channels = [f"<|channel|>{channel}<|message|>" for channel in ("analysis", "commentary", "final")]
        call = "<|channel|>commentary to=functions.f<|message|>"
        return ["<|start|>assistant", "<|end|>", "<|call|>", "<|channel|>", "<|message|>", call, *channels]
    tags = TOOL_FORMATS[form].tags
    pairs = () if tags is None else (tags.name, tags.key, tags.value, (tags.end,))
    return [*TOOL_FORMATS[form].marks, *(mark for pair in pairs for mark in pair if mark)]


@pytest.mark.parametrize("form", sorted(TOOL_FORMATS))
@pytest.mark.parametrize("is_cut", [False, True])
def test_any_output_is_read_the_same_in_any_pieces(form: str, is_cut: bool) -> None:
    rng = random.Random(f"{form} {is_cut}")
    marks = marks_of(form)
    pieces = [*marks, *marks, *(mark[:-1] for mark in marks), *LETTERS, *NAMES, '{"name": "f", "arguments": {"a": 1}}']
    pieces += ['{"name": "f", "parameters": null', '{"a":', '"arguments": ', "{}", "[ARGS]", ",", ":", "text ", "key0"]
    for _ in range(300):
        output = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 14)))
        assert shape(read(form, output, rng, is_cut)) == shape(read(form, output, None, is_cut)), output
