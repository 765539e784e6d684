"""A machine of simulated GPUs: null devices whose work takes predicted time, and the executor that runs on them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kunserve.engine.executor import Executor
from kunserve.engine.group import Group
from kunserve.engine.machine import Machine
from kunserve.engine.microbatch import Microbatch
from kunserve.engine.sampler import SampledToken
from kunserve.gpu.cuda import choose_chunk_bytes
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.kv_memory import KVShape
from kunserve.gpu.links import HOST, Links, Priority
from kunserve.gpu.null import NullDevice
from kunserve.model.checkpoint import WeightSource
from kunserve.model.config import ModelConfig
from kunserve.planner.cost import CostModel, Work
from kunserve.planner.snapshot import DeviceView, ModelShape
from kunserve.sim.cluster import USABLE, Cluster, datasheet_cost, gpus_per_instance
from kunserve.sim.links import TimedLinks

T = TypeVar("T")

GRANULARITY = 2 << 20  # of physical memory on these GPUs
CALL_S = 50e-6  # of a call that maps or unmaps: some 100 of them are the paper's 5 ms for a drop
TOKEN = SampledToken(0)  # what every step samples


class SimDevice(NullDevice):
    """A device that computes one thing after the other, in the order of asking; copies take their time on links."""

    def __init__(self, index: int, num_chunks: int, chunk_bytes: int) -> None:
        super().__init__(index, num_chunks, chunk_bytes)
        self.busy_s = 0.0  # computed so far
        self._free_at_s = 0.0
        self._num_calls = 0

    def map(self, address: int, chunks: Sequence[int]) -> None:
        """See `Device.map`."""
        self._num_calls += 1
        super().map(address, chunks)

    def unmap(self, address: int, num_chunks: int) -> None:
        """See `Device.unmap`."""
        self._num_calls += 1
        super().unmap(address, num_chunks)

    async def compute(self, seconds: float) -> None:
        """Return when work of so long has been done, after everything that was asked for before."""
        loop = asyncio.get_running_loop()
        self._free_at_s = max(self._free_at_s, loop.time()) + seconds
        self.busy_s += seconds
        await asyncio.sleep(self._free_at_s - loop.time())

    async def run(self, work: Callable[[], T]) -> T:
        """See `Device.run`. Work that maps takes time for every call; nothing else that comes here is long."""
        await self.compute(0.0)
        self._num_calls = 0
        result = work()
        await self.compute(self._num_calls * CALL_S)
        return result

    async def run_copy(self, work: Callable[[], T]) -> T:
        """See `Device.run_copy`. There are no bytes to copy, so `work`, whose result nobody reads, is not done."""
        return None  # type: ignore[return-value]


class NoWeights:
    """A source for devices that hold no bytes."""

    def copy_into(self, name: str, out: Tensor) -> None:
        """Nothing to copy."""


class SimExecutor(Executor):
    """Waits as long as every stage would compute, one microbatch after the other on each device."""

    def __init__(
        self, devices: Sequence[SimDevice], links: Links, cost: CostModel, token_bytes: int, num_layers: int
    ) -> None:
        self._devices, self._links, self._cost = devices, links, cost
        self._token_bytes, self._num_layers = token_bytes, num_layers  # of an activation between stages

    def inputs(self, group: Group, batch: Microbatch, eos_token_ids: tuple[int, ...]) -> Work:
        """See `Executor.inputs`: as far as time depends on it."""
        pairs = keys = tokens = samples = 0
        for span in batch.spans:  # Work.of, unrolled: this runs for every token
            start, end = span.start, span.end
            num_tokens = end - start
            pairs += (start + end + 1) * num_tokens
            keys += end
            tokens += num_tokens
            samples += span.samples
        return Work(pairs // 2, keys, tokens, len(batch.spans), samples)

    async def execute(self, group: Group, inputs: Work) -> list[SampledToken]:
        """See `Executor.execute`."""
        before: int | None = None
        for stage in group.stages:
            if before is not None:
                num_bytes = inputs.num_tokens * self._token_bytes
                async with self._links.turn(before, stage.device, Priority.ACTIVATION, num_bytes):
                    pass
            is_first, is_last = stage.first_layer == 0, stage.last_layer == self._num_layers
            num_layers = stage.last_layer - stage.first_layer
            await self._devices[stage.device].compute(self._cost.work_time(num_layers, inputs, is_first, is_last))
            before = stage.device
        return [TOKEN] * inputs.num_samples


class SimMachine(Machine):
    """The GPUs of a cluster, as many as an instance needs to each device."""

    dtype = torch.bfloat16

    def __init__(self, model: ModelConfig, cluster: Cluster, block_size: int, *, is_coordinated: bool = True) -> None:
        self._model, self._cluster, self.gpus_per_device = model, cluster, gpus_per_instance(model, cluster.gpu)
        self.gpu = cluster.gpu.times(self.gpus_per_device)
        budget = int(self.gpu.memory_bytes * USABLE)
        block_bytes = KVShape.of(model, block_size, self.dtype).block_bytes
        self.chunk_bytes = choose_chunk_bytes(model, self.dtype.itemsize, block_bytes, GRANULARITY, budget)
        self._budget_chunks = budget // self.chunk_bytes
        self._devices: list[SimDevice] = []
        self._links = TimedLinks(self._bandwidth, is_coordinated=is_coordinated)

    @property
    def num_devices(self) -> int:
        """Instances of the model."""
        return self._cluster.num_gpus // self.gpus_per_device

    def views(self, shape: ModelShape) -> list[DeviceView]:
        """See `Machine.views`; a server is an island."""
        return [DeviceView(i, self._budget_chunks, self._server(i)) for i in range(self.num_devices)]

    def open(self) -> Sequence[SimDevice]:
        """See `Machine.open`."""
        self._devices = [SimDevice(i, self._budget_chunks, self.chunk_bytes) for i in range(self.num_devices)]
        return self._devices

    def source(self, source: WeightSource) -> WeightSource:
        """See `Machine.source`."""
        return source

    def executor(self, memories: Sequence[DeviceMemory], max_model_len: int) -> tuple[SimExecutor, str]:
        """See `Machine.executor`."""
        model, token_bytes = self._model, self._model.hidden_size * self.dtype.itemsize
        cost = datasheet_cost(model, self.gpu, self.dtype.itemsize)
        executor = SimExecutor(self._devices, self._links, cost, token_bytes, model.num_layers)
        return executor, f"predicted times of {self.gpus_per_device} {self.gpu.name} per device"

    def links(self) -> Links:
        """See `Machine.links`."""
        return self._links

    def clock(self) -> float:
        """See `Machine.clock`: simulated time."""
        return asyncio.get_running_loop().time()

    def close(self) -> None:
        """See `Machine.close`."""
        while self._devices:
            self._devices.pop().close()

    def _server(self, device: int) -> int:
        return device * self.gpus_per_device // self._cluster.gpus_per_server

    def _bandwidth(self, source: int, destination: int) -> float:
        """Bytes per second: to the host by PCIe, within a server by NVLink, else by RDMA."""
        if HOST in (source, destination):
            return self.gpu.pcie_bytes_per_s
        if self._server(source) == self._server(destination):
            return self.gpu.nvlink_bytes_per_s * self.gpus_per_device
        return self._cluster.rdma_bytes_per_s * self.gpus_per_device
