"""Reasoning apart from the answer, then tool calls apart from the text: one choice's output to deltas."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kunserve.api.say.calls.marks import first_mark, held_back, mark_at
from kunserve.api.say.calls.parser import ToolParser
from kunserve.api.say.deltas import CallArguments, CallBegin, Delta, Reasoning, Text


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """What reasoning stands between, at the beginning of an output."""

    starts: tuple[str, ...]
    ends: tuple[str, ...]
    stops: tuple[str, ...] = ()  # end it as well, and belong to the answer
    is_open: bool = False  # every output begins inside of it, whatever the prompt ends with
    has_special_marks: bool = False  # as of `CallFormat`
    repeats: bool = False  # the output may come back to it
    is_before_structure: bool = True  # a structure holds for what follows it; else for the whole output


THINK = ReasoningFormat(("<think>",), ("</think>",))

# `calls.harmony.Channels` reads it. A structure would have to allow the headers behind it.
ANALYSIS = ReasoningFormat(
    ("<|channel|>analysis<|message|>",), ("<|end|>",), has_special_marks=True, repeats=True, is_before_structure=False
)
GRANITE = ReasoningFormat(
    ("Here is my thought process:", "Here's my thought process:"),
    ("Here is my response:", "Here's my response:"),
    is_before_structure=False,
)

REASONING_FORMATS = {  # by vLLM's names
    "deepseek_r1": replace(THINK, is_open=True),
    "deepseek_v3": THINK,
    "glm45": THINK,
    "granite": GRANITE,
    "kimi_k2": replace(THINK, stops=("<|tool_calls_section_begin|>",), has_special_marks=True),
    "mistral": ReasoningFormat(("[THINK]",), ("[/THINK]",), has_special_marks=True),
    "openai_gptoss": ANALYSIS,
    "qwen3": THINK,
}

# What a template shows -> the format it shows, the first that fits.
_SHOWN = (
    (("<|channel|>", "<|message|>"), "openai_gptoss"),
    (("Here is my thought process:",), "granite"),
    (("<think>", "<|im_middle|>"), "kimi_k2"),
    (("<think>", "<｜Assistant｜>"), "deepseek_v3"),
    (("<think>", "<arg_key>"), "glm45"),
    (("<think>",), "qwen3"),
    (("[THINK]",), "mistral"),
)
_SURE = ("openai_gptoss", "granite", "kimi_k2")  # whose template shows it only if the model reasons, or does no harm


def reasoning_of_template(source: str | None, conversation: str = "") -> str | None:
    """Return the name of the format that a chat template shows of reasoning; None if the model does not reason.

    `conversation`: what the template makes of a new one. Templates of models that do not reason may show how others'
    messages are written, and a structure would wait for the end of a reasoning that never comes.
    """
    if source is None:
        return None
    name = next((name for marks, name in _SHOWN if all(mark in source for mark in marks)), None)
    if name is None or name in _SURE or "enable_thinking" in source:
        return name
    format = REASONING_FORMATS[name]
    return name if any(mark in conversation for mark in format.starts + format.ends) else None


class ThinkSplitter:
    """Tells reasoning at the beginning of the output from what follows, the answer."""

    def __init__(self, is_open: bool, format: ReasoningFormat = THINK) -> None:
        """Begin to read. `is_open`: the template has opened the reasoning already (DeepSeek-R1, Qwen3-Thinking)."""
        self._format = format
        self._is_open, self._is_over = is_open, False
        self._has_begun = self._strips = False
        self._buffer = ""

    def push(self, text: str) -> tuple[str, str]:
        """Take more text; return reasoning and answer as far as they are certain."""
        if self._is_over:
            return "", self._answer(text)
        self._buffer += text
        if not self._has_begun and not self._begin():
            return "", ""
        if not self._is_open:
            return self._end_of_reasoning("", self._buffer)
        marks = self._format.ends + self._format.stops
        index, mark = first_mark(self._buffer, marks)
        if mark:
            answer = self._buffer[index if mark in self._format.stops else index + len(mark) :]
            return self._end_of_reasoning(self._buffer[:index], answer)
        index -= held_back(self._buffer, marks)
        reasoning, self._buffer = self._buffer[:index], self._buffer[index:]
        return reasoning, ""

    def finish(self, is_cut: bool) -> tuple[str, str]:
        """Return what is left at the end of the output; what may be the beginning of a mark is, if it `is_cut`."""
        rest, self._buffer = "" if is_cut else self._buffer, ""
        return (rest, "") if self._is_open and not self._is_over else ("", rest)

    def _begin(self) -> bool:
        """Return whether it is clear by now if the output begins with reasoning."""
        begin = self._buffer.lstrip()
        if (mark := mark_at(begin, 0, self._format.starts)) is None:
            return False
        self._has_begun = True
        if mark:
            self._is_open, self._buffer = True, begin[len(mark) :]
        return True

    def _end_of_reasoning(self, reasoning: str, answer: str) -> tuple[str, str]:
        self._is_over, self._buffer = True, ""
        self._strips = self._is_open
        return reasoning, self._answer(answer)

    def _answer(self, text: str) -> str:
        if self._strips:  # the line ends after </think> are no one's
            text = text.lstrip()
            self._strips = not text
        return text


class MessageParser:
    """Reads everything that a choice says, in order. `num_calls` counts tool calls so far."""

    def __init__(self, think: ThinkSplitter | None, tools: ToolParser | None, is_parallel: bool = True) -> None:
        self.num_calls = 0
        self._think, self._tools, self._is_parallel = think, tools, is_parallel

    @property
    def has_tools(self) -> bool:
        """Return whether the output may hold tool calls."""
        return self._tools is not None

    def push(self, text: str, is_last: bool = False, is_cut: bool = False) -> list[Delta]:
        """Take more text; return deltas that are certain by now, all of them if it `is_last`.

        `is_cut`: it is the last because there was no room for more; what had begun is not complete.
        """
        reasoning, answer = ("", text) if self._think is None else self._think.push(text)
        if is_last and self._think is not None:
            more_reasoning, more_answer = self._think.finish(is_cut)
            reasoning, answer = reasoning + more_reasoning, answer + more_answer
        deltas: list[Delta] = [Reasoning(reasoning)] if reasoning else []
        if self._tools is None:
            return [*deltas, Text(answer)] if answer else deltas
        found = self._tools.push(answer)
        if is_last:
            found += self._tools.finish(is_cut)
        for delta in found:
            if isinstance(delta, CallBegin):
                self.num_calls += self._is_parallel or delta.index == 0
            if self._is_parallel or not (isinstance(delta, CallBegin | CallArguments) and delta.index):
                deltas.append(delta)
        return deltas
