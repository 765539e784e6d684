"""How long the stages of a chain have work, and how long one waits for another: the chain's bubbles. Knows no clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType


class Occupancy:
    """Seconds in which each stage of one group has had work, and the group any at all.

    A bubble is a stage without work while a microbatch of its chain is elsewhere in the chain.
    """

    def __init__(self, num_stages: int) -> None:
        self._counts = [0] * num_stages  # microbatches at each stage, running or next
        self._busy_s = [0.0] * num_stages
        self._active_s = 0.0  # any stage has had work
        self._crowded_s = self._waited_s = 0.0  # of all stages: see `take_waiting`
        self._seen_s = 0.0  # up to here everything is accounted for

    @property
    def counts(self) -> tuple[int, ...]:
        """Return how many microbatches each stage has now, running or waiting for it."""
        return tuple(self._counts)

    def enter(self, position: int, now_s: float) -> None:
        """Note that a microbatch comes to the stage at `position` of the chain."""
        self._account(now_s)
        self._counts[position] += 1

    def leave(self, position: int, now_s: float) -> None:
        """Note that the stage at `position` has done a microbatch."""
        self._account(now_s)
        self._counts[position] -= 1

    def busy_s(self, now_s: float) -> Sequence[float]:
        """Return the seconds of work of each stage so far."""
        self._account(now_s)
        return tuple(self._busy_s)

    def active_s(self, now_s: float) -> float:
        """Return the seconds in which the group has had work so far."""
        self._account(now_s)
        return self._active_s

    def bubble_share(self, now_s: float) -> float:
        """Return the share of active seconds, over all stages, in which a stage had no work; 0 if there were none."""
        total_s = self.active_s(now_s) * len(self._busy_s)
        return 1.0 - sum(self._busy_s) / total_s if total_s else 0.0

    def take_waiting(self, now_s: float) -> tuple[float, float]:
        """Return the stages' seconds, and how many of them were without work, since it was asked last.

        Only while there were as many microbatches as stages: with fewer, a stage without work loses nothing that more
        of them would not bring back.
        """
        self._account(now_s)
        taken = self._crowded_s, self._waited_s
        self._crowded_s = self._waited_s = 0.0
        return taken

    def _account(self, now_s: float) -> None:
        elapsed_s, self._seen_s = now_s - self._seen_s, now_s
        if not any(self._counts):
            return
        self._active_s += elapsed_s
        if sum(self._counts) >= len(self._counts):
            self._crowded_s += len(self._counts) * elapsed_s
            self._waited_s += self._counts.count(0) * elapsed_s
        for position, count in enumerate(self._counts):
            if count:
                self._busy_s[position] += elapsed_s


class Passage:
    """One microbatch's way through a chain: whoever takes it along says at which stage it is.

    `stage_s`: to it the seconds are added that the device of each stage works on it, by an executor that knows them.
    """

    __slots__ = ("_now_s", "_occupancy", "_unvisited", "failed_at", "stage_s")

    def __init__(self, occupancy: Occupancy, now_s: Callable[[], float], stage_s: list[float] | None = None) -> None:
        self._occupancy, self._now_s, self.stage_s = occupancy, now_s, stage_s
        self._unvisited = set(range(len(occupancy.counts)))
        self.failed_at: int | None = None  # the position of the first stage that raised

    def at(self, position: int) -> _Stay:
        """Return a context in which the microbatch is work of the stage at `position`, running there or next."""
        self._unvisited.discard(position)
        return _Stay(self, position)

    def enter(self, position: int) -> None:
        """Note that the microbatch is work of a stage."""
        self._occupancy.enter(position, self._now_s())

    def leave(self, position: int, *, has_failed: bool) -> None:
        """Note that a stage has done it, or has failed."""
        self._occupancy.leave(position, self._now_s())
        if has_failed:
            self.fails(position)

    def fails(self, position: int) -> None:
        """Note that a stage has raised, or could not be launched. The first one counts."""
        if self.failed_at is None:
            self.failed_at = position

    def check(self) -> None:
        """Assert that it has been at every stage, now that it is through."""
        assert not self._unvisited, f"nobody has said when the microbatch was at stages {sorted(self._unvisited)}"


class _Stay:
    """The stay of a microbatch at one stage. No generator: a simulation enters one for every stage of every step."""

    __slots__ = ("_passage", "_position")

    def __init__(self, passage: Passage, position: int) -> None:
        self._passage, self._position = passage, position

    def __enter__(self) -> None:
        self._passage.enter(self._position)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._passage.leave(self._position, has_failed=error is not None)
