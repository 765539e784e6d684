"""Step boundaries: groups that stand still, so that their memory and their requests' blocks can be moved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.hooks import KvMover
from kunserve.engine.signals import Signals
from kunserve.errors import ConflictError


class Boundary:
    """Brings groups to a step boundary, and holds them there."""

    def __init__(self, fleet: Fleet, signals: Signals, mover: KvMover | None) -> None:
        self._fleet, self._signals, self._mover = fleet, signals, mover

    @contextlib.contextmanager
    def paused(self, groups: Sequence[Group]) -> Iterator[None]:
        """Let nothing be scheduled for these groups inside; a group goes on when the last who paused it has left."""
        try:
            with self._fleet.pause(groups):
                yield
        finally:
            self._signals.wake()

    async def reached(self, groups: Sequence[Group], *, gives_up: bool = False) -> None:
        """Return when none of the microbatches of these groups, which are paused, is in flight.

        Nor is any copy that a policy asked for: their blocks may then be moved. If it `gives_up`, a ConflictError says
        that one of them is suspected: a device that hangs must not hold up the others for as long as it may.
        """
        assert all(group.is_paused for group in groups)
        for group in groups:
            while group.num_in_flight and not (gives_up and _are_suspect(groups)):
                await self._signals.next_commit(group)
        if gives_up and _are_suspect(groups):  # perhaps the last step of all said so
            raise ConflictError("a device does not answer", retry_after_s=1)
        while self._mover is not None and self._mover.is_busy(groups):
            await self._signals.next_commit()


def _are_suspect(groups: Sequence[Group]) -> bool:
    return any(group.is_suspect for group in groups)
