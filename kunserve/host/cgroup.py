"""What the control groups of this process, and those around them, leave of cores and memory. Versions 1 and 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

ROOT = PurePosixPath("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # bytes; version 1 writes "no limit" as a number

ReadText = Callable[[str], str]  # a path to the file's text; OSError if it cannot be read


def read_file(path: str) -> str:
    """Return the text of a file of the kernel."""
    return Path(path).read_text(encoding="utf-8")


def core_quota(read_text: ReadText = read_file) -> float | None:
    """Return how many cores' time this process may use; None if nothing limits it."""
    quotas: list[float] = []
    for folder in _folders(read_text, "cpu"):
        words = _words(read_text, folder / "cpu.max")
        words = words or _words(read_text, folder / "cpu.cfs_quota_us") + _words(
            read_text, folder / "cpu.cfs_period_us"
        )
        if len(words) == 2 and words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def available_bytes(read_text: ReadText = read_file) -> int:
    """Return the memory that this process can take now: without swapping, and within its control groups' limits."""
    lines = read_text("/proc/meminfo").splitlines()
    available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    left = memory_left(read_text)
    return available if left is None else min(available, left)


def memory_left(read_text: ReadText = read_file) -> int | None:
    """Return the bytes that this process may still take; None if nothing limits it. File caches are given back."""
    left: list[int] = []
    for folder in _folders(read_text, "memory"):
        for limit_name, usage_name, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = _words(read_text, folder / limit_name), _words(read_text, folder / usage_name)
            if limit and usage and limit[0] != "max" and int(limit[0]) < UNLIMITED:
                words = _words(read_text, folder / "memory.stat")
                reclaimable = int(dict(zip(words[::2], words[1::2], strict=False)).get(cache, 0))
                left.append(max(0, int(limit[0]) - int(usage[0]) + reclaimable))
    return min(left, default=None)


def _folders(read_text: ReadText, controller: str) -> Iterator[PurePosixPath]:
    """Yield the folders of this process's group and of all groups that contain it, as far as they can be seen."""
    try:
        lines = read_text("/proc/self/cgroup").splitlines()
    except OSError:
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        base, group = ROOT / (names and controller), PurePosixPath(path)
        for folder in (group, *group.parents):  # a container may see its own group as the root
            yield base / folder.relative_to("/")


def _words(read_text: ReadText, path: PurePosixPath) -> tuple[str, ...]:
    try:
        return tuple(read_text(str(path)).split())
    except OSError:
        return ()
