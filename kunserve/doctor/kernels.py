"""Checks of what computes: the C compiler for CPU devices; FlashInfer and Triton for GPUs."""

from __future__ import annotations

import re
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from kunserve.doctor.finding import CUDA, Finding, Status, first_line, ok
from kunserve.doctor.gpus import GET_CUDA, NOT_NEEDED, Gpus
from kunserve.doctor.packages import bound_of
from kunserve.doctor.probe import Probe

HEADERS = "#include <stdint.h>\n#include <string.h>\nint nothing(void) { return 0; }\n"
PREFILL = re.compile(r"batch_prefill_with_kv_cache_dtype_q_(\w+?)_dtype_kv_(\w+?)_.*_head_dim_qk_(\d+)_")
GET_COMPILER = "apt install gcc libc6-dev"


def check_compiler(probe: Probe, gpus: Gpus) -> Finding:
    """Check whether the C kernels of CPU devices are in the cache, or can be compiled."""
    kernels: Any = probe.import_module("kunserve.compute.cpu_kernels")
    library = kernels.library_path(environment=probe.environment)
    if library.exists():
        return ok("not needed any more: the CPU kernels are in the cache", library=str(library))
    consequence = "slower, and results depend on batching"
    try:
        command = kernels.find_compiler(probe.environment, probe.which)
        with tempfile.TemporaryDirectory() as folder:
            status, said = probe.run([*command, *kernels.FLAGS, "-x", "c", "-", "-o", f"{folder}/nothing.so"], HEADERS)
    except kernels.KernelsUnavailableError as error:
        return Finding(Status.MISSING, str(error), consequence, GET_COMPILER)
    except Exception as error:
        return Finding(Status.PROBLEM, f"cannot run: {first_line(error)}", consequence, f"{GET_COMPILER} or set CC")
    name = " ".join(command)
    if status:
        reason = next((line for line in said.splitlines() if "error" in line), "no message")
        return Finding(Status.PROBLEM, f"{name} fails: {reason.strip()}", consequence, f"{GET_COMPILER} or set CC")
    return ok(f"{name}; the CPU kernels are compiled at the first start", command=command)


def check_flashinfer(probe: Probe, gpus: Gpus) -> Finding:
    """Check whether FlashInfer is there in the right version, with its kernels or what compiles them."""
    bound = bound_of(probe, "flashinfer-python", "cuda")
    package = probe.find_package("flashinfer")
    details: dict[str, Any] = {"installed": bound.installed, "wanted": bound.wanted}
    if not gpus.found:
        return ok(NOT_NEEDED, **details)
    prevents = frozenset({CUDA})
    consequence = "--devices cuda fails for models in bfloat16 and float16"
    if package is None or bound.installed is None:
        return Finding(Status.MISSING, "not installed", consequence, GET_CUDA, prevents, details)
    if probe.find_package("tvm_ffi") is None:
        found = f"{bound.installed}, but apache-tvm-ffi, which loads its kernels, is not installed"
        return Finding(Status.PROBLEM, found, consequence, "pip install apache-tvm-ffi", prevents, details)
    if probe.environment.get("LD_BIND_NOW"):
        found = f"{bound.installed}, but LD_BIND_NOW is set: its kernels name functions that nobody calls"
        return Finding(Status.PROBLEM, found, consequence, "unset LD_BIND_NOW", prevents, details)
    ready, missing = _ready_kernels(probe, package), _missing_tools(probe)
    built = f"kernels built: {', '.join(ready) or 'none'}"
    found = f"{bound.installed}; {built}"
    details |= {"kernels": ready, "missing_tools": missing}
    tools = "install a CUDA toolkit (nvcc) and ninja, or kernels built ahead of time (see dev/gpu/README.md)"
    if not ready and missing:
        found += f", and none can be: {'; '.join(missing)}"
        return Finding(Status.PROBLEM, found, consequence, tools, prevents, details)
    if not bound.is_met:
        found = f"{bound.installed} instead of {bound.wanted.lstrip('=')}; {built}"
        consequence = "KunServe's calls are written for the other version: steps may fail"
        return Finding(Status.WARNING, found, consequence, GET_CUDA, details=details)
    if not ready:
        consequence = "the first start compiles for minutes, for each dtype and head size"
        remedy = "start once with each model beforehand, or install kernels built ahead of time (dev/gpu/README.md)"
        return Finding(Status.WARNING, found, consequence, remedy, details=details)
    if missing:
        consequence = f"models of other dtypes and head sizes fail: {'; '.join(missing)}"
        return Finding(Status.WARNING, found, consequence, tools, details=details)
    return ok(found, **details)


def check_triton(probe: Probe, gpus: Gpus) -> Finding:
    """Check whether Triton is there, and what it compiles its launchers with."""
    version = probe.version("triton")
    if not gpus.found:
        return ok(NOT_NEEDED, installed=version)
    if version is None:
        consequence = "GPUs run torch's small kernels, without CUDA graphs: slower steps"
        return Finding(Status.MISSING, "not installed", consequence, "pip install triton")
    consequence = "--devices cuda fails at its first step, unless ~/.triton holds all that it needs"
    if not (probe.environment.get("CC") or probe.which("gcc") or probe.which("clang")):
        found = f"{version}, but neither gcc nor clang, which it needs at run time"
        return Finding(Status.PROBLEM, found, consequence, GET_COMPILER, frozenset({CUDA}))
    header = f"{sysconfig.get_path('include')}/Python.h"
    try:
        probe.read_text(header)
    except OSError:
        remedy = "apt install python3-dev"
        return Finding(Status.PROBLEM, f"{version}, but no {header}", consequence, remedy, frozenset({CUDA}))
    return ok(version)


def _ready_kernels(probe: Probe, package: Path) -> list[str]:
    """Return dtypes and head size of all prefill modules, which serve decoding too: built ahead, or compiled before."""
    base = Path(probe.environment.get("FLASHINFER_WORKSPACE_BASE") or probe.home)
    built = list((package / "data" / "aot").glob("batch_prefill*/*.so"))
    if (cache := probe.find_package("flashinfer_jit_cache")) is not None:
        built = list(cache.glob("**/batch_prefill*/*.so"))  # FlashInfer looks at nothing else then
    version = probe.version("flashinfer-python") or ""
    built += (base / ".cache" / "flashinfer" / version).glob("*/cached_ops/batch_prefill*/*.so")
    matches = [PREFILL.match(path.stem) for path in built]
    made = {(q if q == kv else f"{q} with KV in {kv}", dim) for q, kv, dim in (m.groups() for m in matches if m)}
    return sorted("/".join(of) for of in made)


def _missing_tools(probe: Probe) -> list[str]:
    """Return what keeps FlashInfer from compiling, as it looks for it."""
    environment = probe.environment
    if environment.get("FLASHINFER_DISABLE_JIT"):
        return ["FLASHINFER_DISABLE_JIT is set"]
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    if own := environment.get("FLASHINFER_NVCC"):
        candidates = [own]
    missing = [] if any(probe.which(path) for path in candidates) else ["no nvcc"]
    ninjas = ("ninja", str(Path(sys.executable).parent / "ninja"))  # a server looks in its own environment, too
    return missing + ([] if any(map(probe.which, ninjas)) else ["no ninja"])
