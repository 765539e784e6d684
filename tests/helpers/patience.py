"""Patience with devices that do their work: on a machine where much else runs, they may answer late, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kunserve.gpu.watched import Silence, WatchedDevice

PATIENCE = 20  # so many times as long to answer


@contextmanager
def patient_with_sound_devices(is_silent: Callable[[Any], bool]) -> Iterator[None]:
    """Count the silence of all devices more slowly than it is, but of those that are silent on purpose.

    `is_silent` is asked about the device that is watched.
    """
    tick = WatchedDevice.tick

    def slow_tick(device: WatchedDevice, elapsed_s: float) -> Silence:
        return tick(device, elapsed_s if is_silent(device.inner) else elapsed_s / PATIENCE)

    WatchedDevice.tick = slow_tick  # type: ignore[method-assign]
    try:
        yield
    finally:
        WatchedDevice.tick = tick  # type: ignore[method-assign]
