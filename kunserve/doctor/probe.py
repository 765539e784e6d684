"""Everything that the checks ask of a machine, as one value: a test puts another machine in its place."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kunserve.host.cgroup import available_bytes

RUN_LIMIT_S = 20.0
_MADV_POPULATE_WRITE = 23


def _read_text(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except SystemExit as error:  # what ends the process at import would end the doctor as well
        raise ImportError(f"{name} ends the process: {error}") from error


def _find_package(name: str) -> Path | None:
    """Return the folder of a package without importing it: FlashInfer alone would take five seconds."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> Sequence[str]:
    return importlib.metadata.requires("kunserve") or []


def _run(command: Sequence[str], text: str) -> tuple[int, str]:
    """Run a command with `text` as its input; return its exit status and what it said on stderr."""
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, errors="replace", timeout=RUN_LIMIT_S, check=False
    )
    return done.returncode, done.stderr


def _limit(kind: int) -> int | None:
    """Return the soft limit of this process; None where there is none."""
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _take_memory(num_bytes: int) -> None:
    """Take memory as a virtual CPU device does, and give it back. OSError says what the kernel refuses."""
    fd = os.memfd_create("kunserve-doctor")
    try:
        os.ftruncate(fd, num_bytes)
        with mmap.mmap(fd, num_bytes) as memory:
            memory.madvise(_MADV_POPULATE_WRITE)
    finally:
        os.close(fd)


def _is_writable(folder: Path) -> bool:
    """Tell whether a file can be made, by making one without a name: os.access allows root whatever it asks."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _cache_root() -> Path:
    """Return the folder that the server itself takes for its cache."""
    module: Any = importlib.import_module("kunserve.model.card")
    return Path(module.cache_root())


def _home() -> Path:
    """Return the user's home; "~" where neither HOME nor the system's list of users has one."""
    return Path(os.path.expanduser("~"))


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class Probe:
    """The machine that this process runs on. What one of its functions raises becomes the line of the check."""

    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    home: Path = field(default_factory=_home)
    working_folder: str | None = field(default_factory=_working_folder)  # None if it was removed or is forbidden
    system: str = field(default_factory=platform.system)
    kernel: str = field(default_factory=platform.release)
    python: str = field(default_factory=platform.python_version)
    read_text: Callable[[str], str] = _read_text
    list_folder: Callable[[str], list[str]] = os.listdir
    import_module: Callable[[str], Any] = _import_module
    find_package: Callable[[str], Path | None] = _find_package
    version: Callable[[str], str | None] = _version  # of a distribution; None if it is not installed
    requirements: Callable[[], Sequence[str]] = _requirements  # of KunServe
    which: Callable[[str], str | None] = shutil.which
    run: Callable[[Sequence[str], str], tuple[int, str]] = _run
    limit: Callable[[int], int | None] = _limit
    cores: Callable[[], int] = _cores
    available_bytes: Callable[[], int] = available_bytes
    take_memory: Callable[[int], None] = _take_memory
    cache_root: Callable[[], Path] = _cache_root
    is_writable: Callable[[Path], bool] = _is_writable
    free_bytes: Callable[[Path], int] = _free_bytes
