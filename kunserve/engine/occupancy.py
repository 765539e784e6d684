"""How long the stages of a chain have work, and how long one waits for another: the chain's bubbles. Knows no clock."""

from __future__ import annotations

from collections.abc import Sequence


class Occupancy:
    """Seconds in which each stage of one group has had work, and the group any at all.

    A bubble is a stage without work while a microbatch of its chain is elsewhere in the chain.
    """

    def __init__(self, num_stages: int) -> None:
        self._counts = [0] * num_stages  # microbatches at each stage, running or next
        self._busy_s = [0.0] * num_stages
        self._active_s = 0.0  # any stage has had work
        self._seen_s = 0.0  # up to here everything is accounted for

    def enter(self, position: int, now_s: float) -> None:
        """A microbatch comes to the stage at `position` of the chain."""
        self._account(now_s)
        self._counts[position] += 1

    def leave(self, position: int, now_s: float) -> None:
        """The stage at `position` has done one."""
        self._account(now_s)
        self._counts[position] -= 1

    def busy_s(self, now_s: float) -> Sequence[float]:
        """Seconds of work of each stage so far."""
        self._account(now_s)
        return tuple(self._busy_s)

    def active_s(self, now_s: float) -> float:
        """Seconds in which the group has had work so far."""
        self._account(now_s)
        return self._active_s

    def bubble_share(self, now_s: float) -> float:
        """Share of the active seconds, over all stages, in which a stage had no work; 0 if there were none."""
        total_s = self.active_s(now_s) * len(self._busy_s)
        return 1.0 - sum(self._busy_s) / total_s if total_s else 0.0

    def _account(self, now_s: float) -> None:
        elapsed_s, self._seen_s = now_s - self._seen_s, now_s
        if not any(self._counts):
            return
        self._active_s += elapsed_s
        for position, count in enumerate(self._counts):
            if count:
                self._busy_s[position] += elapsed_s
