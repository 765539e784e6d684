"""CUDA devices against a driver that keeps CUDA's rules: call sequences, sizes, errors, completion.

What every device promises is in device_contract.py.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import GRANULARITY, FakeCuda, RuleBrokenError

from kunserve.config import parse_cuda_devices
from kunserve.errors import ConfigError, DeviceError, DeviceLostError
from kunserve.gpu import cuda, cuda_driver
from kunserve.gpu.copies import BlockCopy, host_blocks, layer_copies
from kunserve.gpu.cuda import (
    CudaDevice,
    budget_bytes,
    choose_chunk_bytes,
    device_names,
    islands,
    open_cuda_devices,
    open_drivers,
)
from kunserve.gpu.cuda_copy import transfer
from kunserve.gpu.cuda_stream import StreamQueue
from kunserve.gpu.device import Device
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.host_weights import keep_host_copy
from kunserve.gpu.kv_memory import KVShape
from kunserve.gpu.pinned import PinnedSource
from kunserve.model.card import load_card
from kunserve.model.checkpoint import DummySource
from kunserve.model.config import ModelConfig
from kunserve.model.host_copy import HostCopy
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
    assert driver.log[-1] == ("set_access", address, 4 * CHUNK, (0,))
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


def test_other_gpus_get_access() -> None:
    driver = FakeCuda(reachable=[2])
    device = CudaDevice(driver, "cuda:0", 2, CHUNK, peers=[0, 2])
    address = device.reserve(CHUNK)
    device.map(address, [1])
    assert driver.reaches(address) == (0, 2)
    device.close()


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
    units = weight_units(TINY, 4)
    memory = DeviceMemory(device, units, TINY.num_layers, KVShape.of(TINY, 4, torch.float32), torch.float32)
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
    broken(driver, lambda: driver.set_access(address, size, [0]), "mapped")
    broken(driver, lambda: driver.unmap(address, size), "whole mappings")
    driver.map(address, size, a)
    assert driver.reaches(address) == ()  # not yet usable
    broken(driver, lambda: driver.map(address, size, b), "something is mapped")
    broken(driver, lambda: driver.map(address + size, size, a), "elsewhere")
    broken(driver, lambda: driver.set_access(address, 2 * size, [0]), "not all")
    broken(driver, lambda: driver.set_access(address, size, [0, 1]), "does not reach")
    broken(driver, lambda: driver.set_access(address, size, []), "without the GPU")
    driver.map(address + size, size, b)
    driver.set_access(address, 2 * size, [0])
    broken(driver, lambda: driver.release(a), "mapped")
    broken(driver, lambda: driver.free(address, 3 * size), "mapped")
    broken(driver, lambda: driver.free(address, size), "reserved")
    broken(driver, lambda: driver.unmap(address, size // 2), "whole mappings")
    stream = driver.create_stream()
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
    return device._compute.stream


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
    await second.launch(lambda: driver.submit(second.stream), after=[x.ready])
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
    await until(lambda: driver._submitted[stream] == 1)
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
    await until(lambda: driver._submitted[compute_stream(device)] == 1)
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
    await until(lambda: driver._submitted[stream] == 3)
    driver.complete(stream)
    assert await steps[2] == "done"


async def test_a_fault_on_one_gpu_is_no_fault_on_another() -> None:
    drivers = [FakeCuda(0), FakeCuda(1)]
    devices = open_cuda_devices(drivers, 1, CHUNK)

    def work(i: int) -> int:
        drivers[i].submit(compute_stream(devices[i]))
        return i

    steps = [asyncio.ensure_future(devices[i].run(lambda i=i: work(i))) for i in range(2)]  # type: ignore[misc]
    await until(lambda: all(d._submitted[compute_stream(devices[i])] for i, d in enumerate(drivers)))
    drivers[0].fail("CUDA_ERROR_LAUNCH_FAILED")
    with pytest.raises(DeviceLostError, match=r"cuda:0: .*CUDA_ERROR_LAUNCH_FAILED"):
        await steps[0]
    assert not steps[1].done()
    drivers[1].complete(compute_stream(devices[1]))
    assert await steps[1] == 1
    for device in devices:
        device.close()


# --- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reachable", [True, False])
async def test_transfer_between_gpus(reachable: bool) -> None:
    drivers = [FakeCuda(0, reachable=[1] if reachable else []), FakeCuda(1, reachable=[0] if reachable else [])]
    source, target = open_cuda_devices(drivers, 2, CHUNK)
    addresses = [device.reserve(2 * CHUNK) for device in (source, target)]
    for device, address in zip((source, target), addresses, strict=True):
        device.map(address, [1, 0])
    src, dst = (d.tensor(address, 2 * CHUNK) for d, address in zip((source, target), addresses, strict=True))
    src.copy_(torch.arange(2 * CHUNK) % 251)
    await transfer(source, src, target, dst, slice_bytes=1_000_000)  # slices that divide nothing
    assert torch.equal(src, dst)
    assert drivers[0].reaches(addresses[0]) == ((0, 1) if reachable else (0,))
    source.close()
    target.close()
    assert all(driver.is_clean() for driver in drivers)


@pytest.mark.parametrize("kind", ["one GPU", "peers", "staged"])
async def test_blocks_are_copied_between_devices_and_to_the_host(kind: str) -> None:
    ordinals, is_peer = ((0, 0) if kind == "one GPU" else (0, 1)), kind == "peers"
    drivers = [FakeCuda(o, reachable=[0, 1] if is_peer else []) for o in ordinals]
    source, target = open_cuda_devices(drivers, 2, CHUNK)
    kv = []
    for device in (source, target):
        address = device.reserve(2 * CHUNK)
        device.map(address, [1, 0])
        kv.append(device.tensor(address, 2 * CHUNK).view(torch.float32).view(2, 32, -1))  # two layers
        kv[-1].zero_()
    kv[0].copy_(torch.arange(32)[None, :, None] + torch.tensor([0, 100])[:, None, None])
    await target.copy(layer_copies(list(kv[0]), [3, 30], list(kv[1]), [31, 2], range(2)), source)
    assert [kv[1][layer, [31, 2], -1].tolist() for layer in range(2)] == [[3, 30], [103, 130]]
    assert int(kv[1].count_nonzero()) == 4 * kv[1].shape[-1]  # nothing else was touched
    host = host_blocks(2, kv[1][1])
    await target.copy([BlockCopy(kv[1][1], [2, 31], host, range(2))], is_to_host=True)
    await target.copy([BlockCopy(host, range(2), kv[1][0], [7, 8])])
    assert kv[1][0, [7, 8], 0].tolist() == [130, 103]
    for device in (source, target):
        device.close()
    assert all(driver.is_clean() for driver in drivers)


@pytest.mark.parametrize("refusal", [torch.OutOfMemoryError, torch.AcceleratorError])
async def test_what_cuda_refuses_torch_is_a_device_error(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch, refusal: type[RuntimeError]
) -> None:
    def refuse(_: Any) -> None:
        raise refusal("CUDA out of memory.\nMany more lines.")

    monkeypatch.setattr("kunserve.gpu.cuda.copy_blocks", refuse)
    for is_to_host in (True, False):
        with pytest.raises(DeviceError, match=r"^cuda:0: a copy failed: CUDA out of memory\.$"):
            await device.copy([], is_to_host=is_to_host)


def test_host_memory_that_is_not_there_is_a_device_error() -> None:
    with pytest.raises(DeviceError, match="no host memory for 1152921504606846976 blocks of KV"):
        host_blocks(1 << 60, torch.zeros(1, 2))


async def test_staging_buffers_are_not_filled_before_they_are_empty() -> None:
    """The fake checks every wait when work completes: slices go out and in, alternately."""
    drivers = [FakeCuda(0), FakeCuda(1)]
    source, target = open_cuda_devices(drivers, 1, CHUNK)
    out, into = source.copy_out.stream, target.copy_in.stream
    waits: list[tuple[int, int]] = []
    drivers[0].wait = lambda stream, event: waits.append((0, event.stream))  # type: ignore[method-assign]
    drivers[1].wait = lambda stream, event: waits.append((1, event.stream))  # type: ignore[method-assign]
    await transfer(source, torch.ones(40), target, torch.zeros(40), slice_bytes=40)
    assert waits == [(1, out), (1, out), (0, into), (1, out), (0, into), (1, out)]
    source.close()
    target.close()


async def test_a_cancelled_caller_of_a_staged_copy_waits_for_both_devices() -> None:
    drivers = [FakeCuda(0), FakeCuda(1)]
    source, target = open_cuda_devices(drivers, 1, CHUNK)
    streams = source.copy_out.stream, target.copy_in.stream
    for driver, stream in zip(drivers, streams, strict=True):
        driver.submit(stream)
    read, write = torch.ones(40), torch.zeros(40)
    caller = asyncio.ensure_future(target.copy_tensor(read, write, source))
    await until(lambda: bool(write.all()))  # launched on both
    caller.cancel()
    drivers[0].complete(streams[0])
    await source.copy_out.run(lambda: None)  # nobody waits for the first device any more
    for _ in range(20):
        await asyncio.sleep(0)
    assert not caller.done()
    drivers[1].complete(streams[1])
    with pytest.raises(asyncio.CancelledError):
        await caller
    source.close()
    target.close()


class CountingSource(DummySource):
    """Dummy weights that know how often they were read."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.reads = 0

    def copy_into(self, name: str, out: torch.Tensor) -> None:
        self.reads += 1
        super().copy_into(name, out)


def test_pinned_weights_are_read_once_in_the_weights_dtype(driver: FakeCuda) -> None:
    source, units = CountingSource(), weight_units(TINY, 2)
    pinned = PinnedSource(source, units, torch.bfloat16, driver)
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
    pinned = PinnedSource(source, weight_units(TINY, 4), torch.float32, driver)
    outs = [torch.zeros(32, 16) for _ in range(4)]
    threads = [threading.Thread(target=pinned.copy_into, args=(name, out)) for out in outs]
    for thread in threads:
        thread.start()
    all_ask.set()
    for thread in threads:
        thread.join()
    assert source.reads == 1 and outs[0].count_nonzero() and all(torch.equal(out, outs[0]) for out in outs)
    pinned.close()


def test_memory_that_cannot_be_pinned_says_what_to_do(driver: FakeCuda) -> None:
    driver.fail_at["pin"] = 1
    source, units = DummySource(TINY), weight_units(TINY, 4)
    with pytest.raises(ConfigError, match=r"cannot pin 0 MiB .*CUDA_ERROR_UNKNOWN.*start with --host-copy mapped$"):
        keep_host_copy(HostCopy.PINNED, source, units, torch.float32, driver)


# --- which devices, and how large -----------------------------------------------------------------------------------


def test_names() -> None:
    assert device_names([0, 0, 1]) == ["cuda:0.0", "cuda:0.1", "cuda:1"]


def test_chunks_of_the_8b_model_are_tens_of_mib_and_waste_little() -> None:
    config, mib = load_card("llama-8b").config, 1 << 20
    block = KVShape.of(config, 16, torch.bfloat16).block_bytes
    chunk = choose_chunk_bytes(config, 2, block, GRANULARITY, 72 << 30)
    assert chunk % GRANULARITY == 0 and 16 * mib <= chunk <= 64 * mib
    layer = weight_units(config, 2)[1].num_bytes
    assert -layer % chunk / layer < 0.02
    small = choose_chunk_bytes(config, 2, block, GRANULARITY, 18 << 30)  # little KV: coarse chunks would lose it
    weights = sum(-(-unit.num_bytes // small) for unit in weight_units(config, 2))
    kv = ((18 << 30) // small - weights) // config.num_layers * config.num_layers * small
    assert kv >= 0.85 * ((18 << 30) - sum(unit.num_bytes for unit in weight_units(config, 2)))


def test_chunks_of_a_small_model_are_small() -> None:
    config = load_card("smollm2-135m").config
    block = KVShape.of(config, 16, torch.float32).block_bytes
    assert choose_chunk_bytes(config, 4, block, GRANULARITY, 730 << 20) <= 4 * GRANULARITY


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
    if not module.name.endswith((".cuda_kernels", "__main__")):
        importlib.import_module(module.name)
try:
    import kunserve.model.cuda_kernels
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
