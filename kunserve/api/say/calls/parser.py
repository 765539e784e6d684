"""Tool calls out of the text of one choice: `push` takes text and returns what is certain by now, `finish` the rest.

What stands where a call should, but is none, comes back as text, without the marks around it. No part of a mark or of
a call does, even if the output was cut inside it.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from kunserve.api.say.calls.formats import CallFormat, Tags, new_call_id
from kunserve.api.say.calls.json_reader import JsonReader
from kunserve.api.say.calls.marks import first_mark, held_back, mark_at
from kunserve.api.say.calls.stepwise import Stepwise, joined
from kunserve.api.say.calls.tag_reader import TagReader
from kunserve.api.say.calls.values import ArgumentTypes
from kunserve.api.say.deltas import CallArguments, CallBegin, Delta, Text

_NAME = re.compile(r"[\w.:/-]+")
_BETWEEN = " \t\r\n,;]}"  # calls; models write a brace too many
MAX_HEAD_CHARS = 512  # longer ones name no function


class ToolParser(Protocol):
    """See the module."""

    def push(self, text: str) -> list[Delta]:
        """Take more text."""

    def finish(self, is_cut: bool) -> list[Delta]:
        """Return what is left at the end of the output; `is_cut`: which the model did not end itself."""


class Reader(Protocol):
    """What reads one call, from its arguments on. `rest` is what follows, once it `is_done`."""

    is_done: bool
    is_call: bool
    rest: str

    def push(self, text: str) -> list[Delta]:
        """Take more text."""

    def finish(self, is_cut: bool) -> list[Delta]:
        """See `ToolParser`."""


class _State(enum.Enum):
    UNDECIDED = enum.auto()  # whether the answer begins with a call
    TEXT = enum.auto()
    HEAD = enum.auto()  # inside of the marks, before a call
    CALL = enum.auto()


class CallsParser(Stepwise):
    """Reads one format."""

    _state: _State

    def __init__(self, format: CallFormat, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        """Begin to read text of a format. `tools`: those of the request, for what only they can tell."""
        super().__init__()
        self._format = format
        self._opening = "" if format.tags is None else format.tags.name[0]  # of a name: nothing to leave out
        self._schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        self._state = _State.UNDECIDED if format.is_bare else _State.TEXT
        self._reader: Reader | None = None
        self._num_calls = 0
        self._brackets = ""  # that have been passed over, text if no call follows
        self._is_raw = False  # the text is inside of marks, because it is no call
        self._is_behind_call = False  # what closes it is still to come
        self._strips_text = False  # blanks between calls say nothing

    def finish(self, is_cut: bool) -> list[Delta]:
        """See `ToolParser`."""
        deltas: list[Delta] = []
        if self._reader is not None:
            deltas = self._reader.finish(is_cut)
            if self._brackets and not self._reader.is_call and deltas:
                deltas = [Text(self._brackets), *deltas]
        elif self._state is _State.HEAD and not is_cut:
            deltas = self._finish_head()
        elif not is_cut and self._buffer.strip():
            deltas = [Text(self._buffer)]
        self._buffer, self._reader = "", None
        return joined(deltas)

    def _step(self) -> list[Delta]:
        match self._state:
            case _State.UNDECIDED:
                if begin := self._buffer.lstrip():
                    self._state = _State.HEAD if begin[0] in "{[" else _State.TEXT
                return []
            case _State.TEXT:
                return self._read_text()
            case _State.HEAD:
                return self._read_head()
            case _State.CALL:
                return self._read_call()

    def _read_text(self) -> list[Delta]:
        marks = self._format.marks if self._is_raw else self._format.starts
        index, mark = first_mark(self._buffer, marks)
        if not mark:
            index -= held_back(self._buffer, marks)
        text, self._buffer = self._buffer[:index], self._buffer[index + (len(mark) if mark != self._opening else 0) :]
        if mark in self._format.starts:
            self._state = _State.HEAD
        self._is_raw = self._is_raw and mark not in (*self._format.starts, *self._format.ends)
        if self._strips_text:
            text = text.lstrip()
            self._strips_text = not text
        return [Text(text)] if text else []

    def _read_head(self) -> list[Delta]:
        format = self._format
        if self._is_behind_call and not self._skip_to_mark():
            return []
        rest = self._buffer = self._buffer.lstrip(_BETWEEN)
        mark = mark_at(rest, 0, format.marks)
        if mark is None or not rest:
            return []
        if mark and mark != self._opening and (format.head is None or mark not in format.call_marks[:-1]):
            self._buffer, self._brackets = rest[len(mark) :], ""
            if mark in format.ends:
                self._state = _State.TEXT
            return []
        if rest[0] == "[":
            self._buffer, self._brackets = rest[1:], self._brackets + "["
            return []
        if rest[0] == "{":
            return self._begin(JsonReader(self._num_calls, format.new_id(), None, format.marks))
        if format.head is not None:
            return self._read_name()
        return self._read_tagged_name(format.tags) if format.tags is not None else self._as_text()

    def _skip_to_mark(self) -> bool:
        """Leave out what closes a call (a fence); False if the mark behind it has not come."""
        index, mark = first_mark(self._buffer, self._format.marks)
        self._is_behind_call = not mark
        end = index if mark else len(self._buffer) - held_back(self._buffer, self._format.marks)
        self._buffer = self._buffer[end:]
        return bool(mark)

    def _read_name(self) -> list[Delta]:
        """Read a head, up to the arguments."""
        format, rest = self._format, self._buffer
        stops = (*format.ends, *format.starts, *format.call_marks[-1:])
        stop, mark = first_mark(rest, stops)
        brace = rest.find("{", 0, stop)
        if brace >= 0:
            if (match := self._match(rest[:brace])) is None:
                return self._as_text()
            self._buffer = rest[brace:]
            call_id = match.groupdict().get("id") or format.new_id()
            return self._begin(JsonReader(self._num_calls, call_id, match["name"], format.marks))
        if mark:
            return self._without_arguments(stop)
        return self._as_text() if len(rest) > MAX_HEAD_CHARS else []

    def _read_tagged_name(self, tags: Tags) -> list[Delta]:
        """Read a name that tags with arguments follow."""
        opening, closing = tags.name
        if opening and (mark := mark_at(self._buffer, 0, (opening,))) != opening:
            return [] if mark is None else self._as_text()
        rest = self._buffer[len(opening) :].lstrip()
        name = _NAME.match(rest)
        if name is None or name.end() > MAX_HEAD_CHARS:
            return self._as_text() if rest else []
        follows = (closing,) if closing else (tags.key[0], *self._format.ends)
        rest = rest[name.end() :].lstrip()
        if (mark := mark_at(rest, 0, follows)) is None:
            return []
        is_other = mark in self._format.ends and self._schemas and name[0] not in self._schemas
        if not mark or is_other:
            return self._as_text()
        self._buffer = rest[len(closing) :]
        begin = CallBegin(self._num_calls, self._format.new_id(), name[0])
        types = ArgumentTypes(self._schemas.get(name[0], {}))
        return self._begin(TagReader(begin, tags, (*self._format.ends, *self._format.starts), types))

    def _match(self, head: str) -> re.Match[str] | None:
        return None if self._format.head is None or len(head) > MAX_HEAD_CHARS else self._format.head.search(head)

    def _without_arguments(self, stop: int) -> list[Delta]:
        """Return the call that has only a head, which reaches to `stop`; text if it names no tool."""
        match = self._match(self._buffer[:stop])
        if match is None or (self._schemas and match["name"] not in self._schemas):
            return self._as_text()
        self._buffer = self._buffer[stop:]
        call_id = match.groupdict().get("id") or self._format.new_id()
        begin = CallBegin(self._num_calls, call_id, match["name"])
        self._end_call()
        return [begin, CallArguments(begin.index, "{}")]

    def _as_text(self) -> list[Delta]:
        """Go on with what should have been a call as text."""
        text, self._brackets = self._brackets, ""
        if self._opening and self._buffer.startswith(self._opening):  # would be taken for the beginning of a call again
            text, self._buffer = text + self._opening, self._buffer[len(self._opening) :]
        self._state, self._is_raw = _State.TEXT, True
        self._strips_text = self._strips_text and not text
        return [Text(text), *self._read_text()] if text else self._read_text()

    def _begin(self, reader: Reader) -> list[Delta]:
        self._reader, self._state = reader, _State.CALL
        return []

    def _read_call(self) -> list[Delta]:
        reader = self._reader
        assert reader is not None
        deltas = reader.push(self._buffer)
        self._buffer = ""
        if not reader.is_done:
            return deltas
        self._buffer, self._reader = reader.rest, None
        if reader.is_call:
            self._end_call()
            return deltas
        brackets, self._brackets = self._brackets, ""
        self._state, self._is_raw = _State.TEXT, True
        return [Text(brackets), *deltas] if brackets else deltas

    def _end_call(self) -> None:
        self._num_calls += 1
        self._state, self._brackets, self._strips_text = _State.HEAD, "", True
        self._is_behind_call = bool(self._format.call_marks)

    def _finish_head(self) -> list[Delta]:
        """Return what the beginning of a call says that did not go on."""
        if self._is_behind_call or (self._buffer and mark_at(self._buffer, 0, self._format.marks) is None):
            return []
        if self._match(self._buffer) is not None:
            return self._without_arguments(len(self._buffer))
        text = self._brackets + self._buffer
        for mark in self._format.call_marks:
            text = text.replace(mark, "")
        return [Text(text)] if text else []


class NamedCall:
    """Reads an output that is nothing but the arguments of one function, whose name the client gave."""

    def __init__(self, name: str, new_id: Callable[[], str] = new_call_id) -> None:
        self._name, self._new_id, self._has_begun = name, new_id, False

    def push(self, text: str) -> list[Delta]:
        """See `ToolParser`."""
        if not text:
            return []
        begin: list[Delta] = [] if self._has_begun else [CallBegin(0, self._new_id(), self._name)]
        self._has_begun = True
        return [*begin, CallArguments(0, text)]

    def finish(self, is_cut: bool) -> list[Delta]:
        """See `ToolParser`."""
        return []
