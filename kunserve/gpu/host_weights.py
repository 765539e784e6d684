"""What a process keeps of the weights in host memory: chosen once, when its devices are open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kunserve.errors import ConfigError, DeviceError
from kunserve.gpu.cuda.driver import Driver
from kunserve.gpu.cuda.pinned import PinnedSource
from kunserve.host.cgroup import available_bytes
from kunserve.model.checkpoint import WeightSource
from kunserve.model.host_copy import HostCopy, choose_host_copy
from kunserve.model.layout import WeightUnit


@dataclass(frozen=True, slots=True)
class HostWeights:
    """The host copy of the weights, or the files that stand for it."""

    kind: HostCopy  # never AUTO
    source: WeightSource  # all devices read from it; of NONE, what no device has
    because: str = ""
    num_bytes: int = 0  # of host memory that this process owns
    mapped_bytes: int = 0  # of files, which the page cache holds while there is room

    def close(self) -> None:
        """Unpin what is pinned; all devices are done with it. Idempotent."""
        if isinstance(self.source, PinnedSource):
            self.source.close()


def keep_host_copy(
    asked: HostCopy,
    source: WeightSource,
    units: Sequence[WeightUnit],
    driver: Driver | None = None,
) -> HostWeights:
    """Return the copy of `source` that `--host-copy` asks for, or that fits; `driver`: of GPUs, which pins memory.

    ConfigError if what is asked for cannot be. How much memory may be locked only the driver knows: where it refuses,
    the automatic choice is the mapped copy.
    """
    num_bytes = sum(unit.num_bytes for unit in units)
    kind, because = choose_host_copy(
        asked, are_gpus=driver is not None, num_bytes=num_bytes, available_bytes=available_bytes()
    )
    mapped_bytes = getattr(source, "num_bytes", 0)
    if kind is not HostCopy.PINNED:
        return HostWeights(kind, source, because, mapped_bytes=mapped_bytes)
    try:
        pinned = PinnedSource(source, units, driver)
    except DeviceError as error:
        if asked is HostCopy.PINNED:
            raise ConfigError(f"{error.message}; start with --host-copy mapped") from None
        return HostWeights(HostCopy.MAPPED, source, error.message, mapped_bytes=mapped_bytes)
    return HostWeights(kind, pinned, because, pinned.num_bytes)
