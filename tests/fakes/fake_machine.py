"""Machines for `kunserve doctor` that are whatever a test says: a good one without GPUs, and one with some."""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fake_cuda import FakeCuda
from packaging.requirements import Requirement

from kunserve.doctor.probe import Probe

GIB = 1 << 30
PREFILL = (
    "batch_prefill_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_128_"
    "head_dim_vo_128_posenc_0_use_swa_False_use_logits_cap_False_f16qk_False"
)
FILES = {
    "/proc/cpuinfo": "flags : fpu fma avx2 avx512f",
    "/proc/sys/vm/max_map_count": "65530\n",
    "/proc/self/cgroup": "0::/\n",
}
DRIVER_FILE = {
    "/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
}
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# As the metadata of an installed KunServe have them.
REQUIREMENTS = (
    *PROJECT["dependencies"],
    *(f'{line}; extra == "{extra}"' for extra, lines in PROJECT["optional-dependencies"].items() for line in lines),
)
WANTED = {one.name: str(one.specifier) for one in map(Requirement, REQUIREMENTS)}


def _oldest(wanted: str) -> str:
    """The lower bound of ">=2.11,<2.14", or the one version of "==0.6"."""
    return next(part[2:] for part in wanted.split(",") if part[:2] in (">=", "=="))


VERSIONS = {
    **{name: _oldest(wanted) for name, wanted in WANTED.items() if wanted},
    "kunserve": PROJECT["version"],
    "torch": "2.13.0",
    "triton": "3.7.1",
}


class Status:
    """A CUresult."""

    def __init__(self, name: str = "CUDA_SUCCESS") -> None:
        self.name, self.value = name, 0 if name == "CUDA_SUCCESS" else 1


class Bindings:
    """cuda.bindings.driver over fake GPUs, as far as it is asked about them. The `fail_at`-th call fails."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
        CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED="virtual_memory",
    )

    def __init__(
        self,
        gpus: Sequence[FakeCuda],
        *,
        cuda: int = 13000,
        init: str = "CUDA_SUCCESS",
        without_virtual_memory: Sequence[int] = (),
    ) -> None:
        self.gpus, self.cuda, self.init, self.without = gpus, cuda, init, without_virtual_memory
        self.num_calls, self.fail_at = 0, 0
        self.retained: list[int] = []
        self.contexts: list[int] = []

    def _answer(self, *values: Any) -> tuple[Any, ...]:
        self.num_calls += 1
        if self.num_calls == self.fail_at:
            return (Status("CUDA_ERROR_UNKNOWN"), *(None for _ in values))
        return (Status(), *values)

    def cuInit(self, flags: int) -> tuple[Any, ...]:  # noqa: N802
        return (Status(self.init),)

    def cuDriverGetVersion(self) -> tuple[Any, ...]:  # noqa: N802
        return self._answer(self.cuda)

    def cuDeviceGetCount(self) -> tuple[Any, ...]:  # noqa: N802
        return self._answer(len(self.gpus))

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:  # noqa: N802
        return self._answer(ordinal)

    def cuDeviceGetName(self, length: int, device: int) -> tuple[Any, ...]:  # noqa: N802
        return self._answer(self.gpus[device].gpu_name.encode().ljust(length, b"\0"))

    def cuDeviceGetAttribute(self, attribute: str, device: int) -> tuple[Any, ...]:  # noqa: N802
        values = {"major": 9, "minor": 0, "virtual_memory": int(device not in self.without)}
        return self._answer(values[attribute])

    def cuDeviceCanAccessPeer(self, device: int, other: int) -> tuple[Any, ...]:  # noqa: N802
        return self._answer(int(self.gpus[device].can_access(other)))

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:  # noqa: N802
        answer = self._answer(device)
        if not answer[0].value:
            self.retained.append(device)
        return answer

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any, ...]:  # noqa: N802
        self.retained.remove(device)
        return self._answer()

    def cuCtxPushCurrent(self, context: int) -> tuple[Any, ...]:  # noqa: N802
        answer = self._answer()
        if not answer[0].value:
            self.contexts.append(context)
        return answer

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:  # noqa: N802
        return self._answer(self.contexts.pop())

    def cuMemGetInfo(self) -> tuple[Any, ...]:  # noqa: N802
        return self._answer(*self.gpus[self.contexts[-1]].memory())


def files(contents: Mapping[str, str]) -> Callable[[str], str]:
    """The only files there are."""

    def read_text(path: str) -> str:
        if path.endswith("/Python.h") and path not in contents:
            return ""
        try:
            return contents[path]
        except KeyError:
            raise FileNotFoundError(2, "No such file or directory", path) from None

    return read_text


def modules(fakes: Mapping[str, Any]) -> Callable[[str], Any]:
    """Importing gives a fake module, raises a fake error, or else imports."""

    def import_module(name: str) -> Any:
        if name not in fakes:
            return importlib.import_module(name)
        if isinstance(fakes[name], BaseException):
            raise fakes[name]
        return fakes[name]

    return import_module


def fake_torch(cuda: str | None, *, is_available: bool = False) -> Any:
    """A torch that is built for a version of CUDA, or for none."""
    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(is_available=lambda: is_available),
    )


def hub_constants(folder: Path, *, is_offline: bool = False) -> Any:
    """What huggingface_hub makes of its environment variables."""
    return SimpleNamespace(
        HF_HUB_CACHE=str(folder / "hf" / "hub"), HF_TOKEN_PATH=str(folder / "hf" / "token"), HF_HUB_OFFLINE=is_offline
    )


def cpu_machine(folder: Path, **changes: Any) -> Probe:
    """A machine without a GPU on which all is well otherwise. `changes`: fields of it, as a test wants them."""
    found: dict[str, Path] = {}
    good = Probe(
        environment={"KUNSERVE_CACHE": str(folder / "kunserve")},
        home=folder,
        working_folder=str(folder),
        system="Linux",
        kernel="6.1.0-13-amd64",
        python="3.11.7",
        read_text=files(FILES),
        list_folder=lambda path: [],
        import_module=modules(
            {
                "torch": fake_torch(None),
                "cuda.bindings.driver": ModuleNotFoundError("No module named 'cuda'"),
                "huggingface_hub.constants": hub_constants(folder),
            }
        ),
        find_package=found.get,
        version=VERSIONS.get,
        requirements=lambda: REQUIREMENTS,
        which=lambda name: f"/usr/bin/{name}" if name in ("cc", "gcc") else None,
        run=lambda command, text: (0, ""),
        limit=lambda kind: None,
        cores=lambda: 8,
        available_bytes=lambda: 60 * GIB,
        take_memory=lambda num_bytes: None,
        cache_root=lambda: folder / "kunserve",
        is_writable=lambda path: True,
        free_bytes=lambda path: 500 * GIB,
    )
    return replace(good, **changes)


def gpu_machine(folder: Path, bindings: Bindings, fakes: Mapping[str, Any] | None = None, **changes: Any) -> Probe:
    """The same machine with GPUs, and all that these need. `fakes`: modules beside torch and the bindings."""
    package = folder / "flashinfer"
    kernel = package / "data" / "aot" / PREFILL / f"{PREFILL}.so"
    kernel.parent.mkdir(parents=True, exist_ok=True)
    kernel.touch()
    imported = {
        "torch": fake_torch("13.0", is_available=True),
        "cuda.bindings.driver": bindings,
        "huggingface_hub.constants": hub_constants(folder),
        **(fakes or {}),
    }
    tools = {"cc", "gcc", "nvcc", "ninja"}
    good = {
        "read_text": files({**FILES, **DRIVER_FILE}),
        "import_module": modules(imported),
        "find_package": {"flashinfer": package, "tvm_ffi": folder}.get,
        "which": lambda name: name if name in tools else None,
        "available_bytes": lambda: 1000 * GIB,
    }
    return cpu_machine(folder, **{**good, **changes})
