"""Virtual CPU devices as a `Machine`: budgets from the host's memory, decoders on the CPU's kernels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from kunserve.compute.cpu_ops import cpu_ops_or_reference
from kunserve.compute.decoder import Decoder
from kunserve.config import EngineConfig
from kunserve.engine.launch.machine import Machine
from kunserve.engine.launch.placement import budget_chunks
from kunserve.engine.step.executor import DeviceExecutor, Executor
from kunserve.errors import ConfigError
from kunserve.gpu.device import Device
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.host import HostDevice, available_bytes
from kunserve.gpu.host_weights import HostWeights, keep_host_copy
from kunserve.model.checkpoint import WeightSource
from kunserve.model.config import ModelConfig
from kunserve.model.layout import weight_units
from kunserve.planner.snapshot import DeviceView, ModelShape
from kunserve.sizes import format_size

DEFAULT_KV_BYTES = 1 << 30  # of one CPU device, where neither --device-memory nor a number of blocks is given


class HostMachine(Machine):
    """Virtual CPU devices, each with a thread pinned to a core of its own while there are enough."""

    shares_head = True
    device_name = "cpu"

    def __init__(self, model: ModelConfig, config: EngineConfig) -> None:
        self._model, self._config = model, config
        self.dtype, self.chunk_bytes = _host_dtype(config.dtype), config.chunk_bytes
        self._views: list[DeviceView] = []
        self._devices: list[HostDevice] = []

    def views(self, shape: ModelShape) -> list[DeviceView]:
        """See `Machine.views`."""
        config, indices = self._config, self._config.devices.indices
        weights = shape.weight_chunks(0, shape.num_layers) * shape.chunk_bytes
        available = available_bytes()
        default = max(0, min(DEFAULT_KV_BYTES, available * 4 // 5 // len(indices) - weights))
        kv_bytes = default if config.kv_bytes is None else config.kv_bytes
        budget = budget_chunks(shape, config.device_memory_bytes, config.num_blocks_override, kv_bytes)
        if (needed := budget * self.chunk_bytes * len(indices)) > available:
            raise ConfigError(
                f"{len(indices)} device(s) of {format_size(budget * self.chunk_bytes)} need {format_size(needed)}: "
                f"{format_size(available)} of host memory are available. Lower --device-memory or use fewer devices"
            )
        self._views = [DeviceView(index, budget) for index in indices]
        return self._views

    def open(self) -> Sequence[Device]:
        """See `Machine.open`."""
        cores = sorted(os.sched_getaffinity(0))
        is_pinned = len(self._views) <= len(cores)

        def open_one(view: DeviceView) -> HostDevice:
            core = cores[view.device] if is_pinned else None
            device = HostDevice(view.device, view.budget_chunks, self.chunk_bytes, core)
            self._devices.append(device)
            return device

        torch.set_num_threads(1)  # a device computes on its own thread
        try:
            with ThreadPoolExecutor(len(self._views)) as threads:
                return list(threads.map(open_one, self._views))
        except BaseException:
            self.close()
            raise

    def host_weights(self, source: WeightSource) -> HostWeights:
        """See `Machine.host_weights`."""
        units = weight_units(self._model, self.dtype.itemsize)
        return keep_host_copy(self._config.host_copy, source, units, self.dtype)

    def executor(self, memories: Sequence[DeviceMemory], max_model_len: int) -> tuple[Executor, str]:
        """See `Machine.executor`."""
        ops, note = cpu_ops_or_reference(self.dtype, self._model.head_dim)
        decoders = [Decoder(self._model, ops, m.weights, m.kv, max_model_len) for m in memories]
        devices = [memory.device for memory in memories]
        return DeviceExecutor(devices, decoders, shares_head=self._model.tie_embeddings), note

    def close(self) -> None:
        """See `Machine.close`."""
        while self._devices:
            self._devices.pop().close()


def _host_dtype(name: str) -> torch.dtype:
    """The dtype of weights and KV. "auto" is float32 on CPU devices: they have no fast bfloat16."""
    known = {"auto": torch.float32, "float32": torch.float32, "float64": torch.float64}
    if name not in known:
        raise ConfigError(f"--dtype {name} is not served on CPU devices; use one of {', '.join(known)}")
    return known[name]
