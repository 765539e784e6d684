"""A host copy of all weights in memory of the process: every device fills and restores its chunks from it at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from kunserve.errors import ConfigError, DeviceError
from kunserve.gpu.cuda.driver import Driver
from kunserve.model.checkpoint import WeightSource
from kunserve.model.layout import ALIGNMENT, WeightUnit
from kunserve.sizes import ceil_div, format_size

TOUCHING_THREADS = 8  # with more, a kernel gives pages no sooner


def _touch(memory: Tensor) -> None:
    """Write to all pages of `memory` (N,) by several threads: pinning would make them one by one."""
    size = ceil_div(len(memory), TOUCHING_THREADS)
    with ThreadPoolExecutor(TOUCHING_THREADS, "touch") as threads:
        list(threads.map(torch.Tensor.zero_, torch.split(memory, max(1, size))))


class PinnedSource:
    """A `WeightSource` that reads each tensor once from another one, into pinned memory, as it is stored on devices.

    A tensor is read when a device first asks for it; others that ask meanwhile wait for that one read. Copies to the
    device run asynchronously on the caller's stream. Call `close` when all devices are done. Without a driver there is
    nothing to pin: devices in host memory copy from any memory.
    """

    def __init__(self, source: WeightSource, units: Sequence[WeightUnit], driver: Driver | None) -> None:
        """Make room for the copy and pin it. Raises DeviceError if the host cannot pin so much."""
        self._source, self._driver = source, driver
        specs = [spec for unit in units for spec in unit.tensors]
        offsets, end = [], 0
        for spec in specs:
            offsets.append(end)
            end += ceil_div(spec.num_bytes, ALIGNMENT) * ALIGNMENT
        self._memory = torch.empty(end, dtype=torch.uint8)
        if driver is not None:
            _touch(self._memory)
            try:
                driver.pin(self._memory.data_ptr(), end)
            except DeviceError as error:
                text = f"cannot pin {format_size(end)} of host memory for the weights ({error.message})"
                raise DeviceError(text) from None
        self._is_pinned = driver is not None
        self._tensors: dict[str, Tensor] = {}
        for spec, offset in zip(specs, offsets, strict=True):
            flat = self._memory[offset : offset + spec.num_bytes]
            self._tensors[spec.name] = flat.view(getattr(torch, spec.dtype)).view(spec.stored_shape)
        self._locks = {name: threading.Lock() for name in self._tensors}
        self._read: set[str] = set()

    @property
    def num_bytes(self) -> int:
        """Return how many bytes of host memory it owns."""
        return self._memory.nbytes

    def copy_into(self, name: str, out: Tensor) -> None:
        """See `WeightSource.copy_into`. `out` is complete when the current stream has come to this copy."""
        pinned = self._tensors.get(name)
        if pinned is None:
            raise ConfigError(f"the model has no tensor {name}")
        if pinned.shape != out.shape:
            raise ConfigError(f"{name} has shape {list(pinned.shape)}, not {list(out.shape)}")
        with self._locks[name]:
            if name not in self._read:
                self._source.copy_into(name, pinned)
                self._read.add(name)
        out.copy_(pinned, non_blocking=True)

    def close(self) -> None:
        """Unpin the host copy. Idempotent."""
        if self._is_pinned and self._driver is not None:
            self._is_pinned = False
            self._driver.unpin(self._memory.data_ptr())
