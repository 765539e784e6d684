"""The engine's hooks: the control that regroups it, and the mover of a policy's KV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from kunserve.engine.group import Group
from kunserve.engine.request import Request


class Control(Protocol):
    """Watches the engine and regroups it (engine/regroup/control.py)."""

    def observe(self, changed: Sequence[Group]) -> None:
        """Look at the engine before a round of scheduling. `changed`: groups that something happened to."""

    def finished(self, request: Request) -> None:
        """Hear that a request has ended."""

    async def drop(self, group_ids: Sequence[int] | None, *, is_forced: bool) -> dict[str, Any]:
        """Drop as `Engine.drop` says."""

    async def restore(self, group_ids: Sequence[int] | None) -> dict[str, Any]:
        """Restore as `Engine.restore` says."""

    async def remove(self, device: int, drain_s: float) -> dict[str, Any]:
        """Remove a device as `Engine.remove_device` says."""

    async def add(self, device: int) -> dict[str, Any]:
        """Add a device as `Engine.add_device` says."""

    def state(self, num_transitions: int | None) -> dict[str, Any]:
        """Return what `/kunserve/state` shows of the control; the last so many transitions, or all."""

    def demand_over_undropped(self) -> float:
        """Return the blocks that all requests are expected to need, over those that there are without any drop."""

    async def stop(self) -> None:
        """End what is under way."""


class KvMover(Protocol):
    """Moves KV of requests because a policy wants it (engine/regroup/swap.py, engine/regroup/migrate.py)."""

    def observe(self) -> None:
        """Look at the engine after a round of scheduling."""

    def stepped(self, group: Group, seconds: float) -> None:
        """Hear that a microbatch of `group` came back after so long."""

    def is_busy(self, groups: Sequence[Group]) -> bool:
        """Tell whether copies from or to these groups' devices are under way; it calls `progress` when they end."""

    def finished(self, request: Request) -> None:
        """Hear that a request has ended and its blocks, if nobody works on them, are free."""

    async def stop(self) -> None:
        """End what is under way."""
