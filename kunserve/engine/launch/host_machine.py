"""Virtual CPU devices as a `Machine`: budgets from the host's memory, decoders on the CPU's kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from kunserve.compute.cpu_decoder import CpuDecoder
from kunserve.compute.cpu_ops import CpuOps, cpu_ops_or_reference
from kunserve.compute.decoder import Decoder
from kunserve.config import DEFAULT_KV_BYTES, EngineConfig
from kunserve.engine.launch.faults import Faults
from kunserve.engine.launch.machine import Machine
from kunserve.engine.launch.placement import budget_chunks
from kunserve.engine.step.executor import DeviceExecutor, Executor
from kunserve.errors import ConfigError, ConflictError
from kunserve.gpu.device import Device
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.host import HostDevice, Team
from kunserve.gpu.host_weights import HostWeights, keep_host_copy
from kunserve.host.cgroup import available_bytes
from kunserve.host.memory import HostMemory, MemoryAhead
from kunserve.model.checkpoint import WeightSource
from kunserve.model.config import ModelConfig
from kunserve.model.layout import weight_units
from kunserve.planner.snapshot import DeviceView, ModelShape
from kunserve.sizes import format_size


class HostMachine(Machine):
    """Virtual CPU devices, each with a thread pinned to a core of its own while there are enough."""

    shares_head = True
    device_name = "cpu"

    def __init__(self, model: ModelConfig, config: EngineConfig, ahead: MemoryAhead | None = None) -> None:
        """Serve `model`; its devices get the memory that was taken `ahead`."""
        self._model, self._config, self._ahead = model, config, ahead
        self._memories: list[HostMemory] = []  # of devices that are not open yet
        self.dtype, self.chunk_bytes = _host_dtype(config.dtype), config.chunk_bytes
        self._kv_dtype = _host_kv_dtype(config.kv_cache_dtype, self.dtype)
        self.faults = Faults(config.faults)
        self._views: list[DeviceView] = []
        self._num_first = 0  # chunks of a device that may hold weights, which a start fills
        self._devices: list[HostDevice] = []  # with those that are gone, whose threads may not have ended
        self._new_decoder: Callable[[DeviceMemory], Decoder]
        self._executor: DeviceExecutor
        self._new_team: Callable[[], Team] | None = None  # where devices can help each other

    @property
    def kv_dtype(self) -> torch.dtype:
        """See `Machine.kv_dtype`."""
        return self._kv_dtype

    def views(self, shape: ModelShape) -> list[DeviceView]:
        """See `Machine.views`."""
        config, indices = self._config, self._config.devices.indices
        weights = shape.weight_chunks(0, shape.num_layers) * shape.chunk_bytes
        if self._ahead is not None:
            self._memories, self._ahead = self._ahead.hand_over(), None
        available = available_bytes() + sum(memory.num_reserved for memory in self._memories)
        default = max(0, min(DEFAULT_KV_BYTES, available * 4 // 5 // len(indices) - weights))
        kv_bytes = default if config.kv_bytes is None else config.kv_bytes
        budget = budget_chunks(shape, config.device_memory_bytes, config.num_blocks_override, kv_bytes)
        if (needed := budget * self.chunk_bytes * len(indices)) > available:
            raise ConfigError(
                f"{len(indices)} device(s) of {format_size(budget * self.chunk_bytes)} need {format_size(needed)}: "
                f"{format_size(available)} of host memory are available. Lower --device-memory or use fewer devices"
            )
        self._views = [DeviceView(index, budget) for index in indices]
        self._num_first = shape.weight_chunks(0, shape.num_layers)
        return self._views

    def open(self) -> Sequence[Device]:
        """See `Machine.open`."""
        torch.set_num_threads(1)  # a device computes on its own thread
        try:
            with ThreadPoolExecutor(len(self._views)) as threads:
                memories = [self._memories.pop(0) if self._memories else None for _ in self._views]
                first = [self._num_first] * len(self._views)
                opened = list(threads.map(self._open_one, self._views, memories, first))
        except BaseException:
            self.close()
            raise
        return [self.faults.wrap(view.device, device) for view, device in zip(self._views, opened, strict=True)]

    def _open_one(self, view: DeviceView, memory: HostMemory | None = None, num_first: int | None = None) -> HostDevice:
        cores = self._cores()
        core = cores[view.device] if cores else None
        device = HostDevice(view.device, view.budget_chunks, self.chunk_bytes, core, memory, num_first)
        self._devices.append(device)
        return device

    def _cores(self) -> list[int]:
        """Return the cores, of which each device has its own; none if there are too few."""
        cores = sorted(os.sched_getaffinity(0))
        return cores if len(self._views) <= len(cores) else []

    def _join(self, device: HostDevice) -> None:
        """Let idle devices help `device` compute, if each has a core of its own: else they would take the device's."""
        if self._new_team is not None and self._cores():
            device.join(self._new_team(), self._devices)

    def reopen(self, device: int, remember: Callable[[Device], DeviceMemory]) -> DeviceMemory:
        """See `Machine.reopen`. Its faults do not come again."""
        view = self._views[device]
        self._close([old for old in self._devices if old.index == view.device])  # or its memory would be lacking
        try:
            memory = remember(self._open_one(view))
        except ConfigError as error:  # no memory any more
            raise ConflictError(error.message) from None
        self._join(self._devices[-1])
        self._executor.renew(device, memory.device, self._new_decoder(memory))
        return memory

    def tell_phases(self, phases: Callable[[], Collection[str]]) -> None:
        """See `Machine.tell_phases`."""
        self.faults.phases = phases

    def host_weights(self, source: WeightSource) -> HostWeights:
        """See `Machine.host_weights`."""
        units = weight_units(self._model, self.dtype)
        return keep_host_copy(self._config.host_copy, source, units)

    def executor(self, memories: Sequence[DeviceMemory], max_model_len: int) -> tuple[Executor, str]:
        """See `Machine.executor`."""
        ops, note = cpu_ops_or_reference(self.dtype, self._model.head_dim)
        self._new_team = ops.new_team if isinstance(ops, CpuOps) else None
        for device in self._devices:
            self._join(device)

        def new_decoder(memory: DeviceMemory) -> Decoder:
            if isinstance(ops, CpuOps):
                return CpuDecoder(self._model, ops, memory.weights, memory.kv, max_model_len)
            return Decoder(self._model, ops, memory.weights, memory.kv, max_model_len)

        self._new_decoder = new_decoder
        decoders, devices = [new_decoder(memory) for memory in memories], [memory.device for memory in memories]
        self._executor = DeviceExecutor(devices, decoders, shares_head=self._model.tie_embeddings)
        self._take_rest(memories)
        return self._executor, note

    def _take_rest(self, memories: Sequence[DeviceMemory]) -> None:
        """Take what the first requests will use; the rest is taken while they are served."""
        devices = {device.index: device for device in self._devices}

        def take(view: DeviceView, memory: DeviceMemory) -> None:
            turns, everything = memory.kv.chunks_by_turn, range(view.budget_chunks)
            first = memory.weights.mapped_chunks + [chunk for turn in turns[:1] for chunk in turn]
            then = [chunk for turn in turns[1:] for chunk in turn]
            last = sorted({*everything} - {*first} - {*then})
            devices[view.device].take_rest(first, then + last, self._new_look())

        with ThreadPoolExecutor(len(memories)) as threads:
            list(threads.map(take, self._views, memories))

    def _new_look(self) -> Callable[[], bool]:
        """Return a function that tells whether any device has computed since it was last called."""
        seen = 0

        def has_computed() -> bool:
            nonlocal seen
            before, seen = seen, sum(device.num_begun for device in self._devices)
            return seen != before or any(device.has_work for device in self._devices)

        return has_computed

    def close(self) -> None:
        """See `Machine.close`."""
        self._close(self._devices)
        for memory in self._memories + (self._ahead.hand_over() if self._ahead else []):
            memory.close()
        self._memories, self._ahead = [], None

    def _close(self, devices: Sequence[HostDevice]) -> None:
        with ThreadPoolExecutor(len(devices) or 1) as threads:  # each may wait for what does not end
            list(threads.map(HostDevice.close, devices))
        self._devices[:] = [device for device in self._devices if device.is_open]  # their mates have this very list

    def stuck(self) -> list[str]:
        """See `Machine.stuck`."""
        return [device.name for device in self._devices]


def _host_dtype(name: str) -> torch.dtype:
    """Return the dtype of weights. "auto" is float32 on CPU devices: they have no fast bfloat16."""
    known = {"auto": torch.float32, "float32": torch.float32, "float64": torch.float64}
    if name not in known:
        raise ConfigError(f"--dtype {name} is not served on CPU devices; use one of {', '.join(known)}")
    return known[name]


def _host_kv_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of KV on CPU devices whose weights have `dtype`. ConfigError for one that they do not serve."""
    known = {"auto": dtype, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in known:
        raise ConfigError(f"--kv-cache-dtype {name} is not served on CPU devices; use one of {', '.join(known)}")
    return known[name]
