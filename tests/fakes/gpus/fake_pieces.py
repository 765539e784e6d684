"""What lies in the streams of GPUs that are not there: launches, waits and events, and what a capture has seen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol
from weakref import ref


class RuleBrokenError(AssertionError):
    """Our code did what CUDA forbids."""


class StreamOwner(Protocol):
    """What a stream belongs to."""

    ordinal: int
    error: str | None  # a kernel has faulted: nothing runs any more


class Span(NamedTuple):
    """Bytes from one address to another."""

    start: int
    end: int


@dataclass(eq=False, slots=True)
class Mark:
    """A place in a stream."""

    stream: int
    is_captured: bool = False
    test: int = 0  # in which it was recorded
    is_reached: bool = False
    num_waiting: int = 0  # waits for it that lie in streams
    is_timed: bool = False
    reached_s: float = 0.0

    @property
    def is_open(self) -> bool:
        """Return whether somebody may still be waiting when its event goes."""
        return not self.is_reached and self.num_waiting > 0


class Event:
    """What the host knows a place in a stream by. It ends with the object, as torch's do, or when it is destroyed."""

    __slots__ = ("_destroyed", "_mark", "is_destroyed")

    def __init__(self, mark: Mark, destroyed: Callable[[Mark], None]) -> None:
        self._mark, self._destroyed, self.is_destroyed = mark, destroyed, False

    @property
    def mark(self) -> Mark:
        """The place, for who uses it."""
        if self.is_destroyed:
            raise RuleBrokenError("an event was used after it had been destroyed")
        return self._mark

    def destroy(self) -> None:
        """End it."""
        if not self.is_destroyed:
            self.is_destroyed = True
            self._destroyed(self._mark)

    def __del__(self) -> None:
        self.destroy()


@dataclass(eq=False, slots=True)
class Piece:
    """One launch, a wait, or an event."""

    stream: int
    number: int = 0  # the order in which the host has launched
    run: Callable[[], object] | None = None
    reads: tuple[Span, ...] = ()
    writes: tuple[Span, ...] = ()
    after: Mark | None = None
    reaches: Mark | None = None
    is_held: bool = False  # until a test lets it end


@dataclass(slots=True)
class StreamState:
    owner: StreamOwner
    queue: deque[Piece] = field(default_factory=deque)
    num_submitted: int = 0  # held pieces
    num_done: int = 0
    is_blocking: bool = False  # it and its GPU's legacy stream wait for each other
    is_destroyed: bool = False


@dataclass(eq=False, slots=True)
class Recording:
    """What a capture has seen, to be launched again. Memory that was there before must be there then."""

    stream: int
    thread: int
    pieces: list[Piece] = field(default_factory=list)
    needed: list[tuple[Span, ref[Any]]] = field(default_factory=list)
