"""Takes a microbatch through its chain: device after device, without ever blocking the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from kunserve.engine.group import Group
from kunserve.engine.microbatch import StepInputs
from kunserve.engine.sampler import SampledToken
from kunserve.engine.stage import run_last_stage, run_stage
from kunserve.gpu.device import Device
from kunserve.model.decoder import Decoder


class Executor(Protocol):
    """Runs microbatches; the engine knows nothing else of how."""

    async def execute(self, group: Group, inputs: StepInputs) -> list[SampledToken]:
        """Pass a microbatch through all stages of `group`; one token per sampled row, in their order.

        Microbatches of one group pass each stage in the order of the calls. Whatever a stage raises comes out.
        Tokens that `inputs` lacks are taken from `inputs.ahead_of`, and what is sampled is put into `inputs.sampled`,
        without waiting for the caller.
        """


class DeviceExecutor:
    """Runs stages on real devices, each on its compute queue."""

    def __init__(self, devices: Sequence[Device], decoders: Sequence[Decoder]) -> None:
        self._devices, self._decoders = devices, decoders

    async def execute(self, group: Group, inputs: StepInputs) -> list[SampledToken]:
        """See `Executor.execute`."""
        x: Tensor | None = None
        *first, last = enumerate(group.stages)
        try:
            for position, stage in first:
                decoder = self._decoders[stage.device]
                x = await self._devices[stage.device].run(partial(run_stage, decoder, stage, position, inputs, x))
            position, stage = last
            decoder = self._decoders[stage.device]
            return await self._devices[stage.device].run(partial(run_last_stage, decoder, stage, position, inputs, x))
        except BaseException:
            inputs.sampled.cancel()  # a device may be waiting for it
            raise
