from __future__ import annotations

import pytest

from kunserve.api.ask.chat_template import ChatTemplate
from kunserve.api.say.calls.formats import TOOL_FORMATS
from kunserve.api.say.calls.parser import CallsParser
from kunserve.api.say.deltas import Message
from kunserve.api.say.reasoning import REASONING_FORMATS, MessageParser, ThinkSplitter, reasoning_of_template
from kunserve.api.say.reasoning_tokens import ReasoningTokens


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
    ("name", "text", "reasoning", "answer"),
    [
        ("granite", "Here is my thought process: hm Here is my response: yes", " hm ", "yes"),
        ("granite", "Here's my thought process:hm\n\nHere's my response:\n\nyes", "hm\n\n", "yes"),
        ("granite", "Here is my answer: yes", "", "Here is my answer: yes"),
        ("mistral", "[THINK]hm[/THINK]yes", "hm", "yes"),
        ("kimi_k2", "<think>hm</think>yes", "hm", "yes"),
        ("kimi_k2", "<think>hm<|tool_calls_section_begin|>", "hm", "<|tool_calls_section_begin|>"),
        ("glm45", "\n<think>hm</think>\nyes", "hm", "yes"),
        ("deepseek_v3", "<think>hm</think>yes", "hm", "yes"),
    ],
)
def test_formats_of_reasoning(name: str, text: str, reasoning: str, answer: str) -> None:
    for size in range(1, len(text) + 1):
        parser, message = MessageParser(ThinkSplitter(False, REASONING_FORMATS[name]), None), Message()
        for start in range(0, len(text), size):
            message.add(parser.push(text[start : start + size]))
        message.add(parser.push("", is_last=True))
        assert (message.reasoning, message.text) == (reasoning, answer), size


@pytest.mark.parametrize("name", ["qwen3", "granite", "mistral"])
def test_reasoning_that_is_cut_leaves_no_mark(name: str) -> None:
    form = REASONING_FORMATS[name]
    for start, end in zip(form.starts, form.ends, strict=True):
        text = f"{start}hm{end}yes"
        for length in range(len(text)):
            parser, message = MessageParser(ThinkSplitter(False, form), None), Message()
            message.add(parser.push(text[:length], is_last=True, is_cut=True))
            assert "hm".startswith(message.reasoning) and "yes".startswith(message.text)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{{ messages }}", None),
        ("{% if '</think>' in messages[0].content %}no{% endif %}", None),
        ("{% if enable_thinking is false %}<think>\\n\\n</think>{% endif %}", "qwen3"),
        ("<|im_assistant|>assistant<|im_middle|><think></think>", "kimi_k2"),
        ("<｜Assistant｜><think>", "deepseek_v3"),
        ("<｜Assistant｜>{% if thinking %}<think>{% else %}</think>{% endif %}", "deepseek_v3"),
        ("{% if enable_thinking is false %}<|assistant|>\\n<think></think>{% endif %} <arg_key>", "glm45"),
        ("{% for m in messages if m.role == 'assistant' %}<think>{{ m.reasoning_content }}</think>{% endfor %}", None),
        ("Write your thoughts after 'Here is my thought process:'", "granite"),
        ("[SYSTEM]Think in [THINK][/THINK] first.", "mistral"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "openai_gptoss"),
    ],
)
def test_the_template_tells_the_reasoning(source: str, name: str | None) -> None:
    assert reasoning_of_template(source, ChatTemplate(source).render([{"role": "user", "content": "Hi"}])) == name


def test_without_a_template_there_is_no_reasoning() -> None:
    assert reasoning_of_template(None) is None


class Words:
    """A tokenizer whose tokens are the words of a text, for the count alone."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def token_bytes(self, token_id: int) -> bytes:
        return self.words[token_id].encode()


CHANNELS = ("<|channel|>", "analysis", "<|message|>", "a", "b", "<|end|>", "<|start|>", "assistant")


@pytest.mark.parametrize(
    ("name", "is_open", "words", "num"),
    [
        ("qwen3", False, ("<think>", "a", "</th", "ink>", "yes", "</think>"), 4),
        ("qwen3", False, ("yes", "<think>", "a", "</think>"), 0),
        ("qwen3", True, ("a", "</think>", "yes"), 2),
        ("granite", False, ("Here is", " my thought process:", "a", "Here is my response:", "yes"), 4),
        ("openai_gptoss", False, (*CHANNELS, "<|channel|>", "final", "<|message|>", "yes"), 6),
        ("openai_gptoss", False, (*CHANNELS, *CHANNELS[:6], "<|start|>"), 6 + 3),
        ("openai_gptoss", True, ("a", "<|end|>", "<|channel|>", "final", "<|message|>", "yes"), 2),
    ],
)
def test_tokens_of_reasoning_are_counted(name: str, is_open: bool, words: tuple[str, ...], num: int) -> None:
    counter = ReasoningTokens(Words(*words), is_open, REASONING_FORMATS[name])  # type: ignore[arg-type]
    for token_id in range(len(words)):
        counter.take([token_id])
    assert counter.num_tokens == num
    again = counter.fresh()
    again.take(range(len(words)))
    assert again.num_tokens == num
