"""Tool calls in the ways model families write them, out of a stream of text.

A parser belongs to one choice: `push` takes text and returns what is certain by now, `finish` the rest.
"""

from __future__ import annotations

import secrets
import string
from typing import Protocol

from kunserve.api.say.call_reader import CallReader
from kunserve.api.say.deltas import CallArguments, CallBegin, Delta, Text

_SEPARATORS = " \t\r\n,;[]"  # between calls
_MISTRAL_ID = string.ascii_letters + string.digits


class ToolParser(Protocol):
    """See the module."""

    def push(self, text: str) -> list[Delta]:
        """Take more text."""

    def finish(self) -> list[Delta]:
        """The output has ended."""


def held_back(text: str, tag: str) -> int:
    """Length of the longest end of `text` that may become `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)


def new_call_id() -> str:
    """As OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


def new_mistral_call_id() -> str:
    """Nine letters and digits: Mistral's templates refuse others."""
    return "".join(secrets.choice(_MISTRAL_ID) for _ in range(9))


class TaggedCalls:
    """Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number, text around them."""

    start, end = "<tool_call>", "</tool_call>"
    has_special_marks = False  # whether a tokenizer has them as special tokens, which the text must show then

    def __init__(self) -> None:
        self._buffer = ""
        self._is_inside = False
        self._reader: CallReader | None = None
        self._num_calls = 0

    def push(self, text: str) -> list[Delta]:
        """See `ToolParser`."""
        self._buffer += text
        deltas: list[Delta] = []
        while self._buffer:
            before = len(self._buffer)
            deltas += self._inside() if self._is_inside else self._outside()
            if len(self._buffer) == before:
                break
        return deltas

    def finish(self) -> list[Delta]:
        """See `ToolParser`."""
        deltas = self._reader.finish() if self._reader is not None else []
        if not self._is_inside and self._buffer.strip() and self._reader is None:
            deltas.append(Text(self._buffer))
        self._buffer, self._reader = "", None
        return deltas

    def new_id(self) -> str:
        """Id of the next call."""
        return new_call_id()

    def _outside(self) -> list[Delta]:
        place = self._buffer.find(self.start)
        if place >= 0:
            text, self._buffer = self._buffer[:place], self._buffer[place + len(self.start) :]
            self._is_inside = True
        else:
            cut = len(self._buffer) - held_back(self._buffer, self.start)
            text, self._buffer = self._buffer[:cut], self._buffer[cut:]
        if self._num_calls:  # line ends between calls say nothing
            text = text.lstrip() if text.strip() else ""
        return [Text(text)] if text else []

    def _inside(self) -> list[Delta]:
        if self._reader is None:
            self._buffer = self._buffer.lstrip(_SEPARATORS)
            if not self._buffer:
                return []
            if self.end and self._buffer.startswith(self.end):
                self._buffer, self._is_inside = self._buffer[len(self.end) :], False
                return []
            if self.end and self.end.startswith(self._buffer):
                return []
            if not self._begin():
                return []
        return self._read()

    def _begin(self) -> bool:
        """Begin a call at the buffer's start; False if more is needed to tell."""
        if self._buffer[0] != "{":
            self._buffer = self._buffer[1:]  # neither call nor end: nothing anybody could use
            return False
        self._reader = CallReader(self._num_calls, self.new_id())
        return True

    def _read(self) -> list[Delta]:
        deltas: list[Delta] = []
        reader = self._reader
        assert reader is not None
        for place, char in enumerate(self._buffer):
            deltas += reader.push(char)
            if self._is_over(reader):
                self._buffer, self._reader = self._buffer[place + 1 :], None
                self._num_calls += reader.is_call
                return joined(deltas)
        self._buffer = ""
        return joined(deltas)

    def _is_over(self, reader: CallReader) -> bool:
        return reader.is_done


class JsonCalls(TaggedCalls):
    """Llama 3: an answer that begins with `{` (or `<|python_tag|>`) is calls, `;` between them; all else is text."""

    start, end = "<|python_tag|>", ""
    has_special_marks = True

    def __init__(self) -> None:
        super().__init__()
        self._is_undecided = True

    def push(self, text: str) -> list[Delta]:
        """See `ToolParser`."""
        if self._is_undecided and (whole := (self._buffer + text).lstrip()):
            self._is_undecided = False
            self._is_inside = whole[0] in "{["
        elif self._is_undecided:
            self._buffer += text
            return []
        return super().push(text)


class MistralCalls(TaggedCalls):
    """Mistral: `[TOOL_CALLS]` and a JSON list of calls, or `name{...}` and `name[ARGS]{...}` in newer models."""

    start, end = "[TOOL_CALLS]", ""
    has_special_marks = True

    def __init__(self) -> None:
        super().__init__()
        self._is_bare = False  # the name stood before the object

    def new_id(self) -> str:
        """See `TaggedCalls`."""
        return new_mistral_call_id()

    def _begin(self) -> bool:
        brace = self._buffer.find("{")
        if brace < 0:
            return False
        name = self._buffer[:brace].removeprefix("TOOL_CALLS]").partition("[")[0].strip()
        self._is_bare = bool(name)
        self._buffer = self._buffer[brace:]
        self._reader = CallReader(self._num_calls, self.new_id())
        if name:
            quoted = name.replace("\\", "\\\\").replace('"', '\\"')
            self._buffer = f'{{"name": "{quoted}", "arguments": {self._buffer}'
        return True

    def _is_over(self, reader: CallReader) -> bool:
        if self._is_bare and reader.has_arguments and reader.depth == 1:
            reader.push("}")
        return reader.is_done


class NamedCall:
    """The whole output is the arguments of one function, whose name the client gave."""

    def __init__(self, name: str) -> None:
        self._name, self._has_begun = name, False

    def push(self, text: str) -> list[Delta]:
        """See `ToolParser`."""
        if not text:
            return []
        begin: list[Delta] = [] if self._has_begun else [CallBegin(0, new_call_id(), self._name)]
        self._has_begun = True
        return [*begin, CallArguments(0, text)]

    def finish(self) -> list[Delta]:
        """See `ToolParser`."""
        return []


def joined(deltas: list[Delta]) -> list[Delta]:
    """The same with neighbours of a kind in one."""
    result: list[Delta] = []
    for delta in deltas:
        last = result[-1] if result else None
        if isinstance(delta, CallArguments) and isinstance(last, CallArguments) and last.index == delta.index:
            result[-1] = CallArguments(delta.index, last.text + delta.text)
        elif isinstance(delta, Text) and isinstance(last, Text):
            result[-1] = Text(last.text + delta.text)
        else:
            result.append(delta)
    return result


TOOL_PARSERS: dict[str, type[TaggedCalls]] = {
    "hermes": TaggedCalls,
    "qwen": TaggedCalls,
    "qwen2_5": TaggedCalls,
    "llama3_json": JsonCalls,
    "llama3": JsonCalls,
    "mistral": MistralCalls,
}


def parser_of_template(source: str | None) -> str | None:
    """Name of the parser for what a chat template shows of calls; None if it shows none."""
    if source is None or "tools" not in source:
        return None
    for mark, name in (("<tool_call>", "hermes"), ("[TOOL_CALLS]", "mistral"), ("<|python_tag|>", "llama3_json")):
        if mark in source:
            return name
    return "llama3_json" if "<|start_header_id|>" in source else None
