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
from kunserve.gpu.links import Links, Priority
from kunserve.gpu.null import NullDevice
from kunserve.model.checkpoint import WeightSource
from kunserve.model.config import ModelConfig
from kunserve.planner.cost import CostModel, Work
from kunserve.planner.snapshot import DeviceView, ModelShape
from kunserve.sim.cluster import Cluster, Instances
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
        self,
        devices: Sequence[SimDevice],
        links: Links,
        cost: CostModel,
        token_bytes: int,
        num_layers: int,
        *,
        shares_head: bool,
    ) -> None:
        self._devices, self._links, self._cost = devices, links, cost
        self._token_bytes, self._num_layers = token_bytes, num_layers  # of an activation between stages
        self._shares_head = shares_head  # as DeviceExecutor

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
        now_s = asyncio.get_running_loop().time
        num_bytes = int(inputs.num_tokens) * self._token_bytes
        is_shared = self._shares_head and len(group.stages) > 1 and inputs.num_samples > 1
        for position, stage in enumerate(group.stages):
            if position:
                before = group.stages[position - 1].device
                async with self._links.turn(before, stage.device, Priority.ACTIVATION, num_bytes):
                    pass
            is_first, has_head = position == 0, stage.last_layer == self._num_layers and not is_shared
            num_layers = stage.last_layer - stage.first_layer
            group.occupancy.enter(position, now_s())
            try:
                seconds = self._cost.work_time(num_layers, inputs, is_first, has_head)
                await self._devices[stage.device].compute(seconds)
            finally:
                group.occupancy.leave(position, now_s())
        if is_shared:
            await self._sample_at_both_ends(group, int(inputs.num_samples))
        return [TOKEN] * int(inputs.num_samples)

    async def _sample_at_both_ends(self, group: Group, num_samples: int) -> None:
        half = num_samples // 2
        await asyncio.gather(
            self._devices[group.stages[-1].device].compute(self._cost.head_time(num_samples - half)),
            self._devices[group.stages[0].device].compute(self._cost.head_time(half)),
        )


class SimMachine(Machine):
    """Simulated devices, all alike, that compute in the time that `cost` predicts."""

    def __init__(
        self,
        model: ModelConfig,
        cost: CostModel,
        links: Links,
        views: Sequence[DeviceView],
        dtype: torch.dtype,
        chunk_bytes: int,
        device_name: str,
        *,
        shares_head: bool = False,
    ) -> None:
        self._model, self.cost, self._links, self._views = model, cost, links, views
        self.shares_head = shares_head
        self.dtype, self.chunk_bytes, self.device_name = dtype, chunk_bytes, device_name
        self._devices: list[SimDevice] = []

    @classmethod
    def of_gpus(
        cls, model: ModelConfig, cluster: Cluster, block_size: int, *, is_coordinated: bool = True
    ) -> SimMachine:
        """The GPUs of a cluster, as many to a device as an instance needs. ConfigError if there are too few."""
        instances, dtype = Instances.of(model, cluster), torch.bfloat16
        block_bytes, budget = KVShape.of(model, block_size, dtype).block_bytes, instances.memory_bytes
        chunk_bytes = choose_chunk_bytes(model, dtype.itemsize, block_bytes, GRANULARITY, budget)
        devices = range(instances.num_devices)
        views = [DeviceView(i, budget // chunk_bytes, instances.server(i)) for i in devices]
        links = TimedLinks(instances.bandwidth, is_coordinated=is_coordinated)
        return cls(model, instances.cost(model), links, views, dtype, chunk_bytes, cluster.kind)

    def views(self, shape: ModelShape) -> list[DeviceView]:
        """See `Machine.views`."""
        return list(self._views)

    def open(self) -> Sequence[SimDevice]:
        """See `Machine.open`."""
        self._devices = [SimDevice(view.device, view.budget_chunks, self.chunk_bytes) for view in self._views]
        return self._devices

    def source(self, source: WeightSource) -> WeightSource:
        """See `Machine.source`."""
        return source

    def executor(self, memories: Sequence[DeviceMemory], max_model_len: int) -> tuple[SimExecutor, str]:
        """See `Machine.executor`."""
        model, token_bytes = self._model, self._model.hidden_size * self.dtype.itemsize
        shares_head = self.shares_head and model.tie_embeddings
        executor = SimExecutor(
            self._devices, self._links, self.cost, token_bytes, model.num_layers, shares_head=shares_head
        )
        return executor, f"predicted times of {self.device_name}"

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
