"""What a process keeps of the weights: chosen by what fits and what the driver allows, and no byte more than said."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda

from kunserve.errors import ConfigError
from kunserve.gpu import host_weights
from kunserve.gpu.cuda.pinned import PinnedSource
from kunserve.gpu.host_weights import HostWeights, keep_host_copy
from kunserve.model.checkpoint import (
    DummySource,
    SafetensorsSource,
    WeightSource,
    save_checkpoint,
)
from kunserve.model.config import ModelConfig
from kunserve.model.disk_source import DiskSource
from kunserve.model.host_copy import HostCopy
from kunserve.model.layout import expected_shapes, weight_units

TINY = ModelConfig("llama", 48, 16, 32, 2, 2, 1, 8, 64)
LARGE = ModelConfig("llama", 16_384, 1024, 512, 1, 8, 2, 128, 64)  # 64 MiB of embedding, 64 MiB of head, and a layer
LARGE_BYTES = sum(unit.num_bytes for unit in weight_units(LARGE, "float32"))


@pytest.fixture
def driver() -> Iterator[FakeCuda]:
    driver = FakeCuda()
    yield driver
    driver.close()
    assert driver.is_clean()


def keep(asked: HostCopy, driver: FakeCuda | None = None) -> HostWeights:
    return keep_host_copy(asked, DummySource(TINY), weight_units(TINY, "float32"), driver)


def test_gpus_get_a_pinned_copy_of_their_own_choice(driver: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_weights, "available_bytes", lambda: 1 << 40)
    host = keep(HostCopy.AUTO, driver)
    assert host.kind is HostCopy.PINNED and isinstance(host.source, PinnedSource)
    assert [host.num_bytes] == list(driver.pinned_ranges.values())
    host.close()
    host.close()


def test_a_copy_that_does_not_fit_is_not_pinned(driver: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_weights, "available_bytes", lambda: 1 << 30)
    host = keep(HostCopy.AUTO, driver)
    assert host.kind is HostCopy.MAPPED and host.num_bytes == 0 and isinstance(host.source, DummySource)
    assert "a pinned copy needs 0 MiB, and 1024 MiB of host memory are available" in host.because


def test_memory_that_the_driver_does_not_lock_is_not_pinned(driver: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_weights, "available_bytes", lambda: 1 << 40)
    driver.fail_at["pin"] = 1
    host = keep(HostCopy.AUTO, driver)
    assert host.kind is HostCopy.MAPPED and host.num_bytes == 0
    assert host.because == "cannot pin 0 MiB of host memory for the weights (cuda:0: pin failed: CUDA_ERROR_UNKNOWN)"
    driver.fail_at["pin"] = 2
    with pytest.raises(ConfigError, match=r"cannot pin .*CUDA_ERROR_UNKNOWN\); start with --host-copy mapped$"):
        keep(HostCopy.PINNED, driver)


@pytest.mark.parametrize("asked", [HostCopy.MAPPED, HostCopy.NONE])
def test_nothing_is_pinned_that_was_not_asked_for(driver: FakeCuda, asked: HostCopy) -> None:
    assert keep(asked, driver).kind is asked and not driver.calls["pin"]


def test_a_copy_for_cpu_devices_is_pinned_by_nobody() -> None:
    host, name = keep(HostCopy.PINNED), "model.layers.0.mlp.up_proj.weight"
    assert host.kind is HostCopy.PINNED and host.num_bytes >= sum(
        unit.num_bytes for unit in weight_units(TINY, "float32")
    )
    out, expected = torch.empty(32, 16), torch.empty(32, 16)
    host.source.copy_into(name, out)
    DummySource(TINY).copy_into(name, expected)
    assert torch.equal(out, expected)
    host.close()


# --- how much memory it takes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, source = tmp_path_factory.mktemp("large"), DummySource(LARGE)
    tensors = {name: torch.empty(shape) for name, shape in expected_shapes(LARGE).items()}
    for name, tensor in tensors.items():
        source.copy_into(name, tensor)
    save_checkpoint(folder, LARGE, tensors)
    return folder


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind, as the kernel counts it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


@pytest.mark.parametrize("kind", [HostCopy.PINNED, HostCopy.MAPPED, HostCopy.NONE])
def test_only_a_pinned_copy_takes_memory_of_the_process(kind: HostCopy, large: Path) -> None:
    on_device = torch.zeros(max(torch.Size(shape).numel() for shape in expected_shapes(LARGE).values()))

    def load(source: WeightSource) -> None:
        for name, shape in expected_shapes(LARGE).items():
            source.copy_into(name, on_device[: torch.Size(shape).numel()].view(shape))

    load(DummySource(LARGE))  # whatever torch takes for itself at the first copy
    before = anonymous_bytes()
    files = DiskSource(large, LARGE) if kind is HostCopy.NONE else SafetensorsSource(large, LARGE)
    host = keep_host_copy(kind, files, weight_units(LARGE, "float32"))
    for _ in range(2):
        load(host.source)
    taken = anonymous_bytes() - before
    if kind is HostCopy.PINNED:
        assert host.num_bytes >= LARGE_BYTES and taken > 0.9 * LARGE_BYTES
    else:
        assert host.num_bytes == 0 and taken < 0.1 * LARGE_BYTES
    assert host.mapped_bytes == ((large / "model.safetensors").stat().st_size if kind is HostCopy.MAPPED else 0)
