"""The messages of gpt-oss (harmony): each has a header that names its channel, and whom it is for if it is a call.

`<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json
<|message|>{...}<|call|>`. Analysis is reasoning; what goes to a function is a call; all else is for the reader.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kunserve.api.say.calls.formats import new_call_id
from kunserve.api.say.calls.json_reader import whole_arguments
from kunserve.api.say.calls.marks import first_mark, held_back, mark_at
from kunserve.api.say.calls.stepwise import Stepwise, joined
from kunserve.api.say.deltas import CallArguments, CallBegin, Delta, Reasoning, Text

_MESSAGE = "<|message|>"
_BEGINS = ("<|start|>", "<|channel|>")  # of a header
_ENDS = ("<|end|>", "<|call|>", "<|return|>")  # of a message
_FIRST = (*_BEGINS, "<|constrain|>", _MESSAGE, "to=functions.")  # what an output that has headers begins with
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([\w.:/-]+)")


class _State(enum.Enum):
    UNDECIDED = enum.auto()  # whether the output has headers at all
    HEADER = enum.auto()
    TEXT = enum.auto()
    REASONING = enum.auto()
    CALL = enum.auto()


class Channels(Stepwise):
    """Reads one output. Implements `parser.ToolParser`, and tells the reasoning as well."""

    _state: _State

    def __init__(
        self, tools: Sequence[Mapping[str, Any]] = (), is_open: bool = False, reads_calls: bool = True
    ) -> None:
        """Begin to read. `is_open`: the prompt has begun an analysis. Not `reads_calls`: calls are text."""
        super().__init__()
        self._names = {tool["function"]["name"] for tool in tools}
        self._state = _State.REASONING if is_open else _State.UNDECIDED
        self._reads_calls = reads_calls
        self._num_calls = 0
        self._arguments: str | None = None  # of this call, as long as they may be no object; then they go out
        self._is_told: set[_State] = set()  # what has been said of
        self._breaks_line = False  # this message goes on with what one before has said

    def finish(self, is_cut: bool) -> list[Delta]:
        """See `ToolParser`."""
        rest, self._buffer = self._buffer, ""
        if is_cut:
            return []
        if self._state is _State.HEADER:  # one that did not end; text, if it had not begun
            return [Text(rest)] if rest.strip() and not first_mark(rest, _FIRST)[1] else []
        if self._state is _State.UNDECIDED:
            return [Text(rest)] if rest.strip() else []
        return joined([*self._say(rest), *self._end()])

    def _step(self) -> list[Delta]:
        if self._state is _State.UNDECIDED:
            if (mark := mark_at(self._buffer.lstrip(), 0, _FIRST)) is not None:
                self._state = _State.HEADER if mark else _State.TEXT
            return []
        if self._state is _State.HEADER:
            header, message, rest = self._buffer.partition(_MESSAGE)
            if not message:
                return []
            self._buffer = rest
            return self._begin(header)
        marks = _ENDS + _BEGINS
        index, mark = first_mark(self._buffer, marks)
        if not mark:
            index -= held_back(self._buffer, marks)
        piece, self._buffer = self._buffer[:index], self._buffer[index + (len(mark) if mark in _ENDS else 0) :]
        return [*self._say(piece), *self._end()] if mark else self._say(piece)

    def _begin(self, header: str) -> list[Delta]:
        """Begin a message."""
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        name = "" if recipient is None else recipient[1].removeprefix("functions.")
        is_function = recipient is not None and (name != recipient[1] or name in self._names)
        self._breaks_line = False
        if is_function and self._reads_calls:
            self._state, self._arguments = _State.CALL, ""
            return [CallBegin(self._num_calls, new_call_id(), name)]
        is_analysis = channel is not None and channel[1] == "analysis"
        self._state = _State.REASONING if is_analysis else _State.TEXT
        self._breaks_line = self._state in self._is_told
        return []

    def _say(self, piece: str) -> list[Delta]:
        """Return more of this message."""
        if self._state is _State.CALL:
            return self._say_arguments(piece)
        if not piece:
            return []
        self._is_told.add(self._state)
        piece, self._breaks_line = "\n" * self._breaks_line + piece, False
        return [Reasoning(piece) if self._state is _State.REASONING else Text(piece)]

    def _say_arguments(self, piece: str) -> list[Delta]:
        if self._arguments is not None:
            piece = self._arguments = (self._arguments + piece).lstrip()
            if not piece.startswith("{"):
                return []
            self._arguments = None
        return [CallArguments(self._num_calls, piece)] if piece else []

    def _end(self) -> list[Delta]:
        """End this message."""
        was_call, self._state = self._state is _State.CALL, _State.HEADER
        if not was_call:
            return []
        self._num_calls += 1
        if self._arguments is None:
            return []
        return [CallArguments(self._num_calls - 1, whole_arguments(self._arguments))]
