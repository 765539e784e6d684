"""Builds and binds the kernels of cpu_kernels.c: compiled for this very CPU at first use, then cached.

The cached file's name is a hash of the source, the compiler's flags and the CPU's, so a cache that is carried to
another machine is not used there. No compiler is no error: the caller falls back to TorchOps and logs the reason.
Linked without -ffast-math: loading such a library flushes subnormals to zero in the whole process.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu_kernels.c")
PARTS = ("halves", "attention", "blocks", "few_rows", "team", "experts", "replay")
SOURCES = (SOURCE, *(Path(__file__).with_name(f"cpu_{part}.c") for part in PARTS))
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-shared")
BUILD_TIMEOUT_S = 120

_POINTER, _INT = c_void_p, c_int64
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "linear": (None, [_POINTER] * 5 + [_INT] * 6),
    "take_rows": (None, [_INT, *[_POINTER] * 3, *[_INT] * 3]),
    "rms_norm": (None, [_POINTER] * 3 + [_INT] * 2 + [c_float] * 2),
    "act_and_mul": (None, [_POINTER] * 2 + [_INT] * 3 + [c_float] * 2),
    "add": (None, [_POINTER] * 3 + [_INT]),
    "softcap": (None, [_POINTER, _INT, c_float]),
    "rotate_and_append": (_INT, [_POINTER] * 8 + [_INT] * 11 + [c_float] * 2),
    "attention": (_INT, [_POINTER] * 6 + [_INT] * 9 + [_POINTER] + [c_float] * 2),
    "gate_rows": (None, [_POINTER] * 3 + [_INT] * 2),
    "route": (None, [_POINTER] * 2 + [_INT] * 4),
    "replay": (_INT, [_POINTER, _INT, *[_POINTER] * 3, *[_INT] * 2]),
    "team_bytes": (_INT, []),
    "pieces_helped": (_INT, [_POINTER]),
    "judge_help": (_INT, [_POINTER, _INT, _INT]),
    "lead": (None, [_POINTER]),
    "help": (None, [_POINTER] * 2),
    "experts": (
        None,
        [*[_POINTER] * 4, *[_INT] * 2, *[_POINTER] * 2, *[_INT] * 2, *[_POINTER] * 5, *[_INT] * 5, *[c_float] * 2],
    ),
}


class KernelsUnavailableError(Exception):
    """The kernels cannot be built or loaded here; the message says why, in one line."""


def _cpu_flags() -> str:
    """Return what -march=native depends on: the CPU's model and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("flags", "features", "vendor_id", "cpu family", "model", "cpu part")
    return "\n".join(sorted({line for line in lines if line.partition(":")[0].strip().lower() in wanted}))


def find_compiler(
    environment: Mapping[str, str] = os.environ, which: Callable[[str], str | None] = shutil.which
) -> list[str]:
    """Return the compiler's command: $CC, else cc, gcc or clang. KernelsUnavailableError if there is none."""
    if command := shlex.split(environment.get("CC", "")):
        return command
    for name in ("cc", "gcc", "clang"):
        if which(name):
            return [name]
    raise KernelsUnavailableError("no C compiler (cc, gcc or clang) on PATH")


def _build(library: Path, flags: tuple[str, ...]) -> None:
    """Compile into `library`, which appears whole or not at all."""
    command = find_compiler()
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
        built = Path(folder, library.name)
        try:
            done = subprocess.run(
                [*command, *flags, str(SOURCE), "-o", str(built)],
                capture_output=True, text=True, errors="replace", timeout=BUILD_TIMEOUT_S, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelsUnavailableError(f"C compiler {command[0]!r} cannot run: {error}") from None
        if done.returncode != 0 or not built.exists():
            first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            raise KernelsUnavailableError(f"C compiler {command[0]!r} failed with {done.returncode}: {first.strip()}")
        built.replace(library)


def library_path(flags: tuple[str, ...] = FLAGS, environment: Mapping[str, str] = os.environ) -> Path:
    """Return where the compiled kernels are, or will be, in the cache."""
    sources = (source.read_text(encoding="utf-8") for source in SOURCES)
    key = "\0".join([*sources, *flags, environment.get("CC", ""), _cpu_flags()])
    root = environment.get("KUNSERVE_CACHE") or Path.home() / ".cache" / "kunserve"
    return Path(root, "kernels", f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so")


def load_kernels(extra_flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Return the bound kernels, compiled unless cached ($KUNSERVE_CACHE/kernels or ~/.cache/kunserve/kernels).

    extra_flags: passed to the compiler after our own. Calls drop the GIL. Raises KernelsUnavailableError.
    """
    flags = (*FLAGS, *extra_flags)
    library = library_path(flags)
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            _build(library, flags)
        kernels = ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelsUnavailableError(f"cannot use the kernel cache: {error}") from None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(kernels, name)
        function.restype, function.argtypes = result, arguments
    return kernels
