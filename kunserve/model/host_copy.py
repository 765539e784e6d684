"""What the host keeps of the weights, and how it is chosen. Pure: whoever calls knows how much memory there is."""

from __future__ import annotations

import enum

from kunserve.errors import ConfigError
from kunserve.sizes import format_size

MARGIN_BYTES = 4 << 30  # of host memory beside a pinned copy: for the server itself, and for whatever else runs


class HostCopy(enum.StrEnum):
    """Values of `--host-copy`."""

    AUTO = "auto"  # pinned on GPUs if there is memory for it, else mapped
    PINNED = "pinned"  # in memory, in the weights' dtype; locked in place for GPUs
    MAPPED = "mapped"  # the pages of the checkpoint's files: the system keeps them while it has room
    NONE = "none"  # a unit comes from another device that has it, else from the files, whose pages are let go


class LoadedFrom(enum.StrEnum):
    """Where the bytes of a device's weights came from."""

    HOST = "host"  # the host copy
    MATE = "mate"  # another device
    DISK = "disk"  # the files, read anew; dummy weights are made anew


def choose_host_copy(asked: HostCopy, *, are_gpus: bool, num_bytes: int, available_bytes: int) -> tuple[HostCopy, str]:
    """Return the copy to keep, never `AUTO`, and why. ConfigError if one is asked for that does not fit.

    num_bytes: of a pinned copy.
    """
    figures = f"{format_size(num_bytes)}, and {format_size(available_bytes)} of host memory are available"
    if asked is HostCopy.PINNED and num_bytes > available_bytes:
        raise ConfigError(f"--host-copy pinned needs {figures}; start with --host-copy mapped")
    if asked is not HostCopy.AUTO:
        return asked, f"--host-copy {asked}"
    if not are_gpus:
        return HostCopy.MAPPED, "CPU devices have no use for pinned memory"
    if num_bytes + MARGIN_BYTES > available_bytes:
        return HostCopy.MAPPED, f"a pinned copy needs {figures}, of which {format_size(MARGIN_BYTES)} must stay"
    return HostCopy.PINNED, f"it needs {figures}"
