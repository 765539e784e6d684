"""What parsers have in common that take their text step by step."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod

from kunserve.api.say.deltas import CallArguments, Delta, Text


class Stepwise(ABC):
    """Takes what is certain off its buffer, step by step, until a step changes neither the buffer nor its state."""

    _state: enum.Enum

    def __init__(self) -> None:
        self._buffer = ""

    def push(self, text: str) -> list[Delta]:
        """Take more text; return what is certain by now."""
        self._buffer += text
        deltas: list[Delta] = []
        before = None
        while self._buffer and before != (before := (len(self._buffer), self._state)):
            deltas += self._step()
        return joined(deltas)

    @abstractmethod
    def _step(self) -> list[Delta]:
        """Take some of the buffer, or nothing if more text is needed."""


def joined(deltas: list[Delta]) -> list[Delta]:
    """Return the deltas with neighbours of one kind joined."""
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
