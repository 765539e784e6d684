"""What an assistant's message is made of, piece by piece: text, reasoning, tool calls; the same for every endpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Text:
    """More of what the user reads."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call, its arguments still to come."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str


Delta = Text | Reasoning | CallBegin | CallArguments


@dataclass(slots=True)
class Call:
    """A tool call as far as it has come."""

    call_id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message:
    """The sum of deltas."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, deltas: Iterable[Delta]) -> None:
        """Append deltas to the text, the reasoning and the calls."""
        for delta in deltas:
            match delta:
                case Text(text):
                    self.text += text
                case Reasoning(text):
                    self.reasoning += text
                case CallBegin(_, call_id, name):
                    self.calls.append(Call(call_id, name))
                case CallArguments(index, text):
                    self.calls[index].arguments += text
