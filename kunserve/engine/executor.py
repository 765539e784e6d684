"""Takes a microbatch through its chain: device after device, without ever blocking the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from torch import Tensor

from kunserve.engine.group import Group
from kunserve.engine.microbatch import Microbatch, StepInputs, step_inputs
from kunserve.engine.sampler import SampledToken
from kunserve.engine.stage import run_head, run_last_layers, run_last_stage, run_stage
from kunserve.gpu.device import Device
from kunserve.gpu.queue import gather_all
from kunserve.model.decoder import Decoder

T = TypeVar("T")


class Executor(Protocol):
    """Runs microbatches; the engine knows nothing else of how."""

    def inputs(self, group: Group, batch: Microbatch, eos_token_ids: tuple[int, ...]) -> Any:
        """What `execute` needs of a microbatch, taken now: its requests may change later."""
        return step_inputs(batch, group.block_size, eos_token_ids)

    async def execute(self, group: Group, inputs: Any) -> list[SampledToken]:
        """Pass a microbatch through all stages of `group`; one token per sampled row, in their order.

        Microbatches of one group pass each stage in the order of the calls. Whatever a stage raises comes out.
        """


class DeviceExecutor(Executor):
    """Runs stages on real devices, each on its compute queue.

    `shares_head`: both ends of a chain hold the head (tied embeddings) and compute it, each for half of the rows. In a
    small model it costs as much as many layers, and at one end alone it would unbalance the chain.
    """

    def __init__(self, devices: Sequence[Device], decoders: Sequence[Decoder], *, shares_head: bool = False) -> None:
        self._devices, self._decoders, self._shares_head = devices, decoders, shares_head

    async def execute(self, group: Group, inputs: StepInputs) -> list[SampledToken]:
        """See `Executor.execute`."""
        x = inputs.token_ids
        *before, last = enumerate(group.stages)
        for position, stage in before:
            decoder = self._decoders[stage.device]
            x = await self._run(group, position, partial(run_stage, decoder, stage, position, inputs, x))
        position, stage = last
        decoder = self._decoders[stage.device]
        if before and self._shares_head and len(inputs.sampling) > 1:
            x = await self._run(group, position, partial(run_last_layers, decoder, stage, position, inputs, x))
            return await self._sample_at_both_ends(group, inputs, x)
        return await self._run(group, position, partial(run_last_stage, decoder, stage, position, inputs, x))

    async def _sample_at_both_ends(self, group: Group, inputs: StepInputs, x: Tensor) -> list[SampledToken]:
        """Hidden states (R, H) after the last layer; the last stage, which is free now, takes the odd row."""
        half = (len(x) + 1) // 2
        shares = ((len(group.stages) - 1, slice(half)), (0, slice(half, None)))
        tokens = await gather_all(
            self._run(
                group,
                position,
                partial(run_head, self._decoders[group.stages[position].device], x[rows], inputs.sampling[rows]),
            )
            for position, rows in shares
        )
        return [token for share in tokens for token in share]

    async def _run(self, group: Group, position: int, work: Callable[[], T]) -> T:
        """Work of one stage on its device; the group's occupancy shows it."""
        now_s = asyncio.get_running_loop().time
        group.occupancy.enter(position, now_s())
        try:
            return await self._devices[group.stages[position].device].run(work)
        finally:
            group.occupancy.leave(position, now_s())
