"""A machine whose devices compute nothing: what is left of a server's work is the host's (scripts/bench_host.py)."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from kunserve.compute.sampler import SampledToken
from kunserve.engine.group import Group
from kunserve.engine.launch.machine import Machine
from kunserve.engine.occupancy import Passage
from kunserve.engine.step.executor import Executor
from kunserve.engine.step.microbatch import StepInputs
from kunserve.gpu.device import Device
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.host_weights import HostWeights
from kunserve.gpu.null import NullDevice
from kunserve.gpu.queue import WorkQueue
from kunserve.model.checkpoint import WeightSource
from kunserve.model.host_copy import HostCopy
from kunserve.planner.snapshot import DeviceView, ModelShape

T = TypeVar("T")

NUM_BLOCKS = 1 << 17  # of each device
LETTERS = range(97, 123)  # what is sampled: one letter a token, so that every token is text


class NullQueue(NullDevice):
    """A device that computes nothing, on a thread of its own as real ones have."""

    def __init__(self, index: int, num_chunks: int, chunk_bytes: int) -> None:
        super().__init__(index, num_chunks, chunk_bytes)
        self._queue = WorkQueue(f"null-{index}")

    def run(self, work: Callable[[], T]) -> Awaitable[T]:  # type: ignore[override]  # as soon as it is called
        """See `Device.run`."""
        return self._queue.run(work)

    def close(self) -> None:
        """See `Device.close`."""
        self._queue.close()
        super().close()


class NullExecutor(Executor):
    """Makes a microbatch's arrays as all executors do, and lets its devices wait instead of compute."""

    def __init__(self, devices: Sequence[Device], step_s: float) -> None:
        super().__init__()
        self._devices, self._step_s = devices, step_s

    async def pass_through(self, group: Group, inputs: StepInputs, passage: Passage) -> list[SampledToken]:
        """See `Executor.pass_through`."""
        tokens = list[SampledToken]()
        for position, stage in enumerate(group.stages):
            is_last = position == len(group.stages) - 1
            with passage.at(position):
                tokens = await self._devices[stage.device].run(partial(self._compute, inputs, is_last))
        return tokens

    def _compute(self, inputs: StepInputs, is_last: bool) -> list[SampledToken]:
        """Wait, and sample letters that depend on how far a request has come."""
        time.sleep(self._step_s)
        if not is_last:
            return []
        first = int(inputs.context_lens[0])
        tokens = [SampledToken(LETTERS[(first + row) % len(LETTERS)]) for row in range(len(inputs.sampling))]
        inputs.sampled.set_result([token.token_id for token in tokens])
        return tokens


class NullMachine(Machine):
    """Devices that compute nothing."""

    dtype, chunk_bytes, shares_head, device_name = torch.float32, 2 << 20, False, "null"

    def __init__(self, num_devices: int, step_s: float) -> None:
        self._num_devices, self._step_s = num_devices, step_s
        self._views: list[DeviceView] = []
        self._devices: list[NullQueue] = []

    def views(self, shape: ModelShape) -> list[DeviceView]:
        """See `Machine.views`: room for all streams on one device."""
        num_chunks = shape.weight_chunks(0, shape.num_layers) + shape.num_layers * shape.chunks_for(NUM_BLOCKS)
        self._views = [DeviceView(index, num_chunks) for index in range(self._num_devices)]
        return self._views

    def open(self) -> Sequence[Device]:
        """See `Machine.open`."""
        self._devices = [NullQueue(view.device, view.budget_chunks, self.chunk_bytes) for view in self._views]
        return self._devices

    def host_weights(self, source: WeightSource) -> HostWeights:
        """See `Machine.host_weights`."""
        return HostWeights(HostCopy.PINNED, source)

    def executor(self, memories: Sequence[DeviceMemory], max_model_len: int) -> tuple[Executor, str]:
        """See `Machine.executor`."""
        return NullExecutor([memory.device for memory in memories], self._step_s), "nothing"

    def close(self) -> None:
        """See `Machine.close`."""
        while self._devices:
            self._devices.pop().close()
