"""An assistant's message as a list of parts, each begun, filled and closed: how Responses and Messages tell it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from kunserve.api.say.answers import Choice
from kunserve.api.say.deltas import CallArguments, CallBegin, Delta, Reasoning, Text
from kunserve.engine.request import Output
from kunserve.sampling import FinishReason


@dataclass(slots=True)
class AnswerPart:
    """One part of an answer as it grows; the `text` of a call is its arguments, as JSON."""

    index: int
    kind: Literal["text", "reasoning", "call"]
    text: str = ""
    call_id: str = ""
    name: str = ""
    logprobs: list[Any] = field(default_factory=list)  # of the tokens of a text, if asked for
    is_cut: bool = False  # the output ended inside it


class PartStream(ABC):
    """Turns deltas into events. `parts` is all that came so far; the last one may still be open."""

    def __init__(self) -> None:
        self.parts: list[AnswerPart] = []
        self._is_open = False

    @abstractmethod
    def begin(self, part: AnswerPart) -> bytes:
        """Return events that begin a part."""

    @abstractmethod
    def more(self, part: AnswerPart, text: str) -> bytes:
        """Return events for more text of a part."""

    @abstractmethod
    def end(self, part: AnswerPart) -> bytes:
        """Return events that close a part."""

    def push(self, deltas: Iterable[Delta]) -> bytes:
        """Return the events that deltas make; text of whitespace alone opens no part."""
        events: list[bytes] = []
        for delta in deltas:
            match delta:
                case CallBegin(_, call_id, name):
                    events.append(self._open(AnswerPart(len(self.parts), "call", "", call_id, name)))
                    continue
                case CallArguments():
                    pass
                case Text() | Reasoning():
                    kind: Literal["text", "reasoning"] = "text" if isinstance(delta, Text) else "reasoning"
                    if not self._is_open or self.parts[-1].kind != kind:
                        if not delta.text.strip():
                            continue
                        events.append(self._open(AnswerPart(len(self.parts), kind)))
            part = self.parts[-1]
            part.text += delta.text
            events.append(self.more(part, delta.text))
        return b"".join(events)

    def close(self, is_cut: bool = False) -> bytes:
        """Close the open part, if one is; `is_cut` if it has not come to its end."""
        was_open, self._is_open = self._is_open, False
        if not was_open:
            return b""
        self.parts[-1].is_cut = is_cut and not _is_whole(self.parts[-1])
        return self.end(self.parts[-1])

    def _open(self, part: AnswerPart) -> bytes:
        closed = self.close()
        self.parts.append(part)
        self._is_open = True
        return closed + self.begin(part)


def _is_whole(part: AnswerPart) -> bool:
    """Return whether a part is a call that has all its arguments."""
    if part.kind != "call":
        return False
    try:
        orjson.loads(part.text)
    except orjson.JSONDecodeError:
        return False
    return True


def deltas_of(choice: Choice, text: str, is_last: bool, is_cut: bool = False) -> list[Delta]:
    """Return what more text of a choice says; `is_cut`: it ends because there was no room for more."""
    if choice.parser is not None:
        return choice.parser.push(text, is_last, is_cut)
    return [Text(text)] if text else []


def deltas_of_output(choice: Choice, output: Output) -> list[Delta]:
    """Return the deltas of a message that an output of the engine makes."""
    return deltas_of(choice, output.text, output.finish_reason is not None, was_cut(output))


def was_cut(output: Output) -> bool:
    """Return whether an output ends although the model has not ended it."""
    return output.finish_reason is FinishReason.LENGTH


def named_event(name: str, values: dict[str, Any]) -> bytes:
    """Return a server-sent event that says its type twice, as both APIs do."""
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps({"type": name, **values}) + b"\n\n"
