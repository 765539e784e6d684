"""Reasoning apart from the answer, then tool calls apart from the text: one choice's output to deltas."""

from __future__ import annotations

from kunserve.api.say.deltas import CallArguments, CallBegin, Delta, Reasoning, Text
from kunserve.api.say.tool_parsers import ToolParser, held_back

START, END = "<think>", "</think>"
REASONING_PARSERS = ("deepseek_r1", "qwen3")


class ThinkSplitter:
    """`<think>...</think>` at the beginning of the output is reasoning; what follows is the answer.

    `is_open`: the template has written `<think>` already (DeepSeek-R1, Qwen3-Thinking).
    """

    def __init__(self, is_open: bool) -> None:
        self._is_open, self._is_over = is_open, False
        self._has_begun = False
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
        place = self._buffer.find(END)
        if place >= 0:
            return self._end_of_reasoning(self._buffer[:place], self._buffer[place + len(END) :])
        cut = len(self._buffer) - held_back(self._buffer, END)
        reasoning, self._buffer = self._buffer[:cut], self._buffer[cut:]
        return reasoning, ""

    def finish(self) -> tuple[str, str]:
        """The output has ended."""
        rest, self._buffer = self._buffer, ""
        return (rest, "") if self._is_open and not self._is_over else ("", rest)

    def _begin(self) -> bool:
        """Whether it is clear by now if the output begins with reasoning."""
        begin = self._buffer.lstrip()
        if len(begin) < len(START) and START.startswith(begin):
            return False
        self._has_begun = True
        if begin.startswith(START):
            self._is_open, self._buffer = True, begin[len(START) :]
        return True

    def _end_of_reasoning(self, reasoning: str, answer: str) -> tuple[str, str]:
        self._is_over, self._buffer = True, ""
        self._strips = bool(reasoning) or self._is_open
        return reasoning, self._answer(answer)

    def _answer(self, text: str) -> str:
        if self._strips:  # the line ends after </think> are no one's
            text = text.lstrip()
            self._strips = not text
        return text


class MessageParser:
    """Everything a choice says, in order. `num_calls` counts tool calls so far."""

    def __init__(self, think: ThinkSplitter | None, tools: ToolParser | None, is_parallel: bool = True) -> None:
        self.num_calls = 0
        self._think, self._tools, self._is_parallel = think, tools, is_parallel

    def push(self, text: str, is_last: bool = False) -> list[Delta]:
        """Take more text; deltas that are certain by now, all of them if it `is_last`."""
        reasoning, answer = ("", text) if self._think is None else self._think.push(text)
        if is_last and self._think is not None:
            more_reasoning, more_answer = self._think.finish()
            reasoning, answer = reasoning + more_reasoning, answer + more_answer
        deltas: list[Delta] = [Reasoning(reasoning)] if reasoning else []
        if self._tools is None:
            return [*deltas, Text(answer)] if answer else deltas
        found = self._tools.push(answer)
        if is_last:
            found += self._tools.finish()
        for delta in found:
            if isinstance(delta, CallBegin):
                self.num_calls += self._is_parallel or delta.index == 0
            if self._is_parallel or not (isinstance(delta, CallBegin | CallArguments) and delta.index):
                deltas.append(delta)
        return deltas
