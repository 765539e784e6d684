"""Signals: what wakes the engine's loop, and those who wait for a step to end."""

from __future__ import annotations

import asyncio

from kunserve.engine.group import Group


def loop_time() -> float:
    """Return the engine's clock, in seconds: the event loop's."""
    return asyncio.get_running_loop().time()


class Signals:
    """Wakes those who wait: the loop for work, all others for progress. Used on the event loop."""

    def __init__(self) -> None:
        self._wake = asyncio.Event()
        # With many groups nobody may look at all of them in every step: only at those that something happened to.
        self._changed: dict[int, Group] | None = None  # since the loop looked last, by id; None: all
        self._progress: dict[int | None, asyncio.Event] = {}  # that somebody waits for: by group id, None: of any

    def wake(self, group: Group | None = None) -> None:
        """Let the loop look for work: in a group that something happened to, or everywhere."""
        if group is None:
            self._changed = None
        elif self._changed is not None:
            self._changed[group.group_id] = group
        self._wake.set()

    def wake_for_queue(self) -> None:
        """Let the loop look for work: a request came, and nothing happened to any group."""
        self._wake.set()

    async def woken(self) -> None:
        """Return when somebody has woken the loop since `take_changed`."""
        await self._wake.wait()

    def take_changed(self) -> list[Group] | None:
        """Return the groups that something happened to since the last call; None: look at all."""
        self._wake.clear()
        changed, self._changed = self._changed, {}
        return None if changed is None else list(changed.values())

    def progress(self, group_id: int | None = None) -> None:
        """Let everybody who waits for `next_commit` look again: of one group, or of all."""
        for waited_for in [*self._progress] if group_id is None else (group_id, None):
            if (event := self._progress.pop(waited_for, None)) is not None:
                event.set()

    async def next_commit(self, group: Group | None = None) -> None:
        """Return when a microbatch came back, a request ended, or `progress` was called: for that group, or for any."""
        await self._progress.setdefault(group.group_id if group else None, asyncio.Event()).wait()
