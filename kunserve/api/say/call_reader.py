"""A tool call that a model writes as a JSON object, read as it comes: the arguments go out before they are complete."""

from __future__ import annotations

import orjson

from kunserve.api.say.deltas import CallArguments, CallBegin, Delta, Text

_ARGUMENTS = ("arguments", "parameters")  # Llama 3 says parameters


class CallReader:
    """One object with `name` and `arguments`. What turns out to be no call comes back as text."""

    def __init__(self, index: int, call_id: str) -> None:
        self.is_done = False
        self.is_call = False
        self.depth = 0
        self._index, self._call_id = index, call_id
        self._raw: list[str] = []
        self._in_string = self._is_escaped = False
        self._string_start = self._value_start = 0
        self._is_key, self._key = True, ""
        self._values: dict[str, str] = {}
        self._streamed = False  # arguments have begun to go out
        self._in_arguments = False

    @property
    def has_arguments(self) -> bool:
        """Whether arguments have begun to go out."""
        return self._streamed

    def push(self, char: str) -> list[Delta]:
        """Take the next character; the first is the object's brace."""
        self._raw.append(char)
        deltas: list[Delta] = []
        was_in_arguments = self._in_arguments
        if self._in_string:
            self._push_in_string(char)
        elif char == '"':
            self._in_string, self._string_start = True, len(self._raw) - 1
        elif char in "{[":
            self.depth += 1
            if self.depth == 2 and char == "{" and self._key in _ARGUMENTS and self.is_call:
                self._in_arguments = self._streamed = True
        elif char in "}]":
            self.depth -= 1
            if self.depth == 1:
                self._in_arguments = False
            elif self.depth == 0:
                deltas += self._end_value()
                deltas += self._end()
        elif self.depth == 1 and char == ":":
            self._is_key, self._value_start = False, len(self._raw)
        elif self.depth == 1 and char == ",":
            deltas += self._end_value()
            self._is_key, self._key = True, ""
        if was_in_arguments or self._in_arguments:
            deltas.append(CallArguments(self._index, char))
        return deltas

    def finish(self) -> list[Delta]:
        """The output ended inside the object."""
        return [] if self.is_call else [Text("".join(self._raw))]

    def _push_in_string(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = False
            if self.depth == 1 and self._is_key:
                self._key = _string("".join(self._raw[self._string_start :])) or ""

    def _end_value(self) -> list[Delta]:
        self._values[self._key] = "".join(self._raw[self._value_start : -1]).strip()
        if self._key == "name" and not self.is_call and (name := _string(self._values["name"])):
            self.is_call = True
            return [CallBegin(self._index, self._call_id, name)]
        return []

    def _end(self) -> list[Delta]:
        self.is_done = True
        if not self.is_call:
            return [Text("".join(self._raw))]
        if self._streamed:
            return []
        written = next((self._values[key] for key in _ARGUMENTS if key in self._values), "{}")
        return [CallArguments(self._index, _string(written) or written)]  # some models write JSON in a string


def _string(text: str) -> str | None:
    """The string that `text` is in JSON; None if it is something else."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, str) else None
