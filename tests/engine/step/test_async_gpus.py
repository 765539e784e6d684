"""The whole engine on GPUs whose work waits in streams, and comes in another order every time."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from fake_timeline import TIMELINE
from test_cuda_engine import generate, serving, tokens_through

from kunserve.engine.step.cuda_executor import CudaExecutor
from kunserve.gpu.cuda.driver import Graph

TOPOLOGIES = {"one GPU": ((0, 0), ()), "peers": ((0, 1), (0, 1)), "through the host": ((0, 1), ())}
pytestmark = pytest.mark.usefixtures("kernels")


def drivers_of(topology: str) -> list[FakeCuda]:
    ordinals, reachable = TOPOLOGIES[topology]
    return [FakeCuda(ordinal, reachable=reachable, is_async=True) for ordinal in ordinals]


_expected: list[tuple[int, ...]] = []  # of GPUs that do at once what they are told, once it was seen


@pytest.mark.parametrize("seed", range(int(os.environ.get("KUNSERVE_FAKE_GPU_ORDERS", "1"))))
@pytest.mark.parametrize("topology", TOPOLOGIES)
async def test_same_tokens_in_any_order_of_the_streams(topology: str, seed: int) -> None:
    if not _expected:
        async with serving([FakeCuda(), FakeCuda()], num_ahead=0) as engine:
            _expected.extend(await tokens_through(engine, regroup=False))
    TIMELINE.begin(seed)
    drivers = drivers_of(topology)
    async with serving(drivers) as engine:
        assert await tokens_through(engine, regroup=True) == _expected
        outcomes = [(t["kind"], t["outcome"]) for t in engine.state()["transitions"]]
        assert outcomes == [("drop", "done"), ("restore", "done"), ("drop", "done")]
        assert isinstance(engine.executor, CudaExecutor)
        graphs = [decoder.graphs for decoder in engine.executor.decoders]
        assert all(g is not None and g.num_replays for g in graphs)
    assert all(driver.is_clean() for driver in drivers)
    legacy = {TIMELINE.legacy(ordinal) for ordinal in (0, 1)}
    assert not legacy & {stream for copy in TIMELINE.copies for stream in copy}  # all would stand in one queue


async def test_nothing_is_collected_while_graphs_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pinned buffer in a cycle, of a device that has had the same stream, would put an event into the capture."""
    capture = FakeCuda.capture

    def with_garbage(self: FakeCuda, work: Callable[[], None]) -> Graph:
        there, held = torch.zeros(8, device=self.torch_device), list[Any]()
        host = self.pinned(32).view(torch.float32)
        host.copy_(there, non_blocking=True)
        self.synchronize(self.current_stream())
        held += [held, host]  # garbage, when this function has returned, or as good as
        del host

        def work_and_litter() -> None:
            held.clear() if gc.isenabled() else None
            work()

        return capture(self, work_and_litter)

    monkeypatch.setattr(FakeCuda, "capture", with_garbage)
    async with serving(drivers_of("one GPU")) as engine:
        assert len(await generate(engine, 1, 5)) == 5
    assert gc.isenabled()
