"""What `CudaDriver` asks of cuda-bindings: in which context, and never to destroy a stream."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kunserve.errors import ConfigError
from kunserve.gpu.cuda import driver as module
from kunserve.gpu.cuda.driver import CudaDriver

NEED_NO_CONTEXT = {
    "cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease", "cuCtxSetCurrent", "cuDeviceCanAccessPeer",
}  # fmt: skip


class Bindings:
    """cuda.bindings.driver of two GPUs, whose contexts are current in threads, as CUDA's are."""

    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED=1)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUmemAllocationProp = CUmemLocation = CUmemAccessDesc = SimpleNamespace
    CU_MEMHOSTREGISTER_PORTABLE = 1

    def __init__(self) -> None:
        self.called, self.wrong = Counter[tuple[str, Any]](), list[str]()
        self.arguments: dict[str, tuple[Any, ...]] = {}
        self._current, self._handles = threading.local(), itertools.count(100)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            if name == "cuCtxSetCurrent":
                self._current.context = arguments[0]
            context = getattr(self._current, "context", None)
            if name not in NEED_NO_CONTEXT and context is None:
                self.wrong.append(name)
            self.called[name, context] += 1
            self.arguments[name] = arguments
            values: dict[str, tuple[Any, ...]] = {
                "cuDeviceGetCount": (2,), "cuDeviceGet": arguments[:1], "cuDeviceGetAttribute": (1,),
                "cuDevicePrimaryCtxRetain": (f"context of {arguments[0]}",) if arguments else (),
                "cuMemGetAllocationGranularity": (2 << 20,), "cuStreamCreate": (next(self._handles),),
                "cuMemCreate": (next(self._handles),), "cuMemAddressReserve": (next(self._handles),),
                "cuMemGetInfo": (1, 2),
            }  # fmt: skip
            return (SimpleNamespace(value=0, name="CUDA_SUCCESS"), *values.get(name, ()))

        return call


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bindings]:
    properties = SimpleNamespace(name="a GPU", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    module.idle_streams.clear()
    bindings = Bindings()
    yield bindings
    module.idle_streams.clear()
    assert not bindings.wrong


def test_streams_are_taken_again_on_their_gpu_and_never_destroyed(bindings: Bindings) -> None:
    first, same_gpu, other_gpu = (CudaDriver(ordinal, bindings) for ordinal in (0, 0, 1))
    streams = {first.take_stream() for _ in range(3)}
    assert len(streams) == 3
    for stream in streams:
        first.return_stream(stream)
    first.close()
    assert other_gpu.take_stream() not in streams
    assert {same_gpu.take_stream() for _ in range(3)} == streams
    assert same_gpu.take_stream() not in streams
    assert bindings.called["cuStreamCreate", "context of 0"] == 4
    assert bindings.arguments["cuStreamCreate"] == (Bindings.CUstream_flags.CU_STREAM_NON_BLOCKING,)
    assert not any(name == "cuStreamDestroy" for name, _ in bindings.called)


def test_every_call_is_made_in_its_gpus_context_whatever_thread_makes_it(bindings: Bindings) -> None:
    drivers = [CudaDriver(ordinal, bindings) for ordinal in (0, 1)]

    def call_all(driver: CudaDriver) -> None:
        handle, address = driver.create(2 << 20), driver.reserve(4 << 20)
        driver.map(address, 2 << 20, handle)
        driver.set_access(address, 2 << 20)
        driver.unmap(address, 2 << 20)
        driver.release(handle)
        driver.free(address, 4 << 20)
        driver.synchronize(driver.take_stream())
        driver.pin(4096, 64)
        driver.unpin(4096)
        driver.memory()

    with ThreadPoolExecutor(2) as threads:  # each thread comes to both GPUs
        for _ in range(8):
            list(threads.map(call_all, drivers))
    for name in ("cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemUnmap", "cuStreamSynchronize", "cuMemHostRegister"):
        assert {context: bindings.called[name, context] for context in ("context of 0", "context of 1")} == {
            "context of 0": 8, "context of 1": 8,
        }  # fmt: skip
    _, _, descriptors, count = bindings.arguments["cuMemSetAccess"]
    assert count == len(descriptors) == 1  # the GPU's own, and no other's page tables


class TorchStreams:
    """torch's streams of two GPUs, one of which is current; where nothing else is said they are of that one."""

    def __init__(self) -> None:
        self.current, self.made = torch.device("cuda", 0), list[Any]()
        self.recorded = list[Any]()  # streams that events were recorded on, or wait for one, or that hold memory

    def external(self, stream: int, device: torch.device | None = None) -> Any:
        made = SimpleNamespace(cuda_stream=stream, device=device or self.current)
        made.wait_event = lambda _: self.recorded.append(made)
        self.made.append(made)
        return made

    def event(self, *, enable_timing: bool, blocking: bool) -> Any:
        assert blocking  # others spin
        return SimpleNamespace(record=self.recorded.append, is_timed=enable_timing, elapsed_time=lambda last: 2.5)

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.device
        yield
        self.current = before


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> TorchStreams:
    streams = TorchStreams()
    monkeypatch.setattr(torch.cuda, "ExternalStream", streams.external)
    monkeypatch.setattr(torch.cuda, "stream", streams.on)
    monkeypatch.setattr(torch.cuda, "Event", streams.event)
    return streams


def test_a_gpu_is_current_where_its_stream_is_and_torch_knows_a_stream_by_one_object(
    bindings: Bindings, streams: TorchStreams
) -> None:
    """Triton launches on the GPU that is current; and to make torch's object takes longer than a launch."""
    drivers = [CudaDriver(ordinal, bindings) for ordinal in (0, 1)]
    taken = [(driver, driver.take_stream()) for driver in drivers for _ in range(2)]
    for _ in range(3):
        for driver, stream in taken:
            with driver.on(stream):
                assert streams.current == driver.torch_device
                driver.wait(stream, driver.record(stream))
        with drivers[1].on(taken[2][1]), drivers[0].on(taken[0][1]):
            assert streams.current == drivers[0].torch_device
        assert streams.current == drivers[0].torch_device
    assert [(one.cuda_stream, one.device) for one in streams.made] == [(s, d.torch_device) for d, s in taken]
    assert len(streams.recorded) == 3 * 2 * 4 and set(map(id, streams.recorded)) == set(map(id, streams.made))


def test_only_events_that_are_asked_for_the_time_keep_it(bindings: Bindings, streams: TorchStreams) -> None:
    driver = CudaDriver(0, bindings)
    stream = driver.take_stream()
    assert not driver.record(stream).is_timed
    first, last = (driver.record(stream, is_timed=True) for _ in range(2))
    assert first.is_timed and last.is_timed
    assert driver.seconds(first, last) == pytest.approx(0.0025)  # torch counts milliseconds


@pytest.mark.parametrize(
    ("cuda", "version", "message"),
    [
        (None, (0, 13000), r"cannot use CUDA; install a CUDA build of torch$"),
        ("13.0", (0, 12040), r"is for CUDA 13\.0 and finds no GPU, the NVIDIA driver for CUDA up to 12\.4; update"),
        ("13.0", (999, 0), r"the NVIDIA driver for CUDA up to another version; update"),
    ],
)
def test_who_is_to_blame_where_torch_finds_no_gpu(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, version: tuple[int, int], message: str
) -> None:
    """A driver that is too old starts, and so does any beside a torch that was built without CUDA."""
    result, number = version
    bindings = SimpleNamespace(
        cuInit=lambda _: (SimpleNamespace(value=0),),
        cuDriverGetVersion=lambda: (SimpleNamespace(value=result), number),
    )
    monkeypatch.setattr("importlib.import_module", lambda _: bindings)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ConfigError, match=message):
        module.load_bindings()
