"""The devices of a machine, of one kind: how much memory they have, how they are opened, and what computes on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch

from kunserve.engine.schedule.scheduler import Scheduler
from kunserve.engine.step.executor import Executor
from kunserve.errors import ConflictError
from kunserve.gpu.device import Device
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.host_weights import HostWeights
from kunserve.gpu.links import Links
from kunserve.model.checkpoint import WeightSource
from kunserve.planner.snapshot import DeviceView, ModelShape


class Machine(Protocol):
    """What launching needs, in the order of its verbs: views, open, host_weights, executor, close. All may block."""

    dtype: torch.dtype  # of weights that are stored as numbers, and of what is computed
    chunk_bytes: int
    shares_head: bool  # the executor lets both ends of a chain compute the head, if both have it
    device_name: str  # as its maker calls it; all devices are alike
    scheduler: type[Scheduler] = Scheduler  # plans its microbatches

    @property
    def kv_dtype(self) -> torch.dtype:
        """Return the dtype of KV: that of the weights, unless the machine says otherwise."""
        return self.dtype

    def views(self, shape: ModelShape) -> list[DeviceView]:
        """Return the devices with their budgets, as the planner sees them; ConfigError if the flags cannot be met."""

    def open(self) -> Sequence[Device]:
        """Take all memory of the views; ConfigError, with nothing open, if that fails."""

    def host_weights(self, source: WeightSource) -> HostWeights:
        """Return what the host keeps of the weights, of which `source` are the files; the devices are open."""

    def executor(self, memories: Sequence[DeviceMemory], max_model_len: int) -> tuple[Executor, str]:
        """Return the executor on the open devices, and what it is made of, for the log."""

    def reopen(self, device: int, remember: Callable[[Device], DeviceMemory]) -> DeviceMemory:
        """Open a device in the place of one that is gone, for the executor, too; returns what `remember` makes of it.

        ConflictError if that needs another process.
        """
        raise ConflictError("a device of this kind comes back with a restart of the server")

    def tell_phases(self, phases: Callable[[], Collection[str]]) -> None:
        """Take a function that tells which transitions run, and at which step: for devices that fail on purpose."""
        return

    def links(self) -> Links:
        """Return the links that copies between its devices, and from and to the host, take turns on."""
        return Links()

    def clock(self) -> float:
        """Return the seconds of a clock that measures durations; finer than the event loop's, where that is coarse."""
        return time.perf_counter()

    def close(self) -> None:
        """Close what is open, but for lost devices that still work. Idempotent."""

    def stuck(self) -> list[str]:
        """Return the names of devices that would not close: their threads keep the process from ending."""
        return []
