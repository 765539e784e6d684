"""A tool call that a model writes as a JSON object, read as it comes: the arguments go out before they are complete."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from kunserve.api.say.calls.marks import mark_at
from kunserve.api.say.deltas import CallArguments, CallBegin, Delta, Text

_ARGUMENTS = ("arguments", "parameters")  # Llama 3 says parameters
_KEYS = frozenset({"name", "type", "id", "index", *_ARGUMENTS})  # an object that begins with other keys is no call
_EMPTY = ("", "null", "[]", "{}")


class JsonReader:
    """Reads one object: with `name` and `arguments`, or only the arguments of a function that was named before it.

    What turns out to be no call comes back as text. `rest` is what follows the object, once it `is_done`.
    """

    def __init__(self, index: int, call_id: str, name: str | None = None, stops: Sequence[str] = ()) -> None:
        """Begin a call. `stops`: marks that end it whatever is missing, outside of strings."""
        self.is_done = False
        self.is_call = name is not None
        self.rest = ""
        self._index, self._call_id, self._stops = index, call_id, stops
        self._first_of_stops = frozenset(stop[0] for stop in stops)
        self._begin = [CallBegin(index, call_id, name)] if name is not None else []
        self._depth, self._arguments_depth = 0, 2 if name is None else 1
        self._raw: list[str] = []
        self._in_string = self._is_escaped = False
        self._string_start = self._value_start = 0
        self._is_key, self._key = True, ""
        self._values: dict[str, str] = {}
        self._has_streamed = self._in_arguments = False
        self._written: list[str] = []  # of the arguments, not yet told

    def push(self, text: str) -> list[Delta]:
        """Take more text; the first character is the object's brace."""
        text, index = self.rest + text, 0
        while index < len(text) and not self.is_done:
            if text[index] in self._first_of_stops and not self._in_string:
                if (mark := mark_at(text, index, self._stops)) is None:
                    break
                if mark:
                    self._end(is_whole=False)
                    break
            self._take(text[index])
            index += 1
        self.rest = text[index:]
        return self._told()

    def finish(self, is_cut: bool) -> list[Delta]:
        """Return what is left if the output ended inside the object; `is_cut`: by a limit, not by the model."""
        if not is_cut:
            self._raw.append(self.rest)  # it could have become a stop: none came
            self._end(is_whole=False)
        elif not self.is_call and not self._may_be_call():
            return [Text("".join(self._raw))]
        return self._told()

    def _told(self) -> list[Delta]:
        """Return the deltas that have become certain since the last call."""
        deltas: list[Delta] = [*self._begin]
        if self._written:
            deltas.append(CallArguments(self._index, "".join(self._written)))
        if self.is_done and not self.is_call:
            deltas.append(Text("".join(self._raw)))
        self._begin, self._written = [], []
        return deltas

    def _take(self, char: str) -> None:
        self._raw.append(char)
        was_in_arguments = self._in_arguments
        if self._in_string:
            self._take_in_string(char)
        elif char == '"':
            self._in_string, self._string_start = True, len(self._raw) - 1
        elif char in "{[":
            self._depth += 1
            if self._depth == self._arguments_depth and char == "{" and self.is_call and self._are_arguments_next():
                self._in_arguments = self._has_streamed = True
        elif char in "}]":
            self._depth -= 1
            self._in_arguments = self._in_arguments and self._depth >= self._arguments_depth
            if self._depth == 0:
                self._end(is_whole=True)
        elif self._depth == 1 and char == ":":
            self._is_key, self._value_start = False, len(self._raw)
        elif self._depth == 1 and char == ",":
            self._end_value(len(self._raw) - 1)
            self._is_key, self._key = True, ""
        if was_in_arguments or self._in_arguments:
            self._written.append(char)

    def _are_arguments_next(self) -> bool:
        return self._arguments_depth == 1 or (self._key in _ARGUMENTS and not self._has_streamed)

    def _take_in_string(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = False
            if self._depth == 1 and self._is_key:
                self._key = _string("".join(self._raw[self._string_start :])) or ""

    def _end_value(self, end: int) -> None:
        self._values[self._key] = "".join(self._raw[self._value_start : end]).strip()
        if self._key == "name" and not self.is_call and (name := _string(self._values["name"])):
            self.is_call = True
            self._begin = [CallBegin(self._index, self._call_id, name)]

    def _end(self, is_whole: bool) -> None:
        """End the object. If it is not `is_whole`, closing braces are missing."""
        self.is_done = True
        if self._arguments_depth == 2 and not self._is_key:
            self._end_value(len(self._raw) - is_whole)
        if self.is_call and not self._has_streamed:
            written = next((self._values[key] for key in _ARGUMENTS if key in self._values), "")
            self._written.append(whole_arguments(written))

    def _may_be_call(self) -> bool:
        return (self._values.keys() | ({self._key} if self._key else set())) <= _KEYS


def whole_arguments(written: str) -> str:
    """Return the arguments of a call as they go out: an object, even if nothing or null was written."""
    inner = _string(written)  # some models write JSON in a string
    text = (written if inner is None else inner).strip()
    return "{}" if text in _EMPTY else text


def _string(text: str) -> str | None:
    """Return the string that `text` is in JSON; None if it is something else."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, str) else None
