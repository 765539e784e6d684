"""A machine with GPUs that are not there: `--devices cuda` launches on them, from the flags to tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from fake_cuda import GRANULARITY, FakeCuda
from fake_kernels import LaunchedAttention, LaunchedKernels
from fake_timeline import TIMELINE

from kunserve.compute.cuda import decoder
from kunserve.compute.cuda.arrays import StepBuffers
from kunserve.engine.survive import health
from kunserve.gpu.cuda import device as cuda
from kunserve.gpu.kv_memory import KVShape
from kunserve.model.config import ModelConfig

MIB = 1 << 20
ACTIVATIONS = 5 * MIB  # what torch says that a step has taken


@dataclass(slots=True)
class Gpus:
    """GPUs of 1 GiB, and every driver that was opened."""

    count: int = 1
    are_peers: bool = False
    are_async: bool = False
    granularity: int = GRANULARITY
    opened: list[FakeCuda] = field(default_factory=list)

    def open_driver(self, ordinal: int, _: Any) -> FakeCuda:
        reachable = range(self.count) if self.are_peers else ()
        self.opened.append(
            FakeCuda(ordinal, reachable=reachable, is_async=self.are_async, granularity=self.granularity)
        )
        return self.opened[-1]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    """One GPU, unless a test says more. All drivers must be closed, and nothing of theirs left, in the end."""
    gpus = Gpus()
    taken = itertools.cycle([0, ACTIVATIONS])
    monkeypatch.setattr(cuda, "load_bindings", lambda: None)
    monkeypatch.setattr(cuda, "count_gpus", lambda _: gpus.count)
    monkeypatch.setattr(cuda, "CudaDriver", gpus.open_driver)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: next(taken))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    yield gpus
    assert all(driver.is_clean() for driver in gpus.opened)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and attention of GPUs whose work waits in streams: graphs hold them, as Triton's and FlashInfer's.

    Their arithmetic is the reference's, so that on a busy machine they are slow, and no suspects for it.
    """
    monkeypatch.setattr(health, "STEP_FLOOR_S", 60.0)
    monkeypatch.setattr(decoder, "load_kernels", lambda _: (LaunchedKernels(), "kernels"))

    def load_attention(config: ModelConfig, shape: KVShape, dtype: torch.dtype, buffers: StepBuffers, _: int) -> Any:
        return LaunchedAttention(shape.block_size, buffers), "attention"

    monkeypatch.setattr(decoder, "load_attention", load_attention)


@pytest.fixture(autouse=True)
def _rules_are_kept() -> Iterator[None]:
    """What could not be raised where a rule was broken is raised here."""
    TIMELINE.begin(0)
    yield
    if TIMELINE.broken:
        TIMELINE.forget_work()  # else all tests that come later fail, too
        pytest.fail("; ".join(dict.fromkeys(TIMELINE.broken)))


@pytest.fixture
def driver() -> Iterator[FakeCuda]:
    """A GPU whose work waits in streams, for tests of its rules."""
    driver = FakeCuda(is_async=True)
    yield driver
    for stream in list(driver.streams):
        driver.synchronize(stream)
        driver.return_stream(stream)
    driver.close()
