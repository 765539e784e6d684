"""CUDA devices: chunks are cuMemCreate handles, mapped into reserved addresses. One GPU may be several devices.

All physical memory is created when a device opens; a remap then moves page tables only. The number of driver calls
decides how long it takes, so runs of chunks are given access, and unmapped, in one call each. Page tables change only
while the device's streams are idle: `map` and `unmap` hold launches back and wait for what runs, which at a step
boundary is nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from kunserve.errors import ConfigError, DeviceError
from kunserve.gpu.copies import BlockCopy, copy_blocks
from kunserve.gpu.cuda.copy import copy_between, transfer
from kunserve.gpu.cuda.driver import CudaDriver, Driver, check_ordinals, count_gpus, load_bindings
from kunserve.gpu.cuda.stream import Launched, StreamQueue
from kunserve.gpu.device import Device
from kunserve.gpu.mappings import Mappings
from kunserve.gpu.queue import LAST_WAIT_S, to_the_end
from kunserve.model.config import ModelConfig
from kunserve.model.layout import weight_units
from kunserve.sizes import ceil_div, format_size

T = TypeVar("T")

MIB = 1 << 20
MAX_CHUNK_BYTES = 64 * MIB
INVALID_VALUE = "CUDA_ERROR_INVALID_VALUE"
MAX_WASTE = 0.01  # of the memory of a copy: what a larger chunk may cost over the best size


class CudaDevice:
    """One logical device: `num_chunks` chunks of a GPU's memory, and streams of its own.

    `sampling`: for the host's looks at logits, which wait for the GPU and must hold up no launch. `hand_over`: what
    goes to the next stage's GPU; it waits until that stream gets there, and must hold up no KV.
    """

    def __init__(
        self,
        driver: Driver,
        name: str,
        num_chunks: int,
        chunk_bytes: int,
    ) -> None:
        """Open the device; ConfigError if there is not enough memory.

        No other GPU gets access to it: each would be one more page table that a remap edits. What goes between GPUs
        goes through torch's memory.
        """
        if chunk_bytes % driver.granularity:
            raise ConfigError(f"{name}: chunks of {chunk_bytes} bytes are no multiple of {driver.granularity}")
        self.name, self.torch_device, self.is_lost = name, driver.torch_device, False
        self.chunk_bytes, self.num_chunks = chunk_bytes, num_chunks
        self.driver = driver
        self._reserved: dict[int, tuple[int, int]] = {}  # address -> what the driver knows it by: address, bytes
        self.mappings = Mappings(name, num_chunks, chunk_bytes)
        self.queues: list[StreamQueue] = []
        self._handles: list[int] = []
        self._is_open, self._unmaps_runs = True, True
        try:
            self._create_chunks()
            kinds = ("compute", "sample", "in", "out", "peer", "hand")
            self.queues += [StreamQueue(driver, f"{name}-{kind}") for kind in kinds]
        except BaseException:
            self.close()
            raise
        self.compute, self.sampling, self.copy_in, self.copy_out, self.peer, self.hand_over = self.queues

    def _create_chunks(self) -> None:
        for made in range(self.num_chunks):
            try:
                self._handles.append(self.driver.create(self.chunk_bytes))
            except DeviceError as error:
                free, total = self.driver.memory()
                raise ConfigError(
                    f"{self.name}: too little memory: {format_size(self.num_chunks * self.chunk_bytes)} wanted, "
                    f"{format_size(made * self.chunk_bytes)} created, "
                    f"{format_size(free)} of {format_size(total)} are free now ({error.message})"
                ) from None

    def reserve(self, num_bytes: int) -> int:
        """See `Device.reserve`."""
        whole = num_bytes + self.chunk_bytes  # CUDA aligns to powers of two only; a part cannot be given back
        base = self.driver.reserve(whole)
        address = ceil_div(base, self.chunk_bytes) * self.chunk_bytes
        self._reserved[address], self.mappings.reserved[address] = (base, whole), num_bytes
        return address

    def release(self, address: int, num_bytes: int) -> None:
        """See `Device.release`."""
        self.mappings.check_reserved(address, num_bytes)
        for start, num_chunks in _runs(self.mappings.mapped_in(address, num_bytes), self.chunk_bytes):
            self.unmap(start, num_chunks)
        self.driver.free(*self._reserved[address])
        self.mappings.release(address, num_bytes)
        del self._reserved[address]

    def map(self, address: int, chunks: Sequence[int]) -> None:
        """See `Device.map`: one call per chunk, and one for access to all."""
        self.mappings.check_map(address, chunks)
        size, done = self.chunk_bytes, 0
        with self._quiet():
            try:
                for chunk in chunks:
                    self.driver.map(address + done * size, size, self._handles[chunk])
                    done += 1
                if chunks:
                    self.driver.set_access(address, len(chunks) * size)
            except DeviceError:
                self._unmap(address, done)
                raise
        self.mappings.map(address, chunks)

    def unmap(self, address: int, num_chunks: int) -> None:
        """See `Device.unmap`: one call, or if the driver refuses that one per chunk, from then on."""
        if num_chunks == 0:
            return
        self.mappings.check_unmap(address, num_chunks)
        with self._quiet():
            self._unmap(address, num_chunks)
        self.mappings.unmap(address, num_chunks)

    def _unmap(self, address: int, num_chunks: int) -> None:
        """Unmap a run of chunks. CUDA's manual speaks of one mapping; NVIDIA's own samples unmap several in a call."""
        size = self.chunk_bytes
        if num_chunks > 1 and self._unmaps_runs:
            try:
                self.driver.unmap(address, num_chunks * size)
                return
            except DeviceError as error:
                if INVALID_VALUE not in error.message:
                    raise
                self._unmaps_runs = False
        for start in range(address, address + num_chunks * size, size):
            self.driver.unmap(start, size)

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        """See `Device.tensor`."""
        return self.driver.tensor(address, num_bytes)

    async def run(self, work: Callable[[], T]) -> T:
        """See `Device.run`."""
        return await self.compute.run(work)

    async def run_copy(self, work: Callable[[], T]) -> T:
        """See `Device.run_copy`."""
        return await self.copy_in.run(work)

    async def copy(
        self, copies: Sequence[BlockCopy], source: Device | None = None, *, is_to_host: bool = False
    ) -> None:
        """See `Device.copy`."""
        try:
            if is_to_host:
                await self.copy_out.run(partial(copy_blocks, copies))
            elif source is None:
                await self.copy_in.run(partial(copy_blocks, copies))
            else:
                assert isinstance(source, CudaDevice)
                await to_the_end(copy_between(source, self, copies))
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:  # torch's words for what CUDA refuses
            raise DeviceError(f"{self.name}: a copy failed: {str(error).partition(chr(10))[0]}") from error

    async def copy_tensor(self, read: Tensor, write: Tensor, source: Device) -> None:
        """See `Device.copy_tensor`."""
        assert isinstance(source, CudaDevice)
        await to_the_end(transfer(source, read, self, write))

    async def launch(
        self, work: Callable[[], T], after: Sequence[Launched[Any]] = (), *, is_timed: bool = False
    ) -> Launched[T]:
        """Launch `work` on the compute queue behind `after`; returns before its results are there."""
        return await self.compute.launch(work, after, is_timed=is_timed)

    async def finish(self, launched: Launched[T]) -> T:
        """Wait for what was launched on the compute queue, or behind it."""
        return await self.compute.finish(launched)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Launch on the compute stream from this thread, and nobody else does; it is idle when that ends.

        Blocking: before serving, and after it.
        """
        with self.compute.lent():
            yield
            self.driver.synchronize(self.compute.stream)

    @property
    def is_open(self) -> bool:
        """Return whether it still has its memory."""
        return self._is_open

    def abandon(self) -> None:
        """See `Device.abandon`."""
        self.is_lost = True
        for queue in self.queues:
            queue.abandon()

    def copies_have_ended(self, timeout_s: float) -> bool:
        """See `Device.copies_have_ended`."""
        return all(queue.has_ended(timeout_s) for queue in (self.copy_in, self.copy_out, self.peer))

    def close(self) -> None:
        """See `Device.close`. If its driver hangs, all that it has goes with the process."""
        if not self._is_open:
            return
        if self.is_lost and not all(queue.has_ended(LAST_WAIT_S) for queue in self.queues):
            return
        self._is_open = False
        with ExitStack() as stack:  # each step even if one fails; a failed kernel makes every call fail
            stack.callback(_quietly, self.driver.close)
            for handle in self._handles:
                stack.callback(_quietly, self.driver.release, handle)
            for base, whole in self._reserved.values():
                stack.callback(_quietly, self.driver.free, base, whole)
            for start, num_chunks in _runs(self.mappings.chunks, self.chunk_bytes):
                stack.callback(_quietly, self._unmap, start, num_chunks)
            for queue in self.queues:
                stack.callback(_quietly, queue.close)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Keep all streams of this device idle and without new work inside."""
        with ExitStack() as stack:
            for queue in self.queues:
                stack.enter_context(queue.quiet())
            yield


def _runs(addresses: Iterable[int], step: int) -> Iterator[tuple[int, int]]:
    """Yield start and length of each run of neighbours, `step` apart."""
    start, length = 0, 0
    for address in sorted(addresses):
        if length and address == start + length * step:
            length += 1
            continue
        if length:
            yield start, length
        start, length = address, 1
    if length:
        yield start, length


def _quietly(call: Callable[..., Any], *arguments: Any) -> None:
    """Ignore what the driver refuses while closing: it takes it back when the process ends."""
    with suppress(DeviceError):
        call(*arguments)


# --- which devices, and how large -----------------------------------------------------------------------------------


def device_names(ordinals: Sequence[int]) -> list[str]:
    """Return the names of logical devices: cuda:1, or cuda:0.2 for the third of several on GPU 0."""
    names, seen = [], dict.fromkeys(ordinals, 0)
    for ordinal in ordinals:
        names.append(f"cuda:{ordinal}" if ordinals.count(ordinal) == 1 else f"cuda:{ordinal}.{seen[ordinal]}")
        seen[ordinal] += 1
    return names


def choose_chunk_bytes(
    config: ModelConfig, dtype: torch.dtype, kv_block_bytes: int, granularity: int, budget_bytes: int
) -> int:
    """Return the bytes of a chunk: the largest whose waste is within 1 % of the memory of the least possible.

    Wasted are the ends of the weight units' ranges, and of every layer's KV range what chunks cannot be divided into.
    dtype: of weights that are stored as numbers; kv_block_bytes: one block of one layer; budget_bytes: of one device.
    Where weights are more than that, several devices hold them, and the memory is theirs. What one lacks counts as
    used: so waste is what chunks lose.
    """
    units = [unit.num_bytes for unit in weight_units(config, dtype)]

    def waste(chunk: int) -> int:
        whole = budget_bytes // chunk - sum(ceil_div(num_bytes, chunk) for num_bytes in units)  # chunks for KV
        used = whole // config.num_layers * chunk // kv_block_bytes * kv_block_bytes * config.num_layers
        if whole < 0:
            used = whole * chunk
        return budget_bytes - sum(units) - used

    sizes = range(granularity, max(MAX_CHUNK_BYTES, granularity) + 1, granularity)
    wasted = {size: waste(size) for size in sizes}
    num_devices = max(1, ceil_div(sum(units), budget_bytes))
    allowed = min(wasted.values()) + int(num_devices * budget_bytes * MAX_WASTE)
    return max(size for size, lost in wasted.items() if lost <= allowed)


def budget_bytes(
    ordinals: Sequence[int],
    memory: dict[int, tuple[int, int]],
    *,
    memory_bytes: int | None,
    utilization: float,
    reserved_bytes: int = 0,
) -> int:
    """Return every logical device's budget: `memory_bytes`, or an equal share of `utilization` of the GPU.

    memory: (free, total) of each GPU; reserved_bytes: activations and workspaces of one logical device, not yet taken.
    ConfigError with the figures if it is not there.
    """
    budgets = []
    for ordinal in sorted(set(ordinals)):
        (free, total), count = memory[ordinal], list(ordinals).count(ordinal)
        share = (int(total * utilization) - (total - free)) // count - reserved_bytes
        wanted = share if memory_bytes is None else memory_bytes
        if wanted <= 0 or count * (wanted + reserved_bytes) > free:
            asked = f"--gpu-memory-utilization {utilization}" if memory_bytes is None else "--device-memory"
            raise ConfigError(
                f"cuda:{ordinal}: too little memory: {asked} asks for {count} x {format_size(max(wanted, 0))} and "
                f"{count} x {format_size(reserved_bytes)} for activations; "
                f"{format_size(free)} of {format_size(total)} are free"
            )
        budgets.append(wanted)
    return min(budgets)


def islands(drivers: Sequence[Driver]) -> list[int]:
    """Return for each device the first that it reaches directly: devices of one island have fast links."""
    return [
        next(i for i, other in enumerate(drivers) if driver.can_access(other.ordinal) or other is driver)
        for driver in drivers
    ]


def open_drivers(ordinals: Sequence[int], open_driver: Callable[[int], Driver] | None = None) -> list[Driver]:
    """Open a driver for each logical device; all GPUs if `ordinals` is empty. ConfigError, with none left open."""
    if open_driver is None:
        bindings = load_bindings()
        ordinals = ordinals or range(count_gpus(bindings))
        check_ordinals(ordinals, count_gpus(bindings))
        open_driver = lambda ordinal: CudaDriver(ordinal, bindings)  # noqa: E731
    drivers: list[Driver] = []
    try:
        for ordinal in ordinals:
            drivers.append(open_driver(ordinal))
    except BaseException:
        for driver in drivers:
            driver.close()
        raise
    return drivers


def open_cuda_devices(drivers: Sequence[Driver], num_chunks: int, chunk_bytes: int) -> list[CudaDevice]:
    """Open a device of `num_chunks` on each driver. All or none; the drivers are theirs."""
    devices: list[CudaDevice] = []
    try:
        for driver, name in zip(drivers, device_names([driver.ordinal for driver in drivers]), strict=True):
            devices.append(CudaDevice(driver, name, num_chunks, chunk_bytes))
    except BaseException:
        for device in devices:
            device.close()
        for driver in drivers[len(devices) :]:
            driver.close()
        raise
    return devices
