"""CUDA devices against a driver that keeps CUDA's rules: call sequences, sizes, errors, completion.

What every device promises is in device_contract.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_cuda import GRANULARITY, FakeCuda
from fake_pieces import RuleBrokenError

from kunserve.errors import ConfigError, DeviceError, DeviceLostError
from kunserve.gpu.cuda.device import (
    CudaDevice,
    open_cuda_devices,
)
from kunserve.gpu.cuda.stream import StreamQueue
from kunserve.gpu.device import Device
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.kv_memory import KVShape
from kunserve.model.checkpoint import DummySource
from kunserve.model.config import ModelConfig
from kunserve.model.layout import weight_units

CHUNK = 3 * GRANULARITY  # no power of two, as in life
TINY = ModelConfig("llama", 64, 16, 32, 2, 2, 1, 8, 64)


@pytest.fixture
def driver() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def device(driver: FakeCuda) -> Iterator[CudaDevice]:
    opened: Device = CudaDevice(driver, "cuda:0", 8, CHUNK)
    assert isinstance(opened, CudaDevice)
    yield opened
    opened.close()
    assert driver.is_clean()


def names(driver: FakeCuda) -> list[str]:
    return [entry[0] for entry in driver.log]


# --- memory ---------------------------------------------------------------------------------------------------------


def test_chunks_are_created_once_and_a_remap_creates_nothing(device: CudaDevice, driver: FakeCuda) -> None:
    assert names(driver) == ["create"] * 8
    address = device.reserve(8 * CHUNK)
    device.map(address, [4, 5, 6])
    device.unmap(address, 3)
    assert driver.calls["create"] == 8 and driver.calls["release"] == 0


def test_one_access_call_and_one_unmap_call_per_run(device: CudaDevice, driver: FakeCuda) -> None:
    address = device.reserve(8 * CHUNK)
    driver.log.clear()
    device.map(address, [5, 0, 3, 1])  # any chunks: neighbours in address, not in memory
    assert names(driver) == ["map"] * 4 + ["set_access"]
    assert driver.log[-1] == ("set_access", address, 4 * CHUNK)
    driver.log.clear()
    device.unmap(address + CHUNK, 3)
    assert driver.log == [("unmap", address + CHUNK, 3 * CHUNK)]
    driver.log.clear()
    device.map(address + CHUNK, [])
    device.unmap(address, 0)
    assert driver.log == []


def test_release_unmaps_run_by_run(device: CudaDevice, driver: FakeCuda) -> None:
    address, other = device.reserve(8 * CHUNK), device.reserve(CHUNK)
    device.map(address, [0, 1])
    device.map(address + 5 * CHUNK, [2])
    device.map(other, [3])
    driver.log.clear()
    device.release(address, 8 * CHUNK)
    assert names(driver) == ["unmap", "unmap", "free"]
    with pytest.raises(DeviceError):
        device.unmap(address, 1)
    device.unmap(other, 1)


@pytest.mark.parametrize(("call", "nth"), [("map", 1), ("map", 3), ("set_access", 1)])
def test_a_failed_map_changes_nothing(device: CudaDevice, driver: FakeCuda, call: str, nth: int) -> None:
    address = device.reserve(8 * CHUNK)
    driver.fail_at[call] = nth
    with pytest.raises(DeviceError, match="CUDA_ERROR_UNKNOWN"):
        device.map(address, [0, 1, 2, 3])
    device.map(address, [0, 1, 2, 3])  # would break a rule if anything was left mapped
    device.tensor(address, 4 * CHUNK).fill_(7)


def test_close_gives_everything_back_whatever_is_mapped(driver: FakeCuda) -> None:
    device = CudaDevice(driver, "cuda:0", 4, CHUNK)
    address = device.reserve(4 * CHUNK)
    device.map(address, [3, 1])
    device.close()
    device.close()
    assert driver.is_clean()


def test_runs_are_unmapped_chunk_by_chunk_where_the_driver_refuses_them() -> None:
    driver = FakeCuda(unmaps_runs=False)
    device = CudaDevice(driver, "cuda:0", 6, CHUNK)
    address = device.reserve(6 * CHUNK)
    for _ in range(2):
        device.map(address, [4, 0, 2, 5])
        driver.log.clear()
        device.unmap(address + CHUNK, 3)
        device.unmap(address, 1)
        assert driver.log[-4:] == [("unmap", address + i * CHUNK, CHUNK) for i in (1, 2, 3, 0)]
    assert len(driver.log) == 4  # the second time it is not even asked
    device.map(address, [4, 0, 2, 5])
    device.close()
    assert driver.is_clean()


def test_too_little_memory_names_the_figures_and_keeps_nothing() -> None:
    driver = FakeCuda(total_bytes=5 * CHUNK)
    with pytest.raises(ConfigError) as error:
        CudaDevice(driver, "cuda:0.1", 8, CHUNK)
    assert error.value.message == (
        "cuda:0.1: too little memory: 48 MiB wanted, 30 MiB created, 0 MiB of 30 MiB are free now "
        "(cuda:0: cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY)"
    )
    assert driver.is_clean()


def test_chunks_are_multiples_of_the_granularity(driver: FakeCuda) -> None:
    with pytest.raises(ConfigError, match="no multiple of 2097152"):
        CudaDevice(driver, "cuda:0", 2, GRANULARITY + 4096)


def test_the_memory_flow_runs_on_it(device: CudaDevice) -> None:
    units = weight_units(TINY, "float32")
    memory = DeviceMemory(device, units, TINY.num_layers, KVShape.of(TINY, 4, torch.float32))
    memory.weights.map("layers.1")
    memory.weights.fill("layers.1", DummySource(TINY))
    name = "model.layers.1.mlp.down_proj.weight"
    view, before = memory.weights.tensor("layers.1", name), memory.weights.tensor("layers.1", name).clone()
    memory.kv.resize(0, 3)
    memory.weights.drop("layers.1")
    memory.kv.resize(0, 7)
    memory.check()
    memory.kv.resize(0, 1)
    memory.weights.map("layers.1")
    memory.weights.fill("layers.1", DummySource(TINY))
    assert torch.equal(view, before)  # the same view, at the same address
    memory.check()


# --- the rules that the fake keeps ----------------------------------------------------------------------------------


def broken(driver: FakeCuda, wrong: Callable[[], Any], rule: str) -> None:
    with pytest.raises(RuleBrokenError, match=rule):
        wrong()


def test_the_fake_keeps_the_rules(driver: FakeCuda) -> None:
    size = GRANULARITY
    broken(driver, lambda: driver.create(size + 1), "granularity")
    broken(driver, lambda: driver.reserve(size // 2), "granularity")
    a, b = driver.create(size), driver.create(size)
    address = driver.reserve(3 * size)
    broken(driver, lambda: driver.map(address + 1, size, a), "aligned")
    broken(driver, lambda: driver.map(address + 3 * size, size, a), "reserved range")
    broken(driver, lambda: driver.map(address, 2 * size, a), "not all of it")
    broken(driver, lambda: driver.set_access(address, size), "mapped")
    broken(driver, lambda: driver.unmap(address, size), "whole mappings")
    driver.map(address, size, a)
    assert not driver.is_usable(address)  # not yet usable
    broken(driver, lambda: driver.map(address, size, b), "something is mapped")
    broken(driver, lambda: driver.map(address + size, size, a), "elsewhere")
    broken(driver, lambda: driver.set_access(address, 2 * size), "not all")
    driver.map(address + size, size, b)
    driver.set_access(address, 2 * size)
    broken(driver, lambda: driver.release(a), "mapped")
    broken(driver, lambda: driver.free(address, 3 * size), "mapped")
    broken(driver, lambda: driver.free(address, size), "reserved")
    broken(driver, lambda: driver.unmap(address, size // 2), "whole mappings")
    stream = driver.take_stream()
    driver.submit(stream)
    broken(driver, lambda: driver.unmap(address, 2 * size), "not finished")
    broken(driver, lambda: driver.map(address + 2 * size, size, a), "not finished")
    driver.complete(stream)
    driver.unmap(address, 2 * size)
    driver.free(address, 3 * size)
    driver.release(a)
    broken(driver, lambda: driver.release(a), "no such handle")


# --- streams --------------------------------------------------------------------------------------------------------


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks and threads go on until something holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


def compute_stream(device: CudaDevice) -> int:
    return device.compute.stream


async def test_run_returns_when_the_device_is_done_and_launches_go_on(device: CudaDevice, driver: FakeCuda) -> None:
    stream, launched = compute_stream(device), []

    def work(i: int) -> int:
        driver.submit(stream)
        launched.append(i)
        return i

    steps = [asyncio.ensure_future(device.run(lambda i=i: work(i))) for i in range(3)]  # type: ignore[misc]
    await until(lambda: len(launched) == 3)
    assert not any(step.done() for step in steps)  # all are launched, and none has finished
    driver.complete(stream)
    assert await steps[0] == 0
    assert not steps[1].done()
    driver.complete(stream, 2)
    assert await asyncio.gather(*steps[1:]) == [1, 2]


async def test_launch_returns_at_once_and_finish_waits(device: CudaDevice, driver: FakeCuda) -> None:
    stream = compute_stream(device)

    def work() -> str:
        driver.submit(stream)
        return "x"

    launched = await device.launch(work)
    assert launched.value == "x"
    finish = asyncio.ensure_future(device.finish(launched))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not finish.done()
    driver.complete(stream)
    assert await finish == "x"


async def test_work_on_another_stream_waits_for_its_event(driver: FakeCuda) -> None:
    first, second = StreamQueue(driver, "a"), StreamQueue(driver, "b")
    x = await first.launch(lambda: driver.submit(first.stream))
    await second.launch(lambda: driver.submit(second.stream), after=[x])
    with pytest.raises(RuleBrokenError, match="before the event"):
        driver.complete(second.stream)
    driver.complete(first.stream)
    driver.complete(second.stream)
    first.close()
    second.close()


async def test_a_remap_waits_for_the_streams_and_holds_launches_back(device: CudaDevice, driver: FakeCuda) -> None:
    stream, address = compute_stream(device), device.reserve(CHUNK)
    running = await device.launch(lambda: driver.submit(stream))
    remap = asyncio.ensure_future(asyncio.to_thread(device.map, address, [0]))
    await until(lambda: driver.calls["synchronize"] > 0)
    later = asyncio.ensure_future(device.launch(lambda: names(driver).count("set_access")))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not remap.done() and not later.done() and driver.calls["map"] == 0
    driver.complete(stream)
    await remap
    assert (await later).value == 1  # launched only after the remap was complete
    await device.finish(running)


async def test_a_cancelled_caller_waits_for_its_work(device: CudaDevice, driver: FakeCuda) -> None:
    stream = compute_stream(device)
    step = asyncio.ensure_future(device.run(lambda: driver.submit(stream)))
    await until(lambda: driver.submitted(stream) == 1)
    step.cancel()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not step.done()
    driver.complete(stream)
    with pytest.raises(asyncio.CancelledError):
        await step


async def test_a_kernel_that_faults_is_an_error_with_cudas_name(driver: FakeCuda) -> None:
    device = CudaDevice(driver, "cuda:0", 1, CHUNK)
    step = asyncio.ensure_future(device.run(lambda: driver.submit(compute_stream(device))))
    await until(lambda: driver.submitted(compute_stream(device)) == 1)
    driver.fail("CUDA_ERROR_ILLEGAL_ADDRESS")
    with pytest.raises(DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        await step
    device.close()  # nothing hangs, although every wait fails now
    assert not driver.is_open


async def test_an_error_comes_out_where_it_belongs_when_nothing_runs_on(device: CudaDevice, driver: FakeCuda) -> None:
    stream = compute_stream(device)

    def work(fails: bool) -> str:
        driver.submit(stream)
        if fails:
            raise ZeroDivisionError
        return "done"

    steps = [asyncio.ensure_future(device.run(lambda i=i: work(i == 1))) for i in range(3)]  # type: ignore[misc]
    await until(lambda: driver.calls["synchronize"] == 1)  # the second waits for what it has launched itself
    driver.complete(stream)
    assert await steps[0] == "done" and not steps[1].done()
    driver.complete(stream)
    with pytest.raises(ZeroDivisionError):
        await steps[1]
    await until(lambda: driver.submitted(stream) == 3)
    driver.complete(stream)
    assert await steps[2] == "done"


async def test_a_fault_on_one_gpu_is_no_fault_on_another() -> None:
    drivers = [FakeCuda(0), FakeCuda(1)]
    devices = open_cuda_devices(drivers, 1, CHUNK)

    def work(i: int) -> int:
        drivers[i].submit(compute_stream(devices[i]))
        return i

    steps = [asyncio.ensure_future(devices[i].run(lambda i=i: work(i))) for i in range(2)]  # type: ignore[misc]
    await until(lambda: all(d.submitted(compute_stream(devices[i])) for i, d in enumerate(drivers)))
    drivers[0].fail("CUDA_ERROR_LAUNCH_FAILED")
    with pytest.raises(DeviceLostError, match=r"cuda:0: .*CUDA_ERROR_LAUNCH_FAILED"):
        await steps[0]
    assert not steps[1].done()
    drivers[1].complete(compute_stream(devices[1]))
    assert await steps[1] == 1
    for device in devices:
        device.close()


@pytest.mark.parametrize("refusal", [torch.OutOfMemoryError, torch.AcceleratorError])
async def test_what_cuda_refuses_torch_is_a_device_error(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch, refusal: type[RuntimeError]
) -> None:
    def refuse(_: Any) -> None:
        raise refusal("CUDA out of memory.\nMany more lines.")

    monkeypatch.setattr("kunserve.gpu.cuda.device.copy_blocks", refuse)
    for is_to_host in (True, False):
        with pytest.raises(DeviceError, match=r"^cuda:0: a copy failed: CUDA out of memory\.$"):
            await device.copy([], is_to_host=is_to_host)
