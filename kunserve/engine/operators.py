"""What operators do by hand with an engine: regroup it, take devices out, and put them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kunserve.engine.hooks import Control


class Operated:
    """An engine with a control. Its verbs answer with the state of their transition."""

    control: Control | None = None

    async def drop(self, group_ids: Sequence[int] | None = None, *, is_forced: bool = False) -> dict[str, Any]:
        """Merge these groups, or the two smallest; return the transition's state once its epoch is committed.

        Raises InvalidRequestError for groups that are not there, ConflictError if it cannot be now, or would take KV
        from live requests and is not forced.
        """
        assert self.control is not None
        return await self.control.drop(group_ids, is_forced=is_forced)

    async def restore(self, group_ids: Sequence[int] | None = None) -> dict[str, Any]:
        """Split these groups, or the largest, once; as `drop`. A restore that a burst cancelled says so."""
        assert self.control is not None
        return await self.control.restore(group_ids)

    async def remove_device(self, index: int, drain_s: float) -> dict[str, Any]:
        """Take a device out: its requests may finish for `drain_s`. ConflictError if that cannot be now."""
        assert self.control is not None
        return await self.control.remove(index, drain_s)

    async def add_device(self, index: int) -> dict[str, Any]:
        """Put a device that was lost or taken out in again. ConflictError if that cannot be, or not now."""
        assert self.control is not None
        return await self.control.add(index)
