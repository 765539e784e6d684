from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda
from fake_machine import (
    DRIVER_FILE,
    FILES,
    GIB,
    PREFILL,
    VERSIONS,
    Bindings,
    cpu_machine,
    fake_torch,
    files,
    gpu_machine,
)

from kunserve.doctor.finding import Finding, Status
from kunserve.doctor.gpus import find_gpus
from kunserve.doctor.report import examine
from kunserve.gpu.cuda.device import islands

PCI = "/sys/bus/pci/devices/0000:01:00.0"
CARD = {f"{PCI}/vendor": "0x10de\n", f"{PCI}/class": "0x030200\n"}


def no_libcuda(flags: int) -> Any:
    raise RuntimeError("libcuda.so.1: cannot open shared object file")


def bindings(*reachable: list[int], **options: Any) -> Bindings:
    """One GPU for each argument, which says whom it reaches; one alone without any."""
    return Bindings([FakeCuda(i, GIB, peers) for i, peers in enumerate(reachable or ([],))], **options)


def without_libcuda() -> Bindings:
    made = bindings()
    made.cuInit = no_libcuda  # type: ignore[method-assign]
    return made


def check_line(finding: Finding, status: str, *words: str) -> None:
    """What is not well is said with what follows and what mends it."""
    assert finding.status == status
    text = f"{finding.found} / {finding.consequence} / {finding.remedy}"
    for word in words:
        assert word in text


def test_no_gpu_is_told_from_a_gpu_without_a_driver(tmp_path: Path) -> None:
    check_line(examine(cpu_machine(tmp_path))["GPUs"], "missing", "no NVIDIA GPU and no NVIDIA driver", "cpu:N")
    probe = cpu_machine(tmp_path, list_folder=lambda path: ["0000:01:00.0"], read_text=files({**FILES, **CARD}))
    check_line(examine(probe)["GPUs"], "problem", "1 NVIDIA GPU(s) on the PCI bus, but no NVIDIA driver", "install")


def test_a_driver_without_its_library_or_without_bindings_is_named(tmp_path: Path) -> None:
    found = examine(gpu_machine(tmp_path, without_libcuda()))["GPUs"]
    check_line(found, "problem", "driver 580.95.05, but no libcuda.so.1", "docker run --gpus all")
    probe = cpu_machine(tmp_path, read_text=files({**FILES, **DRIVER_FILE}))
    found = examine(probe)["GPUs"]
    check_line(
        found, "missing", "driver 580.95.05, but cuda-bindings cannot be imported", "pip install 'kunserve[cuda]'"
    )
    assert found.prevents == {"cuda"}


@pytest.mark.parametrize(
    ("init", "environment", "words"),
    [
        ("CUDA_ERROR_NO_DEVICE", {}, ["driver 580.95.05, but no GPU", "docker run --gpus all"]),
        ("CUDA_ERROR_NO_DEVICE", {"CUDA_VISIBLE_DEVICES": "7"}, ["CUDA_VISIBLE_DEVICES=7", "unset"]),
        ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", {}, ["does not start: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "restart"]),
    ],
)
def test_a_driver_that_shows_no_gpu_says_why(
    tmp_path: Path, init: str, environment: dict[str, str], words: list[str]
) -> None:
    findings = examine(gpu_machine(tmp_path, bindings(init=init), environment=environment))
    check_line(findings["GPUs"], "problem", *words)
    assert findings["GPUs"].prevents == {"cuda"} and not findings["FlashInfer"].prevents


def test_gpus_are_listed_by_kind_with_their_memory(tmp_path: Path) -> None:
    finding = examine(gpu_machine(tmp_path, bindings([1], [0])))["GPUs"]
    check_line(finding, "ok", "driver 580.95.05 (CUDA 13.0); 1 x GPU 0 that is not there (9.0), 1.0 of 1.0 GiB free")
    assert [gpu["ordinal"] for gpu in finding.details["gpus"]] == [0, 1]
    made = bindings([], [])
    for gpu in made.gpus:
        gpu.gpu_name = "NVIDIA H100 MIG 1g.10gb"
    finding = examine(gpu_machine(tmp_path, made))["GPUs"]
    assert "; 2 x NVIDIA H100 MIG 1g.10gb (9.0), 1.0 of 1.0 GiB free" in finding.found
    assert all(gpu["is_mig_slice"] for gpu in finding.details["gpus"])


def test_memory_that_others_hold_is_a_warning(tmp_path: Path) -> None:
    made = bindings([1], [0])
    made.gpus[1].create(GIB // 2)
    check_line(examine(gpu_machine(tmp_path, made))["GPUs"], "warning", "up to 0.5 GiB of cuda:1", "less KV")


def test_a_gpu_without_virtual_memory_is_left_out(tmp_path: Path) -> None:
    finding = examine(gpu_machine(tmp_path, bindings([1], [0], without_virtual_memory=[0])))["GPUs"]
    check_line(finding, "problem", "without virtual memory management: cuda:0", "--devices cuda:1")
    assert not finding.prevents
    finding = examine(gpu_machine(tmp_path, bindings(without_virtual_memory=[0])))["GPUs"]
    check_line(finding, "problem", "--devices cpu:2")
    assert finding.prevents == {"cuda"}


def test_any_call_of_the_driver_may_fail(tmp_path: Path) -> None:
    """First, second, ... n-th call: a line that names it, and no context is kept."""
    num_calls = 0
    while True:
        made = bindings([1], [0])
        made.fail_at = num_calls = num_calls + 1
        finding = examine(gpu_machine(tmp_path, made))["GPUs"]
        assert not made.retained or "Release" in finding.found
        if made.num_calls < num_calls:
            break
        check_line(finding, "problem", "failed: CUDA_ERROR_UNKNOWN", "nvidia-smi")
        assert finding.prevents == {"cuda"}
    assert num_calls > 20


@pytest.mark.parametrize(
    ("reachable", "status", "words"),
    [
        ([[]], "ok", ["not needed with one GPU"]),
        ([[1], [0]], "ok", ["all 2 GPUs reach each other"]),
        ([[], []], "warning", ["2 islands: cuda:0; cuda:1", "through host memory", "--devices cuda:0"]),
        ([[1], [0], [3], [2]], "warning", ["2 islands: cuda:0,1; cuda:2,3", "--devices cuda:0,1"]),
    ],
)
def test_peer_access_is_told_as_the_planner_sees_it(
    tmp_path: Path, reachable: list[list[int]], status: str, words: list[str]
) -> None:
    made = bindings(*reachable)
    finding = examine(gpu_machine(tmp_path, made))["peer access"]
    check_line(finding, status, *words)
    first = islands(made.gpus)
    groups = [[i for i, island in enumerate(first) if island == one] for one in dict.fromkeys(first)]
    assert finding.details.get("islands", groups[:1]) == groups


@pytest.mark.parametrize(
    ("torch", "cuda", "words"),
    [
        (fake_torch(None), 13000, ["2.13.0, CPU build: it cannot use the GPU", "install a CUDA build of torch"]),
        (fake_torch("13.0"), 12040, ["the driver is too old, it ends at CUDA 12.4", "built for CUDA 12"]),
        (fake_torch("12.8"), 13000, ["cannot use the GPU and does not say why", "torch.zeros(1).cuda()"]),
    ],
)
def test_gpus_that_torch_cannot_use_are_a_problem(tmp_path: Path, torch: Any, cuda: int, words: list[str]) -> None:
    findings = examine(gpu_machine(tmp_path, bindings(cuda=cuda), {"torch": torch}))
    check_line(findings["torch"], "problem", *words)
    assert findings["torch"].prevents == {"cuda"} and findings["GPUs"].status is Status.OK


def test_what_torch_complains_about_is_quoted(tmp_path: Path) -> None:
    import warnings

    torch = fake_torch("13.0")
    torch.cuda.is_available = lambda: bool(warnings.warn("CUDA initialization: Error 802", stacklevel=1))
    check_line(examine(gpu_machine(tmp_path, bindings(), {"torch": torch}))["torch"], "problem", "Error 802")


def flashinfer(folder: Path, *built: str) -> Callable[[str], Path | None]:
    """FlashInfer with modules built ahead of time."""
    for name in built:
        kernel = folder / "bare" / "data" / "aot" / name / f"{name}.so"
        kernel.parent.mkdir(parents=True)
        kernel.touch()
    return {"flashinfer": folder / "bare", "tvm_ffi": folder}.get


def test_flashinfer_of_another_version_is_a_warning(tmp_path: Path) -> None:
    versions = {**VERSIONS, "flashinfer-python": "0.7.2"}
    finding = examine(gpu_machine(tmp_path, bindings(), version=versions.get))["FlashInfer"]
    check_line(finding, "warning", "0.7.2 instead of 0.6.18.post1", "bf16/128", "pip install 'kunserve[cuda]'")


def test_flashinfer_that_is_absent_or_incomplete_keeps_gpus_from_serving(tmp_path: Path) -> None:
    for packages, words in (
        ({}, ["not installed", "pip install 'kunserve[cuda]'"]),
        ({"flashinfer": tmp_path}, ["apache-tvm-ffi", "pip install apache-tvm-ffi"]),
    ):
        finding = examine(gpu_machine(tmp_path, bindings(), find_package=packages.get))["FlashInfer"]
        check_line(finding, "missing" if not packages else "problem", *words)
        assert finding.prevents == {"cuda"}


def test_kernels_are_built_ahead_or_compiled_or_cannot_be(tmp_path: Path) -> None:
    def found(**changes: Any) -> Finding:
        return examine(gpu_machine(tmp_path, bindings(), **changes))["FlashInfer"]

    no_tools = {"which": lambda name: name if name in ("gcc", "cc") else None}
    bare = {"find_package": flashinfer(tmp_path)}
    check_line(found(), "ok", "0.6.18.post1; kernels built: bf16/128")
    check_line(found(environment={"LD_BIND_NOW": "1"}), "problem", "LD_BIND_NOW is set", "unset LD_BIND_NOW")
    check_line(found(**no_tools), "warning", "other dtypes and head sizes fail: no nvcc; no ninja")
    check_line(found(**bare), "warning", "kernels built: none", "compiles for minutes")
    finding = found(**bare, **no_tools)
    check_line(finding, "problem", "none can be: no nvcc; no ninja", "CUDA toolkit")
    assert finding.prevents == {"cuda"}
    of_environment = str(Path(sys.executable).parent / "ninja")  # which nobody has activated
    ninja = {"which": lambda name: name if name in ("gcc", of_environment) else None}
    check_line(found(**bare, **ninja), "problem", "none can be: no nvcc")
    assert "ninja" not in found(**bare, **ninja).found
    check_line(found(**bare, environment={"FLASHINFER_DISABLE_JIT": "1"}), "problem", "FLASHINFER_DISABLE_JIT is set")
    check_line(found(**bare, environment={"CUDA_HOME": "/opt/nothing"}), "problem", "no nvcc")
    compiled = tmp_path / ".cache/flashinfer/0.6.18.post1/90a/cached_ops" / PREFILL / f"{PREFILL}.so"
    compiled.parent.mkdir(parents=True)
    compiled.touch()
    check_line(found(**bare), "ok", "kernels built: bf16/128")
    few = compiled.with_stem(PREFILL.replace("kv_bf16", "kv_e4m3"))
    few.touch()
    check_line(found(**bare), "ok", "kernels built: bf16 with KV in e4m3/128, bf16/128")


def test_a_package_of_kernels_goes_before_those_in_flashinfer(tmp_path: Path) -> None:
    cache = tmp_path / "flashinfer_jit_cache"
    name = PREFILL.replace("bf16", "f16").replace("128", "64")
    kernel = cache / "jit_cache" / name / f"{name}.so"
    kernel.parent.mkdir(parents=True)
    kernel.touch()
    packages = {"flashinfer": tmp_path / "flashinfer", "tvm_ffi": tmp_path, "flashinfer_jit_cache": cache}
    finding = examine(gpu_machine(tmp_path, bindings(), find_package=packages.get))["FlashInfer"]
    assert finding.details["kernels"] == ["f16/64"]


def test_triton_needs_a_compiler_and_headers_at_run_time(tmp_path: Path) -> None:
    def found(**changes: Any) -> Finding:
        return examine(gpu_machine(tmp_path, bindings(), **changes))["Triton"]

    check_line(found(), "ok", "3.7.1")
    check_line(found(version={**VERSIONS, "triton": None}.get), "missing", "without CUDA graphs", "pip install triton")
    finding = found(which=lambda name: name if name in ("cc", "nvcc", "ninja") else None)  # Triton looks for no cc
    check_line(finding, "problem", "neither gcc nor clang", "apt install gcc")
    assert finding.prevents == {"cuda"}

    def read_text(path: str) -> str:
        if path.endswith("Python.h"):
            raise FileNotFoundError(path)
        return files({**FILES, **DRIVER_FILE})(path)

    check_line(found(read_text=read_text), "problem", "Python.h", "apt install python3-dev")


def test_gpus_are_asked_for_without_torch(tmp_path: Path) -> None:
    """A torch that cannot be imported hides no GPU."""
    probe = gpu_machine(tmp_path, bindings(), {"torch": ImportError("libcudnn.so.9")})
    findings = examine(probe)
    assert find_gpus(probe).found and findings["GPUs"].status is Status.OK
    check_line(findings["torch"], "problem", "2.13.0 cannot be imported: libcudnn.so.9")
