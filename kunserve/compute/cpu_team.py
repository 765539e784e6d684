"""What a CPU device's thread computes with the threads of devices that have nothing to do: see cpu_team.c."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TypeVar

from kunserve.sizes import ceil_div

T = TypeVar("T")


class CpuTeam:
    """One leader's products, in which others take part. Implements kunserve.gpu.host.Team."""

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self._lead, self._help, self._pieces_helped = kernels.lead, kernels.help, kernels.pieces_helped
        self._memory = (ctypes.c_int64 * ceil_div(kernels.team_bytes(), 8))()

    @property
    def num_helped(self) -> int:
        """Return how many pieces of products helpers have computed."""
        return int(self._pieces_helped(ctypes.byref(self._memory)))

    def lead(self, work: Callable[[], T]) -> T:
        """Return what `work` returns; products that it asks for on this thread are computed with those who help."""
        self._lead(ctypes.byref(self._memory))
        try:
            return work()
        finally:
            self._lead(None)

    def help(self, leave: ctypes.c_int32) -> None:
        """Take part in the leader's products, on this thread, until `leave` is set; what was begun is finished."""
        self._help(ctypes.byref(self._memory), ctypes.byref(leave))
