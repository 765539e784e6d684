"""The pinned host copy of the weights, read once however many ask."""

from __future__ import annotations

import ctypes
import mmap
import threading

import pytest
import torch
from fake_cuda import FakeCuda

from kunserve.errors import ConfigError
from kunserve.gpu.cuda.pinned import PinnedSource
from kunserve.gpu.host_weights import keep_host_copy
from kunserve.model.checkpoint import DummySource
from kunserve.model.config import ModelConfig
from kunserve.model.host_copy import HostCopy
from kunserve.model.layout import weight_units
from kunserve.sizes import ceil_div

TINY = ModelConfig("llama", 64, 16, 32, 2, 2, 1, 8, 64)


@pytest.fixture
def driver() -> FakeCuda:
    return FakeCuda()


class CountingSource(DummySource):
    """Dummy weights that know how often they were read."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.reads = 0

    def copy_into(self, name: str, out: torch.Tensor) -> None:
        self.reads += 1
        super().copy_into(name, out)


def test_pinned_weights_are_read_once_in_the_weights_dtype(driver: FakeCuda) -> None:
    source, units = CountingSource(), weight_units(TINY, "bfloat16")
    pinned = PinnedSource(source, units, driver)
    (address, num_bytes), name = next(iter(driver.pinned_ranges.items())), "model.layers.0.mlp.up_proj.weight"
    assert num_bytes >= sum(unit.num_bytes for unit in units) and address % 64 == 0
    expected = torch.empty(32, 16, dtype=torch.bfloat16)
    DummySource(TINY).copy_into(name, expected)
    for _ in range(3):
        out = torch.zeros(32, 16, dtype=torch.bfloat16)
        pinned.copy_into(name, out)
        assert torch.equal(out, expected)
    assert source.reads == 1
    with pytest.raises(ConfigError, match="no tensor nothing"):
        pinned.copy_into("nothing", out)
    with pytest.raises(ConfigError, match=r"has shape \[32, 16\], not \[16, 32\]"):
        pinned.copy_into(name, out.view(16, 32))
    pinned.close()
    pinned.close()
    assert not driver.pinned_ranges


def test_whoever_asks_while_a_tensor_is_read_waits_for_that_read(driver: FakeCuda) -> None:
    class SlowSource(CountingSource):
        def copy_into(self, name: str, out: torch.Tensor) -> None:
            all_ask.wait(10)
            super().copy_into(name, out)

    source, name, all_ask = SlowSource(), "model.layers.0.mlp.up_proj.weight", threading.Event()
    pinned = PinnedSource(source, weight_units(TINY, "float32"), driver)
    outs = [torch.zeros(32, 16) for _ in range(4)]
    threads = [threading.Thread(target=pinned.copy_into, args=(name, out)) for out in outs]
    for thread in threads:
        thread.start()
    all_ask.set()
    for thread in threads:
        thread.join()
    assert source.reads == 1 and outs[0].count_nonzero() and all(torch.equal(out, outs[0]) for out in outs)
    pinned.close()


def test_memory_is_there_before_it_is_pinned(driver: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the driver, on one core, faults in page after page."""
    page, libc, shares = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True), list[float]()

    def pin(address: int, num_bytes: int) -> None:
        start = address // page * page
        pages = (ctypes.c_ubyte * ceil_div(address + num_bytes - start, page))()
        assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(address + num_bytes - start), pages) == 0
        shares.append(sum(p & 1 for p in pages) / len(pages))

    monkeypatch.setattr(driver, "pin", pin)
    monkeypatch.setattr(driver, "unpin", lambda address: None)
    large = ModelConfig("llama", 20_000, 256, 32, 2, 2, 1, 128, 64)  # 40 MB: fresh from the system
    PinnedSource(DummySource(large), weight_units(large, "float32"), driver).close()
    assert shares == [1.0]


def test_memory_that_cannot_be_pinned_says_what_to_do(driver: FakeCuda) -> None:
    driver.fail_at["pin"] = 1
    source, units = DummySource(TINY), weight_units(TINY, "float32")
    with pytest.raises(ConfigError, match=r"cannot pin 0 MiB .*CUDA_ERROR_UNKNOWN.*start with --host-copy mapped$"):
        keep_host_copy(HostCopy.PINNED, source, units, driver)
