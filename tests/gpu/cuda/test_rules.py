"""What CUDA and torch do to streams, captures and memory, as the fake has it; and what once went against it.

The orders of calls in "as it was" tests are those that the engine had before: each would have ended the first run on a
GPU, or a step at random, and the fake says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import GRANULARITY, FakeCuda
from fake_gpu_tensors import launch, on_gpu
from fake_pieces import RuleBrokenError
from fake_timeline import TIMELINE, take_broken

from kunserve.errors import DeviceError
from kunserve.gpu.cuda.device import CudaDevice

# --- lifetimes ------------------------------------------------------------------------------------------------------


def test_as_it_was_a_pinned_buffer_outlived_its_stream(driver: FakeCuda) -> None:
    """Devices were closed while decoders, with their staged arrays, were still at hand."""
    stream = driver.take_stream()
    with driver.on(stream):
        staged, device = driver.pinned(32), on_gpu()
        device.copy_(staged.view(torch.float32), non_blocking=True)
    driver.synchronize(stream)
    driver.destroy(stream)
    assert not take_broken()
    del staged
    assert take_broken() == f"stream {stream} was destroyed before a pinned buffer that it has copied"


def test_streams_outlive_their_devices() -> None:
    driver = FakeCuda(is_async=True)
    device = CudaDevice(driver, "cuda:0", 1, GRANULARITY)
    with device.computing():
        staged, there = driver.pinned(32), on_gpu()
        there.copy_(staged.view(torch.float32), non_blocking=True)
    streams = {queue.stream for queue in device.queues}
    device.close()
    del staged
    again = CudaDevice(FakeCuda(is_async=True), "cuda:0", 1, GRANULARITY)
    assert {queue.stream for queue in again.queues} == streams
    again.close()


def test_memory_is_kept_until_another_stream_has_read_it(driver: FakeCuda) -> None:
    first, second, kept = driver.take_stream(), driver.take_stream(), list[torch.Tensor]()
    for is_kept in (True, False):
        with driver.on(first):
            x = on_gpu(3.0)
        made = driver.record(first)
        driver.wait(second, made)
        with driver.on(second):
            y = x + 1
            if is_kept:
                kept.append(x)
        del x
        driver.synchronize(second)
        assert y.tolist()[0] == 4
        assert bool(take_broken()) != is_kept


# --- captures -------------------------------------------------------------------------------------------------------


def test_as_it_was_a_pinned_buffer_was_freed_by_another_thread_during_a_capture(driver: FakeCuda) -> None:
    """Graphs were captured while serving; the tokens of a step before, on the host, were let go of meanwhile."""
    stream, held = driver.take_stream(), []
    with driver.on(stream):
        x, tokens = on_gpu(), driver.pinned(32)
        tokens.view(torch.float32).copy_(x, non_blocking=True)
        driver.synchronize(stream)
        held.append(tokens)
        del tokens

        def work() -> None:
            x.add_(1)
            event_loop = threading.Thread(target=held.clear)
            event_loop.start()
            event_loop.join()
            x.add_(1)

        driver.capture(work)
    with pytest.raises(RuntimeError, match="event last recorded in a capturing stream"):
        driver.pinned(8)  # the next step's, in whatever thread
    assert "event last recorded in a capturing stream" in take_broken()


def test_a_graph_does_again_what_was_captured_and_nothing_at_once(driver: FakeCuda) -> None:
    stream = driver.take_stream()
    with driver.on(stream):
        x = on_gpu(0.0)

        def work() -> None:
            for _ in range(3):
                x.add_(1)

        graph = driver.capture(work)
        for i in range(3):
            assert x.tolist() == [3.0 * i] * 8
            graph.replay()


@pytest.mark.parametrize("call", ["item", "synchronize", "pageable", "elsewhere", "again", "legacy", "outside"])
def test_what_no_thread_may_do_while_it_captures(driver: FakeCuda, call: str) -> None:
    stream, other = driver.take_stream(), driver.take_stream()
    with driver.on(stream):
        x, host = on_gpu(), torch.ones(8)
        forbidden: dict[str, Callable[[], Any]] = {
            "item": lambda: x.sum().item(),
            "synchronize": lambda: driver.synchronize(other),
            "pageable": lambda: x.copy_(host, non_blocking=True),
            "elsewhere": lambda: driver.record(other),
            "again": lambda: driver.capture(lambda: None),
            "legacy": lambda: driver.record(TIMELINE.legacy(0)),
            "outside": lambda: driver.wait(stream, before),
        }
        before = driver.record(stream)
        with pytest.raises(RuleBrokenError, match=r"while it captures|is not what this thread captures|may not wait"):
            driver.capture(forbidden[call])


def test_what_other_threads_may_not_do_to_a_stream_that_is_captured(driver: FakeCuda) -> None:
    stream, errors = driver.take_stream(), list[BaseException]()

    def attempt(call: object) -> None:
        try:
            call()  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    def work() -> None:
        event = driver.record(stream)
        calls = (lambda: driver.synchronize_event(event), lambda: driver.record(stream))
        threads = [threading.Thread(target=attempt, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with driver.on(stream):
        driver.capture(work)
    assert sorted(map(type, errors), key=str) == sorted([DeviceError, RuleBrokenError], key=str)


def test_no_stream_joins_a_capture(driver: FakeCuda) -> None:
    """Which it would, if it waited for an event that was captured; from then on its work would be in the graph."""
    stream, other, events = driver.take_stream(), driver.take_stream(), list[Any]()
    with driver.on(stream):
        driver.capture(lambda: events.append(driver.record(stream)))
        with pytest.raises(RuleBrokenError, match="may not wait for each other"):
            driver.wait(other, events[0])


def test_nobody_uses_the_default_stream_during_a_capture(driver: FakeCuda) -> None:
    """Also not another thread: were the stream one that the default stream waits for, both would fail."""
    stream, errors = driver.take_stream(), list[str]()

    def work() -> None:
        def make() -> None:
            try:
                on_gpu()
            except RuleBrokenError as error:
                errors.append(str(error))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()

    with driver.on(stream):
        driver.capture(work)
    assert errors == ["the default stream was used while a stream of its GPU was captured"]
    assert take_broken() == errors[0]
    with pytest.raises(RuleBrokenError, match="the default stream cannot be captured"):
        driver.capture(lambda: None)


def test_a_graph_needs_the_memory_that_it_was_captured_with(driver: FakeCuda) -> None:
    with driver.on(driver.take_stream()):
        x, y = on_gpu(), on_gpu()
        held = [x]
        del x

        def work() -> None:
            y.add_(held[0])

        graph = driver.capture(work)
        held.clear()
        with pytest.raises(RuleBrokenError, match="memory that was freed"):
            graph.replay()
    assert "freed" in take_broken()


# --- whose ----------------------------------------------------------------------------------------------------------


def test_kernels_are_launched_where_their_gpu_is_current() -> None:
    here, there = FakeCuda(0, is_async=True), FakeCuda(1, is_async=True)
    stream, other = here.take_stream(), there.take_stream()
    x = torch.zeros(4, device="gpu:1")
    there.synchronize_all()
    with there.on(other), here.on(stream), pytest.raises(RuleBrokenError, match="while GPU 0 is current"):
        launch(lambda x: x.add_(1), [], [x])
    with here.on(stream), there.on(other):
        launch(lambda x: x.add_(1), [], [x])
        assert x.tolist() == [1.0] * 4
    for driver, mine in ((here, stream), (there, other)):
        driver.return_stream(mine)


def test_a_call_of_another_gpus_driver_makes_that_one_current() -> None:
    """Between what is launched on a GPU nobody may ask another one's driver for anything: contexts are threads'."""
    here, there = FakeCuda(0, is_async=True), FakeCuda(1, is_async=True)
    stream, other = here.take_stream(), there.take_stream()
    with here.on(stream):
        x = torch.zeros(4, device="gpu:0")
        launch(lambda x: x.add_(1), [], [x])
        there.synchronize(other)
        with pytest.raises(RuleBrokenError, match="while GPU 1 is current"):
            launch(lambda x: x.add_(1), [], [x])
        with pytest.raises(RuleBrokenError, match="captures on the GPU that is current"):
            here.capture(lambda: None)
        here.synchronize_event(here.record(stream))
        launch(lambda x: x.add_(1), [], [x])
        assert x.tolist() == [2.0] * 4
    for driver, mine in ((here, stream), (there, other)):
        driver.return_stream(mine)


def test_mapped_memory_is_its_own_gpus() -> None:
    here, there = FakeCuda(0, reachable=[1], is_async=True), FakeCuda(1, reachable=[0], is_async=True)
    devices = [CudaDevice(driver, f"cuda:{i}", 1, GRANULARITY) for i, driver in enumerate((here, there))]
    addresses = [device.reserve(GRANULARITY) for device in devices]
    for device, address in zip(devices, addresses, strict=True):
        device.map(address, [0])
    a, b = (device.tensor(address, GRANULARITY) for device, address in zip(devices, addresses, strict=True))
    with pytest.raises(RuleBrokenError, match="GPU 0 has no access to what is mapped on GPU 1"):
        b.copy_(a)
    for driver in (here, there):
        driver.synchronize_all()
    for device in devices:
        device.close()
