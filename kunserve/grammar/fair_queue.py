"""Whose turn it is: work of several owners, each of whom gets as much of the time as any other who wants it.

Who has had least goes first (start-time fair queueing, Goyal, Vin and Cheng, 1996). What an item costs is known
afterwards only, so an owner is charged the most it may cost when it begins, and gets back what it did not. Who comes
after a pause begins where the others are: time that was not used is not saved up.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Owner(Generic[T]):
    charged: float
    items: deque[T] = field(default_factory=deque)
    num_running: int = 0

    @property
    def is_idle(self) -> bool:
        return not self.items and not self.num_running


class FairQueue(Generic[T]):
    """Items of owners; those of one owner in the order in which they came."""

    def __init__(self, max_cost: float) -> None:
        self._max_cost = max_cost
        self._owners: dict[str, _Owner[T]] = {}  # that wait or run
        self._begun = 0.0  # what the owner had been charged who began last

    def __len__(self) -> int:
        return sum(len(owner.items) for owner in self._owners.values())

    def push(self, owner: str, item: T) -> None:
        """Add an item at the end of its owner's."""
        state = self._owners.setdefault(owner, _Owner(self._begun))
        if state.is_idle:
            state.charged = max(state.charged, self._begun)
        state.items.append(item)

    def remove(self, owner: str, item: T) -> None:
        """Take out an item that nobody wants any more."""
        self._owners[owner].items.remove(item)
        self._forget()

    def pop(self) -> tuple[str, T] | None:
        """Take the item whose turn it is, and its owner; `done` has to follow. None: nothing waits."""
        waiting = [(state.charged, name) for name, state in self._owners.items() if state.items]
        if not waiting:
            return None
        self._begun, name = min(waiting, key=lambda entry: entry[0])  # of equals, who came first
        state = self._owners[name]
        state.charged += self._max_cost
        state.num_running += 1
        return name, state.items.popleft()

    def done(self, owner: str, cost: float) -> None:
        """Count an item of the owner's that has ended, and what it has cost."""
        state = self._owners[owner]
        state.charged -= max(0.0, self._max_cost - cost)
        state.num_running -= 1
        self._forget()

    def _forget(self) -> None:
        """Forget who neither waits nor runs, once others have had as much; all of them when nobody does."""
        is_quiet = all(state.is_idle for state in self._owners.values())
        for name, state in list(self._owners.items()):
            if state.is_idle and (is_quiet or state.charged <= self._begun):
                del self._owners[name]
