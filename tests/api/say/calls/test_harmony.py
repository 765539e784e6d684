from __future__ import annotations

import pytest

from kunserve.api.say.calls.harmony import Channels
from kunserve.api.say.deltas import Message

TOOLS = [{"type": "function", "function": {"name": "time"}}]
START = "<|start|>assistant"
THOUGHT = "<|channel|>analysis<|message|>hm<|end|>"
FINAL = "<|channel|>final<|message|>yes"
CALL = '<|channel|>commentary to=functions.time <|constrain|>json<|message|>{"zone": "UTC"}<|call|>'
TIME = ("time", '{"zone": "UTC"}')


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        (FINAL, "", "yes", []),
        (FINAL + "<|return|>", "", "yes", []),
        (THOUGHT + START + FINAL, "hm", "yes", []),
        (THOUGHT + START + THOUGHT + START + FINAL, "hm\nhm", "yes", []),
        (THOUGHT + START + CALL, "hm", "", [TIME]),
        (CALL + START + CALL, "", "", [TIME, TIME]),
        (CALL.removesuffix("<|call|>"), "", "", [TIME]),
        (f"{THOUGHT}{START}<|channel|>commentary<|message|>Plan.<|end|>{START}{CALL}", "hm", "Plan.", [TIME]),
        (' to=functions.time<|channel|>commentary json<|message|>{"zone": "UTC"}<|call|>', "", "", [TIME]),
        ("<|channel|>analysis to=functions.time code<|message|>{}<|call|>", "", "", [("time", "{}")]),
        ("<|channel|>commentary to=time<|message|>null<|call|>", "", "", [("time", "{}")]),
        ("<|channel|>commentary to=functions.time<|message|><|call|>", "", "", [("time", "{}")]),
        ("<|channel|>commentary to=functions.other<|message|> {}<|call|>", "", "", [("other", "{}")]),
        ("<|channel|>analysis to=browser.search<|message|>{}<|call|>", "{}", "", []),
        (f"<|channel|>final<|message|>a{START}{FINAL}", "", "a\nyes", []),
        ("plain <text>", "", "plain <text>", []),
        ("to=you", "", "to=you", []),
        ("plain<|end|>", "", "plain", []),
        ("<|chan", "", "<|chan", []),
        ("<|channel|>fin", "", "", []),
    ],
)
def test_channels_however_the_text_is_cut(
    text: str, reasoning: str, content: str, calls: list[tuple[str, str]]
) -> None:
    for size in range(1, len(text) + 1):
        parser, message = Channels(TOOLS), Message()
        for start in range(0, len(text), size):
            message.add(parser.push(text[start : start + size]))
        message.add(parser.finish(is_cut=False))
        assert (message.reasoning, message.text) == (reasoning, content), size
        assert [(call.name, call.arguments) for call in message.calls] == calls


def test_a_cut_leaves_no_marks() -> None:
    text = f"{THOUGHT}{START}<|channel|>commentary<|message|>Plan.<|end|>{START}{CALL}"
    for length in range(len(text)):
        parser, message = Channels(TOOLS), Message()
        message.add(parser.push(text[:length]))
        message.add(parser.finish(is_cut=True))
        assert "hm".startswith(message.reasoning) and "Plan.".startswith(message.text)
        assert all(call.name == "time" and TIME[1].startswith(call.arguments) for call in message.calls)


def test_the_prompt_may_have_begun_the_analysis() -> None:
    message, parser = Message(), Channels(is_open=True)
    message.add([*parser.push(f"hm<|end|>{START}{FINAL}"), *parser.finish(is_cut=False)])
    assert (message.reasoning, message.text) == ("hm", "yes")


def test_without_tools_calls_are_text() -> None:
    message, parser = Message(), Channels(reads_calls=False)
    message.add([*parser.push(THOUGHT + START + CALL), *parser.finish(is_cut=False)])
    assert (message.reasoning, message.text, message.calls) == ("hm", TIME[1], [])
