from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from kunserve.api.say.calls.formats import TOOL_FORMATS
from kunserve.api.say.calls.parser import CallsParser, NamedCall, ToolParser
from kunserve.api.say.deltas import Message
from kunserve.api.say.reasoning import MessageParser

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


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "deep": {"type": "object"},
        "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "time"}},
]
TAGGED = [
    (
        "qwen3_coder",
        "Well.\n\n<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n<parameter=days>\n5\n"
        "</parameter>\n<parameter=unit>\nnull\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=time>\n"
        "</function>\n</tool_call>",
        "Well.\n\n",
        [("weather", '{"city": "Bern", "days": 5, "unit": null}'), ("time", "{}")],
    ),
    (
        "qwen3_coder",
        "<function=weather>\n<parameter=city>\n\n<b>\n\n</parameter>\n</function>\n</tool_call>\n\nDone.",
        "Done.",
        [("weather", '{"city": "\\n<b>\\n"}')],
    ),
    ("qwen3_coder", "<function=weather><parameter=city>Bern", "", [("weather", '{"city": "Bern"}')]),
    ("qwen3_coder", '<tool_call>{"name": "time", "arguments": {}}</tool_call>', "", [("time", "{}")]),
    (
        "qwen3_coder",
        "In C, <function= is no call, <tool_call>nor this</tool_call>.",
        "In C, <function= is no call, nor this.",
        [],
    ),
    (
        "glm45",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Bern\n</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>x</arg_value>\n</tool_call>\n<tool_call>time</tool_call>",
        "",
        [("weather", '{"city": "Bern\\n", "days": "x"}'), ("time", "{}")],
    ),
    (
        "glm47",
        "<tool_call>other<arg_key>a</arg_key><arg_value>[1]</arg_value><arg_key>b</arg_key></tool_call>",
        "",
        [("other", '{"a": "[1]"}')],
    ),
    ("glm45", "<tool_call>sorry</tool_call> no", "sorry no", []),
    ("glm45", "<tool_call>I am sorry</tool_call>", "I am sorry", []),
    (
        "kimi_k2",
        "Well.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "Bern"}<|tool_call_end|><|tool_call_begin|>functions.time:1<|tool_call_argument_begin|>null'
        "<|tool_call_end|><|tool_calls_section_end|>",
        "Well.",
        [("weather", '{"city": "Bern"}'), ("time", "{}")],
    ),
    (
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>so?<|tool_call_end|><|tool_calls_section_end|>!",
        "so?!",
        [],
    ),
    ("kimi_k2", "<|tool_calls_section_begin|><|tool_call_begin|>functions.time", "functions.time", []),
    (
        "kimi_k2",
        '<|tool_call_section_begin|><|tool_call_begin|>f<|tool_call_argument_begin|>{"a": 1',
        "",
        [("f", '{"a": 1')],
    ),
    (
        "deepseek_v3",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Bern"}\n```'
        "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
        "",
        [("weather", '{"city": "Bern"}'), ("time", "{}")],
    ),
    (
        "deepseek_v31",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        [("function", "{}")],
    ),
    ("granite", '<|tool_call|>[{"name": "time", "arguments": {}}]\nDone.', "Done.", [("time", "{}")]),
    ("granite", '<tool_call>[{"name": "time"}, {"name": "time"}]', "", [("time", "{}"), ("time", "{}")]),
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


@pytest.mark.parametrize(("name", "text", "content", "calls"), TAGGED)
def test_calls_of_other_families(name: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    rng = random.Random(text)
    for cut in (lambda: 1, lambda: len(text), *[lambda: rng.randrange(1, 9)] * 20):
        message = read(CallsParser(TOOL_FORMATS[name], TOOLS), text, cut)
        assert [(call.name, call.arguments) for call in message.calls] == calls
        assert message.text == content


def test_kimi_keeps_the_ids_that_the_model_writes() -> None:
    head = "<|tool_calls_section_begin|><|tool_call_begin|>functions.time:3<|tool_call_argument_begin|>"
    message = read(CallsParser(TOOL_FORMATS["kimi_k2"]), head + "{}<|tool_call_end|>", lambda: 5)
    assert message.calls[0].call_id == "functions.time:3"


def test_strings_between_tags_go_out_before_they_are_complete() -> None:
    parser, message = CallsParser(TOOL_FORMATS["qwen3_coder"], TOOLS), Message()
    message.add(parser.push("<tool_call><function=weather><parameter=days>5</parameter><parameter=city>\nBe"))
    assert (message.calls[0].name, message.calls[0].arguments) == ("weather", '{"days": 5, "city": "Be')


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
