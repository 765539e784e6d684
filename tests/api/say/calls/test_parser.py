from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from kunserve.api.say.calls.formats import TOOL_FORMATS, format_of_template
from kunserve.api.say.calls.parser import CallsParser, NamedCall, ToolParser
from kunserve.api.say.deltas import Message
from kunserve.api.say.reasoning import MessageParser, ThinkSplitter

WEATHER = ("weather", '{"city": "Bern", "deep": {"a": [1, "}{\\""]}}')
TIME = ("time", "{}")
CASES = [
    ("hermes", "just text < tool", "just text < tool", []),
    (
        "hermes",
        'Let me see.<tool_call>\n{"name": "weather", "arguments": @}\n</tool_call>'.replace("@", WEATHER[1]),
        "Let me see.",
        [WEATHER],
    ),
    (
        "hermes",
        '<tool_call>{"name": "weather", "arguments": @}</tool_call>\n<tool_call>{"arguments": {}, "name": "time"}'
        "</tool_call>\nDone.".replace("@", WEATHER[1]),
        "Done.",
        [WEATHER, TIME],
    ),
    ("hermes", '<tool_call>{"name": "time", "arguments": "{}"}</tool_call>', "", [TIME]),
    ("hermes", '<tool_call>{"name": "time"}</tool_call>', "", [TIME]),
    ("hermes", '<tool_call>{"nom": 1}</tool_call>', '{"nom": 1}', []),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"ci', "", [("weather", '{"ci')]),
    ("hermes", '<tool_call>{"na', '{"na', []),
    ("llama3_json", '{"name": "weather", "parameters": @}'.replace("@", WEATHER[1]), "", [WEATHER]),
    (
        "llama3_json",
        ' <|python_tag|>{"name": "weather", "parameters": @}; {"name": "time", "parameters": {}}'.replace(
            "@", WEATHER[1]
        ),
        " ",
        [WEATHER, TIME],
    ),
    ("llama3_json", "No {braces} at the start.", "No {braces} at the start.", []),
    ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
    ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": @}]'.replace("@", WEATHER[1]), "", [WEATHER]),
    ("mistral", '[TOOL_CALLS][{"name":"time","arguments":{}},{"name":"time","arguments":{}}]', "", [TIME, TIME]),
    ("mistral", "Well.[TOOL_CALLS]weather[ARGS]@[TOOL_CALLS]time{}".replace("@", WEATHER[1]), "Well.", [WEATHER, TIME]),
    ("mistral", "no calls [TOOL", "no calls [TOOL", []),
    # what is no call is text
    ("hermes", 'So.<tool_call>\nf(city="Bern")\n</tool_call> Done.', 'So.f(city="Bern")\n Done.', []),
    ("hermes", "<tool_call><function=f><parameter=a>1</tool_call>", "<function=f><parameter=a>1", []),
    ("hermes", "<tool_call>{'name': 'f'}</tool_call>", "{'name': 'f'}", []),
    ("hermes", '<tool_call>[1, {"name": "time"}]</tool_call>', '[1, {"name": "time"}]', []),
    ("hermes", '<tool_call>f()</tool_call><tool_call>{"name": "time"}</tool_call>', "f()", [TIME]),
    ("llama3_json", '[{"a": 1}, {"b": 2}]', '[{"a": 1}, {"b": 2}]', []),
    ("llama3_json", "[Docs](x)", "[Docs](x)", []),
    ("llama3_json", "[", "[", []),
    ("mistral", "[TOOL_CALLS]I cannot {do} that", "I cannot {do} that", []),
    ("mistral", "[TOOL_CALLS]" + "long " * 200 + "{", "long " * 200 + "{", []),
    # arguments are an object
    ("hermes", '<tool_call>{"name": "time", "arguments": null}</tool_call>', "", [TIME]),
    ("hermes", '<tool_call>{"name": "time", "arguments": ""}</tool_call>', "", [TIME]),
    ("hermes", '<tool_call>{"name": "time", "arguments": " null "}</tool_call>', "", [TIME]),
    ("hermes", '<tool_call>{"arguments": [], "name": "time"}</tool_call>', "", [TIME]),
    ("llama3_json", '{"name": "time", "parameters": null}; {"name": "time"}', "", [TIME, TIME]),
    # braces too few or too many, blanks in the text behind a call
    ("hermes", '<tool_call>{"name": "time", "arguments": {}</tool_call> ok', "ok", [TIME]),
    ("hermes", '<tool_call>{"name": "time"</tool_call>', "", [TIME]),
    ("hermes", '<tool_call>{"name": "time", "arguments": {}}}</tool_call>', "", [TIME]),
    ("hermes", '<tool_call>{"name": "time"}</tool_call>\n\nIt is  noon. \n', "It is  noon. \n", [TIME]),
    ("hermes", '<tool_call>{"name": "time"}</tool_', "", [TIME]),
]


def read(parser: ToolParser, text: str, cut: Callable[[], int]) -> Message:
    whole, message = MessageParser(None, parser), Message()
    while text:
        size = cut()
        message.add(whole.push(text[:size]))
        text = text[size:]
    message.add(whole.push("", is_last=True))
    assert whole.num_calls == len(message.calls)
    return message


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_calls_however_the_text_is_cut(name: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    rng = random.Random(text)
    for cut in (lambda: 1, lambda: len(text), *[lambda: rng.randrange(1, 9)] * 20):
        message = read(CallsParser(TOOL_FORMATS[name]), text, cut)
        assert [(call.name, call.arguments) for call in message.calls] == calls
        assert message.text == content
        assert len({call.call_id for call in message.calls}) == len(calls)


def test_arguments_go_out_before_they_are_complete() -> None:
    parser = CallsParser(TOOL_FORMATS["hermes"])
    message = Message()
    message.add(parser.push('<tool_call>{"name": "weather", "arguments": {"city": "Be'))
    assert (message.calls[0].name, message.calls[0].arguments) == ("weather", '{"city": "Be')


def test_mistral_ids_are_nine_characters() -> None:
    message = read(CallsParser(TOOL_FORMATS["mistral"]), "[TOOL_CALLS]time{}", lambda: 3)
    assert len(message.calls[0].call_id) == 9 and message.calls[0].call_id.isalnum()


def test_a_named_call_is_all_arguments() -> None:
    message = read(NamedCall("time"), '{"a": 1}', lambda: 2)
    assert [(call.name, call.arguments) for call in message.calls] == [("time", '{"a": 1}')]


def test_only_the_first_call_if_not_parallel() -> None:
    parser, message = MessageParser(None, CallsParser(TOOL_FORMATS["mistral"]), is_parallel=False), Message()
    message.add(parser.push("[TOOL_CALLS]weather{}[TOOL_CALLS]time{}", is_last=True))
    assert [call.name for call in message.calls] == ["weather"]
    assert parser.num_calls == 1


@pytest.mark.parametrize(
    ("is_open", "text", "reasoning", "answer"),
    [
        (False, "<think>\nhm</think>\n\nyes", "\nhm", "yes"),
        (False, "yes <think>no</think>", "", "yes <think>no</think>"),
        (False, "<th", "", "<th"),
        (False, "<think>endless", "endless", ""),
        (False, "<think></think>yes", "", "yes"),
        (True, "hm</think>yes", "hm", "yes"),
        (True, "<think>hm</think> yes </think>", "hm", "yes </think>"),
        (True, "hm</thin", "hm</thin", ""),
    ],
)
def test_reasoning_however_the_text_is_cut(is_open: bool, text: str, reasoning: str, answer: str) -> None:
    for size in range(1, len(text) + 1):
        parser, message = MessageParser(ThinkSplitter(is_open), None), Message()
        for start in range(0, len(text), size):
            message.add(parser.push(text[start : start + size]))
        message.add(parser.push("", is_last=True))
        assert (message.reasoning, message.text) == (reasoning, answer), size


def test_calls_after_reasoning() -> None:
    parser, message = MessageParser(ThinkSplitter(False), CallsParser(TOOL_FORMATS["hermes"])), Message()
    message.add(parser.push('<think><tool_call></think>\n<tool_call>{"name": "time"}</tool_call>', is_last=True))
    assert message.reasoning == "<tool_call>" and [call.name for call in message.calls] == ["time"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (None, None),
        ("{% for m in messages %}", None),
        ("{{ tools }} <tool_call>", "hermes"),
        ("{{ tools }} [TOOL_CALLS]", "mistral"),
        ("{{ tools }} <|python_tag|>", "llama3_json"),
    ],
)
def test_the_template_tells_the_parser(source: str | None, name: str | None) -> None:
    assert format_of_template(source) == name
