"""A machine with GPUs that are not there: `--devices cuda` launches on them, from the flags to tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda

from kunserve.gpu.cuda import device as cuda

MIB = 1 << 20
ACTIVATIONS = 5 * MIB  # what torch says that a step has taken


@dataclass(slots=True)
class Gpus:
    """GPUs of 1 GiB, and every driver that was opened."""

    count: int = 1
    are_peers: bool = False
    opened: list[FakeCuda] = field(default_factory=list)

    def open_driver(self, ordinal: int, _: Any) -> FakeCuda:
        self.opened.append(FakeCuda(ordinal, reachable=range(self.count) if self.are_peers else ()))
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
