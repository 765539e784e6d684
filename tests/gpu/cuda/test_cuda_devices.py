"""Which CUDA devices there are and how large they become; what is said where something is missing."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import GRANULARITY, FakeCuda
from test_cuda import CHUNK

from kunserve.config import parse_cuda_devices
from kunserve.errors import ConfigError, DeviceError
from kunserve.gpu.cuda import device as cuda
from kunserve.gpu.cuda import driver as cuda_driver
from kunserve.gpu.cuda.device import (
    budget_bytes,
    choose_chunk_bytes,
    device_names,
    islands,
    open_cuda_devices,
    open_drivers,
)
from kunserve.gpu.kv_memory import KVShape
from kunserve.model.card import load_card
from kunserve.model.layout import weight_units
from kunserve.sizes import ceil_div


def test_names() -> None:
    assert device_names([0, 0, 1]) == ["cuda:0.0", "cuda:0.1", "cuda:1"]


def test_chunks_of_the_8b_model_are_tens_of_mib_and_waste_little() -> None:
    config, mib = load_card("llama-8b").config, 1 << 20
    block = KVShape.of(config, 16, torch.bfloat16).block_bytes
    chunk = choose_chunk_bytes(config, torch.bfloat16, block, GRANULARITY, 72 << 30)
    assert chunk % GRANULARITY == 0 and 16 * mib <= chunk <= 64 * mib
    layer = weight_units(config, "bfloat16")[1].num_bytes
    assert -layer % chunk / layer < 0.02
    small = choose_chunk_bytes(
        config, torch.bfloat16, block, GRANULARITY, 18 << 30
    )  # little KV: coarse chunks would lose it
    weights = sum(ceil_div(unit.num_bytes, small) for unit in weight_units(config, "bfloat16"))
    kv = ((18 << 30) // small - weights) // config.num_layers * config.num_layers * small
    assert kv >= 0.85 * ((18 << 30) - sum(unit.num_bytes for unit in weight_units(config, "bfloat16")))


def test_chunks_of_a_small_model_are_small() -> None:
    config = load_card("smollm2-135m").config
    block = KVShape.of(config, 16, torch.float32).block_bytes
    assert choose_chunk_bytes(config, torch.float32, block, GRANULARITY, 730 << 20) <= 4 * GRANULARITY


@pytest.mark.parametrize("share", [0.99, 0.6, 0.3])
def test_chunks_waste_little_of_devices_that_hold_the_weights_only_together(share: float) -> None:
    """A chain of several holds them: chunks as large as a device, of which none would have any, help nobody."""
    config = load_card("smollm2-135m").config
    block = KVShape.of(config, 16, torch.float32).block_bytes
    units = [unit.num_bytes for unit in weight_units(config, "float32")]
    chunk = choose_chunk_bytes(config, torch.float32, block, GRANULARITY, int(sum(units) * share))
    assert sum(-num_bytes % chunk for num_bytes in units) < 0.07 * sum(units)


def test_budgets() -> None:
    gib = 1 << 30
    memory = {0: (70 * gib, 80 * gib), 1: (79 * gib, 80 * gib)}

    def budget(ordinals: list[int], memory_bytes: int | None = None, reserved: int = 0) -> int:
        return budget_bytes(ordinals, memory, memory_bytes=memory_bytes, utilization=0.9, reserved_bytes=reserved)

    assert budget([1]) == 71 * gib
    assert budget([0]) == 62 * gib
    assert budget([0, 1]) == 62 * gib  # all alike: the least
    assert budget([0, 0], reserved=gib) == 30 * gib
    assert budget([0, 0, 0, 0], 16 * gib, gib) == 16 * gib
    with pytest.raises(ConfigError, match=r"cuda:0: too little memory: --device-memory asks for 4 x 17\.0 GiB and 4 x"):
        budget([0, 0, 0, 0], 17 * gib, gib)
    memory[0] = (2 * gib, 80 * gib)
    with pytest.raises(ConfigError, match=r"--gpu-memory-utilization 0.9 asks for 1 x 0 MiB .* 2048 MiB of 80\.0 GiB"):
        budget([0])


def test_islands_are_devices_that_reach_each_other() -> None:
    assert islands([FakeCuda(0, reachable=[1]), FakeCuda(1, reachable=[0]), FakeCuda(2), FakeCuda(2)]) == [0, 0, 2, 2]


# --- opening --------------------------------------------------------------------------------------------------------


def test_open_all_or_none() -> None:
    drivers = [FakeCuda(0), FakeCuda(0, total_bytes=CHUNK)]
    with pytest.raises(ConfigError, match=r"cuda:0\.1: too little memory"):
        open_cuda_devices(drivers, 2, CHUNK)
    assert all(driver.is_clean() for driver in drivers)

    opened: list[FakeCuda] = []

    def open_driver(ordinal: int) -> FakeCuda:
        if ordinal == 1:
            raise ConfigError("no")
        opened.append(FakeCuda(ordinal))
        return opened[-1]

    with pytest.raises(ConfigError):
        open_drivers([0, 0, 1], open_driver)
    assert len(opened) == 2 and all(driver.is_clean() for driver in opened)


class Status:
    """A CUresult."""

    def __init__(self, name: str = "CUDA_SUCCESS") -> None:
        self.name, self.value = name, 0 if name == "CUDA_SUCCESS" else 1


def bindings(**calls: Any) -> Any:
    """cuda.bindings.driver with the few calls that a test is about."""
    return SimpleNamespace(**{"cuInit": lambda flags: (Status(),), "cuDeviceGetCount": lambda: (Status(), 2)} | calls)


def importing(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    def import_module(name: str) -> Any:
        if module is None:
            raise ModuleNotFoundError(name)
        return module

    monkeypatch.setattr("importlib.import_module", import_module)


def no_libcuda(flags: int) -> tuple[Status]:
    raise RuntimeError("libcuda.so.1: cannot open shared object file")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "needs cuda-bindings: pip install 'kunserve[cuda]'"),
        (bindings(cuInit=no_libcuda), "no NVIDIA driver (libcuda.so.1 is not found)"),
        (bindings(cuInit=lambda flags: (Status("CUDA_ERROR_NO_DEVICE"),)), "does not start: CUDA_ERROR_NO_DEVICE"),
        (bindings(), "cannot use CUDA; install a CUDA build of torch"),
    ],
)
def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, module: Any, message: str) -> None:
    importing(monkeypatch, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as error:
        open_drivers(parse_cuda_devices("cuda"))
    assert message in error.value.message and "\n" not in error.value.message
    assert error.value.message.startswith("--devices cuda")


def test_no_such_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    importing(monkeypatch, bindings())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"no cuda:5; this machine has 2 GPU\(s\): cuda:0, cuda:1"):
        open_drivers((0, 5))


def test_driver_errors_carry_their_names() -> None:
    failing = bindings(cuDeviceGet=lambda ordinal: (Status("CUDA_ERROR_INVALID_DEVICE"), None))
    with pytest.raises(DeviceError, match="cuda:1: cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE"):
        cuda_driver.CudaDriver(1, failing)


def test_everything_imports_where_nothing_of_cuda_is_installed() -> None:
    script = """
import importlib, pkgutil, sys
for name in ("triton", "flashinfer", "cuda", "cuda.bindings"):
    sys.modules[name] = None
import kunserve
for module in pkgutil.walk_packages(kunserve.__path__, "kunserve."):
    needs_ray = module.name.startswith("kunserve.ray.")
    if not (needs_ray or module.name.endswith(("cuda.kernels", "cuda.experts", "cuda.packed", "__main__"))):
        importlib.import_module(module.name)
try:
    import kunserve.compute.cuda.kernels
except ImportError:
    print("only the kernels need triton")
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.stdout == "only the kernels need triton\n", done.stderr


def has_gpu() -> bool:
    return torch.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="needs a CUDA device and a CUDA build of torch")
async def test_content_follows_its_chunk_on_a_gpu() -> None:
    (device,) = open_cuda_devices(open_drivers((0,)), 4, 16 * cuda.MIB)
    address = device.reserve(4 * device.chunk_bytes)
    device.map(address, [0, 1])
    flat = device.tensor(address, 4 * device.chunk_bytes)
    await device.run(lambda: flat[: device.chunk_bytes].fill_(5))
    device.unmap(address, 2)
    device.map(address + device.chunk_bytes, [0])
    moved = flat[device.chunk_bytes : 2 * device.chunk_bytes]
    assert await device.run(lambda: int(moved.min()) == int(moved.max()) == 5)
    device.close()
