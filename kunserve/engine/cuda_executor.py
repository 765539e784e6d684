"""Takes a microbatch through a chain of CUDA devices: stages are launched at once, ordered by events on the GPUs.

The host waits for nothing but the tokens at the end, so that launches run ahead of the devices; several microbatches
are on their way through a chain, and none leaves a gap between its stages.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from kunserve.engine.executor import Executor
from kunserve.engine.group import Group, Stage
from kunserve.engine.microbatch import StepInputs
from kunserve.engine.sampler import SampledToken
from kunserve.engine.stage import run_stage
from kunserve.gpu.cuda import CudaDevice
from kunserve.gpu.cuda_stream import Launched
from kunserve.model.cuda_decoder import CudaDecoder
from kunserve.model.cuda_sampling import PendingTokens, launch_sample


class CudaExecutor(Executor):
    """`Executor` on CUDA devices."""

    def __init__(self, devices: Sequence[CudaDevice], decoders: Sequence[CudaDecoder]) -> None:
        self._devices, self.decoders = devices, decoders

    async def execute(self, group: Group, inputs: StepInputs) -> list[SampledToken]:
        """See `Executor.execute`. A cancelled caller waits: requests' blocks must not change under the work."""
        running = asyncio.ensure_future(self._pass(group, inputs))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):
                await asyncio.wait([running])
                running.exception()  # seen: the caller is gone
            raise

    async def _pass(self, group: Group, inputs: StepInputs) -> list[SampledToken]:
        launched: Launched[Tensor] | None = None
        *stages, last = enumerate(group.stages)
        try:
            for position, stage in stages:
                x = launched.value if launched else inputs.token_ids
                work = partial(run_stage, self.decoders[stage.device], stage, position, inputs, x)
                launched = await self._devices[stage.device].launch(work, [launched.ready] if launched else ())
            position, stage = last
            x, after = (launched.value, [launched.ready]) if launched else (inputs.token_ids, [])
            end = partial(_launch_last_stage, self.decoders[stage.device], stage, position, inputs, x)
            pending = await self._devices[stage.device].launch(end, after)
        except BaseException:
            if launched:  # what earlier stages still do with the requests' blocks
                with contextlib.suppress(Exception):
                    await self._devices[group.stages[0].device].finish(launched)
            raise
        return (await self._devices[stage.device].finish(pending)).tokens()


def _launch_last_stage(
    decoder: CudaDecoder, stage: Stage, position: int, inputs: StepInputs, x: Tensor
) -> PendingTokens:
    """Launch the stage at the end of a chain and the sampling of one token per sampled row."""
    pending = launch_sample(run_stage(decoder, stage, position, inputs, x), inputs.sampling)
    decoder.feed(pending.on_device)
    return pending
