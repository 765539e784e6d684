"""A machine of simulated GPUs: null devices whose work takes predicted time, and the executor that runs on them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kunserve.compute.sampler import SampledToken
from kunserve.config import check_kv_dtype
from kunserve.engine.batch import Microbatch
from kunserve.engine.group import Group
from kunserve.engine.launch.machine import Machine
from kunserve.engine.occupancy import Passage
from kunserve.engine.schedule.scheduler import Scheduler
from kunserve.engine.step.executor import Executor
from kunserve.gpu.cuda.device import choose_chunk_bytes
from kunserve.gpu.cuda.kv_dtype import cuda_kv_dtype
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.host_weights import HostWeights
from kunserve.gpu.kv_memory import KVShape
from kunserve.gpu.links import Links, Priority
from kunserve.gpu.null import NullDevice
from kunserve.model.checkpoint import WeightSource
from kunserve.model.config import ModelConfig
from kunserve.model.host_copy import HostCopy
from kunserve.planner.cost import CostModel, Work
from kunserve.planner.snapshot import DeviceView, ModelShape
from kunserve.sim.cluster import Cluster, Instances
from kunserve.sim.links import TimedLinks

T = TypeVar("T")

GRANULARITY = 2 << 20  # of physical memory on these GPUs
CALL_S = 50e-6  # of a call that maps or unmaps: some 100 of them are the paper's 5 ms for a drop
TOKEN = SampledToken(0)  # what every step samples
DTYPE = torch.bfloat16  # of weights on GPUs


def kv_dtype_on_gpus(name: str, model: ModelConfig) -> torch.dtype:
    """Return the dtype of KV for `--kv-cache-dtype`. ConfigError, in the server's words, where it would refuse it."""
    check_kv_dtype(name, "cuda")
    return cuda_kv_dtype(name, DTYPE, model.head_dim)


def kv_token_bytes(model: ModelConfig, kv_dtype: torch.dtype) -> int:
    """Return the bytes of one token's KV in all layers."""
    return KVShape.of(model, 1, kv_dtype).block_bytes * model.num_layers


class Core:
    """A core that does one piece of work after the other, in the order of asking."""

    def __init__(self) -> None:
        self._free_at_s = 0.0

    def queue(self, seconds: float) -> float:
        """Queue work of `seconds` after all that was asked for before; return the seconds until it is done."""
        now_s = asyncio.get_running_loop().time()
        self._free_at_s = max(self._free_at_s, now_s) + seconds
        return self._free_at_s - now_s

    async def compute(self, seconds: float) -> None:
        """Return when work of so long has been done."""
        await asyncio.sleep(self.queue(seconds))


class SimDevice(NullDevice, Core):
    """A device that computes in the time that it is told; copies take their time on links."""

    def __init__(self, index: int, num_chunks: int, chunk_bytes: int) -> None:
        NullDevice.__init__(self, index, num_chunks, chunk_bytes)
        Core.__init__(self)
        self._num_calls = 0

    def map(self, address: int, chunks: Sequence[int]) -> None:
        """See `Device.map`."""
        self._num_calls += 1
        super().map(address, chunks)

    def unmap(self, address: int, num_chunks: int) -> None:
        """See `Device.unmap`."""
        self._num_calls += 1
        super().unmap(address, num_chunks)

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
        """Copy nothing: simulated weights have no content."""


@dataclass(frozen=True, slots=True)
class HostTime:
    """Seconds of scheduling, streaming and whatever else the server does besides computing.

    Where it `is_apart`, the server has a core of its own, which serves one microbatch after the other, at the same time
    as devices compute others. Else this time is spent on the devices' own cores, as on a machine of few: each stage of
    a microbatch takes an equal share of it longer.
    """

    step_s: float = 0.0  # for a microbatch
    token_s: float = 0.0  # for each token that it samples
    request_s: float = 0.0  # for each request, when it begins
    is_apart: bool = False


class Step(NamedTuple):
    """What the executor needs of a microbatch."""

    work: Work
    num_begun: int  # requests that it is the first for
    sampled: Future[Any]
    depends_on: Future[Any] | None  # `sampled` of the one whose tokens it goes on from, if it is still in flight


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
        host: HostTime,
    ) -> None:
        super().__init__()
        self._devices, self._links, self._cost = devices, links, cost
        self._token_bytes, self._num_layers = token_bytes, num_layers  # of an activation between stages
        self._shares_head, self._host, self._core = shares_head, host, Core()
        self._entrances = WeakKeyDictionary[Group, asyncio.Lock]()  # as DeviceExecutor

    def inputs(self, group: Group, batch: Microbatch, eos_token_ids: tuple[int, ...]) -> Step:
        """See `Executor.inputs`: as far as time depends on it."""
        num_begun, (_, ends, is_ahead) = 0, batch.decoding
        tokens = samples = len(ends)
        keys = sum(ends)
        pairs = 2 * keys
        for request, start, end, has_sample, runs_ahead in batch.others:  # Work.of, unrolled: runs for every token
            num_tokens = end - start
            pairs += (start + end + 1) * num_tokens
            keys += end
            tokens += num_tokens
            samples += has_sample
            is_ahead |= runs_ahead
            num_begun += start == request.num_cached_tokens and request.num_preemptions == 0
        work = Work(pairs // 2, keys, tokens, len(ends) + len(batch.others), samples)
        return Step(work, num_begun, batch.sampled, group.in_flight[0].sampled if is_ahead else None)

    async def pass_through(self, group: Group, inputs: Step, passage: Passage) -> list[SampledToken]:
        """See `Executor.pass_through`."""
        work = inputs.work
        num_bytes = int(work.num_tokens) * self._token_bytes
        host = self._host
        host_s = host.step_s + host.token_s * work.num_samples + host.request_s * inputs.num_begun
        if host.is_apart:
            await self._core.compute(host_s)
            host_s = 0.0
        host_s /= len(group.stages)
        is_shared = self._shares_head and len(group.stages) > 1 and work.num_samples > 0
        for position, stage in enumerate(group.stages):
            if position:
                before = group.stages[position - 1].device
                async with self._links.turn(before, stage.device, Priority.ACTIVATION, num_bytes):
                    pass
            is_first, is_last = position == 0, stage.last_layer == self._num_layers
            num_layers, device = stage.last_layer - stage.first_layer, self._devices[stage.device]
            seconds = host_s + self._cost.work_time(num_layers, work, is_first, is_last and not is_shared)
            with passage.at(position):
                if is_first and not is_last:
                    await self._enter(group, device, inputs, seconds)
                elif is_last and is_shared:
                    await self._end_at_both_ends(group, seconds, self._cost.head_time(work.num_samples) / 2)
                else:
                    await device.compute(seconds)
        inputs.sampled.set_result(None)
        return [TOKEN] * int(work.num_samples)

    async def _enter(self, group: Group, device: SimDevice, inputs: Step, seconds: float) -> None:
        """Run the first stage of a chain, once tokens that are still being sampled elsewhere are there."""
        async with self._entrances.setdefault(group, asyncio.Lock()):
            if inputs.depends_on is not None:
                await asyncio.wrap_future(inputs.depends_on)
            left_s = device.queue(seconds)
        await asyncio.sleep(left_s)

    async def _end_at_both_ends(self, group: Group, seconds: float, head_s: float) -> None:
        """Run the last stage's layers and its half of the head in one piece; the first device's half from then on."""
        left_s = self._devices[group.stages[-1].device].queue(seconds + head_s)

        async def others() -> None:
            await asyncio.sleep(left_s - head_s)
            await self._devices[group.stages[0].device].compute(head_s)

        await asyncio.gather(asyncio.sleep(left_s), others())


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
        kv_dtype: torch.dtype | None = None,
        shares_head: bool = False,
        host: HostTime | None = None,
    ) -> None:
        """Have the devices of `views`. `kv_dtype`: None: that of the weights; `cost` is for KV of that many bytes."""
        self._host = host or HostTime()
        self._model, self.cost, self._links, self._views = model, cost, links, views
        self.shares_head = shares_head
        self.dtype, self.chunk_bytes, self.device_name = dtype, chunk_bytes, device_name
        self._kv_dtype = kv_dtype or dtype
        self._devices: list[SimDevice] = []

    @classmethod
    def of_gpus(
        cls,
        model: ModelConfig,
        cluster: Cluster,
        block_size: int,
        *,
        kv_dtype: torch.dtype = DTYPE,
        is_coordinated: bool = True,
        host: HostTime | None = None,
        overlap: float | None = None,
        scheduler: type[Scheduler] = Scheduler,
    ) -> SimMachine:
        """Make devices of a cluster's GPUs, of as many each as an instance needs. ConfigError if there are too few.

        `overlap`: of reading weights and multiplying, as in `CostModel`; None: what is assumed of such GPUs.
        """
        instances, block_bytes = Instances.of(model, cluster), KVShape.of(model, block_size, kv_dtype).block_bytes
        budget = instances.memory_bytes
        chunk_bytes = choose_chunk_bytes(model, DTYPE, block_bytes, GRANULARITY, budget)
        devices = range(instances.num_devices)
        views = [DeviceView(i, budget // chunk_bytes, instances.server(i)) for i in devices]
        links = TimedLinks(instances.bandwidth, is_coordinated=is_coordinated)
        cost = instances.cost(model).with_kv(kv_dtype.itemsize / DTYPE.itemsize)
        if overlap is not None:
            cost = replace(cost, overlap=overlap)
        machine = cls(model, cost, links, views, DTYPE, chunk_bytes, cluster.kind, kv_dtype=kv_dtype, host=host)
        machine.scheduler = scheduler
        return machine

    @property
    def kv_dtype(self) -> torch.dtype:
        """See `Machine.kv_dtype`."""
        return self._kv_dtype

    def views(self, shape: ModelShape) -> list[DeviceView]:
        """See `Machine.views`."""
        return list(self._views)

    def open(self) -> Sequence[SimDevice]:
        """See `Machine.open`."""
        self._devices = [SimDevice(view.device, view.budget_chunks, self.chunk_bytes) for view in self._views]
        return self._devices

    def host_weights(self, source: WeightSource) -> HostWeights:
        """See `Machine.host_weights`: a restore takes the time of the link from the host."""
        return HostWeights(HostCopy.PINNED, source)

    def executor(self, memories: Sequence[DeviceMemory], max_model_len: int) -> tuple[SimExecutor, str]:
        """See `Machine.executor`."""
        model, token_bytes = self._model, self._model.hidden_size * self.dtype.itemsize
        shares_head = self.shares_head and model.tie_embeddings
        executor = SimExecutor(
            self._devices,
            self._links,
            self.cost,
            token_bytes,
            model.num_layers,
            shares_head=shares_head,
            host=self._host,
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
