"""A tool call whose arguments a model writes one by one between tags, read as it comes, told as JSON."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import orjson

from kunserve.api.say.calls.formats import Tags
from kunserve.api.say.calls.marks import first_mark, held_back, mark_at
from kunserve.api.say.calls.values import ArgumentTypes
from kunserve.api.say.deltas import CallArguments, CallBegin, Delta


class _State(enum.Enum):
    BETWEEN = enum.auto()
    KEY = enum.auto()
    BEFORE_VALUE = enum.auto()
    VALUE = enum.auto()


class TagReader:
    """One call, from behind its name on. Strings go out before they are complete, other values then.

    `rest` is what follows, once it `is_done`.
    """

    is_call = True

    def __init__(self, begin: CallBegin, tags: Tags, stops: Sequence[str], types: ArgumentTypes) -> None:
        """Begin a call. `stops`: marks that end it, and are not its own."""
        self.is_done = False
        self.rest = ""
        self._begin: list[Delta] = [begin]
        self._index = begin.index
        self._tags, self._types = tags, types
        self._ends = tuple(mark for mark in (*stops, tags.end) if mark)
        self._state = _State.BETWEEN
        self._key, self._num_arguments = "", 0
        self._has_begun_value = False
        self._written: list[str] = []  # not yet told

    def push(self, text: str) -> list[Delta]:
        """Take more text."""
        self.rest += text
        before = None
        while not self.is_done and before != (before := (len(self.rest), self._state)):
            self._step()
        return self._told()

    def finish(self, is_cut: bool) -> list[Delta]:
        """Return what is left if the output ended inside the call; `is_cut`: not by the model's own will."""
        if not is_cut:
            if self._state is _State.VALUE:
                index = len(self.rest) - held_back(self.rest, self._tags.value[1:])
                self._end_value(self.rest[:index])
            self._end()
        return self._told()

    def _told(self) -> list[Delta]:
        deltas, written = self._begin, "".join(self._written)
        self._begin, self._written = [], []
        return [*deltas, CallArguments(self._index, written)] if written else deltas

    def _step(self) -> None:
        match self._state:
            case _State.BETWEEN:
                self._read_between()
            case _State.KEY:
                self._read_key()
            case _State.BEFORE_VALUE:
                self._read_opening()
            case _State.VALUE:
                self._read_value()

    def _read_between(self) -> None:
        opening = self._tags.key[0]
        index, mark = first_mark(self.rest, (opening, *self._ends))
        if not mark:
            index -= held_back(self.rest, (opening, *self._ends))
            self.rest = self.rest[index:]
        elif mark == opening:
            self.rest, self._state = self.rest[index + len(mark) :], _State.KEY
        else:
            self.rest = self.rest[index + len(mark) if mark == self._tags.end else index :]
            self._end()

    def _read_key(self) -> None:
        key, closing, rest = self.rest.partition(self._tags.key[1])
        if closing:
            self._key, self.rest, self._has_begun_value = key.strip(), rest, False
            self._state = _State.BEFORE_VALUE if self._tags.value[0] else _State.VALUE

    def _read_opening(self) -> None:
        rest = self.rest.lstrip()
        if (mark := mark_at(rest, 0, self._tags.value[:1])) is not None:
            self._state = _State.VALUE if mark else _State.BETWEEN
            self.rest = rest[len(mark) :]

    def _read_value(self) -> None:
        closing = self._tags.value[1]
        value, found, rest = self.rest.partition(closing)
        if found:
            self._end_value(value)
            self.rest, self._state = rest, _State.BETWEEN
        elif self._types.is_text(self._key):
            index = len(self.rest) - held_back(self.rest, (closing,))
            index -= self._tags.pads_values and self.rest.endswith("\n", 0, index)
            # One line end may be the tag's, and which one is not clear before there is more.
            if index > 0 and (self._has_begun_value or self.rest[:index] != "\n"):
                self._write_text(self.rest[:index])
                self.rest = self.rest[index:]

    def _end_value(self, value: str) -> None:
        """Take the rest of a value."""
        if self._tags.pads_values:
            value = value.removesuffix("\n")
        if self._types.is_text(self._key):
            self._write_text(value)
            self._written.append('"')
            return
        if self._tags.pads_values:
            value = value.removeprefix("\n")
        self._written += self._opening(), self._types.to_json(self._key, value)

    def _write_text(self, piece: str) -> None:
        """Write more of a string."""
        if not self._has_begun_value:
            self._has_begun_value = True
            self._written += self._opening(), '"'
            if self._tags.pads_values:
                piece = piece.removeprefix("\n")
        self._written.append(orjson.dumps(piece).decode()[1:-1])

    def _opening(self) -> str:
        self._num_arguments += 1
        return f"{'{' if self._num_arguments == 1 else ', '}{orjson.dumps(self._key).decode()}: "

    def _end(self) -> None:
        self.is_done = True
        self._written.append("}" if self._num_arguments else "{}")
