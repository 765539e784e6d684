"""Who is told what the engine does: the control that regroups it, and the mover of a policy's KV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from kunserve.engine.group import Group
from kunserve.engine.request import Request


class Control(Protocol):
    """Who watches the engine and regroups it (engine/regroup/control.py)."""

    def observe(self, changed: Sequence[Group]) -> None:
        """Called before each round of scheduling, with the groups that something happened to since the last call."""

    def finished(self, request: Request) -> None:
        """Called when a request has ended."""

    async def drop(self, group_ids: Sequence[int] | None, *, is_forced: bool) -> dict[str, Any]:
        """As `Engine.drop`."""

    async def restore(self, group_ids: Sequence[int] | None) -> dict[str, Any]:
        """As `Engine.restore`."""

    async def remove(self, device: int, drain_s: float) -> dict[str, Any]:
        """As `Engine.remove_device`."""

    async def add(self, device: int) -> dict[str, Any]:
        """As `Engine.add_device`."""

    def state(self, num_transitions: int | None) -> dict[str, Any]:
        """What `/kunserve/state` shows of it; the last so many transitions, or all."""

    def demand_over_undropped(self) -> float:
        """Blocks that all requests are expected to need, over those that there are without any drop."""

    async def stop(self) -> None:
        """End what is under way."""


class Mover(Protocol):
    """Who moves KV of requests because a policy wants it (engine/regroup/swap.py, engine/regroup/migrate.py)."""

    def observe(self) -> None:
        """Called after each round of scheduling."""

    def stepped(self, group: Group, seconds: float) -> None:
        """Called when a microbatch of `group` came back after so long."""

    def is_busy(self, groups: Sequence[Group]) -> bool:
        """Whether copies from or to these groups' devices are under way; it calls `progress` when they end."""

    def finished(self, request: Request) -> None:
        """Called when a request has ended and its blocks, if nobody works on them, are free."""

    async def stop(self) -> None:
        """End what is under way."""
