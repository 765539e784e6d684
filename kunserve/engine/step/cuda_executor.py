"""Takes a microbatch through a chain of CUDA devices: stages are launched at once, ordered by events on the GPUs.

The host waits for nothing but the tokens at the end, so that launches run ahead of the devices; several microbatches
are on their way through a chain, and none leaves a gap between its stages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor

from kunserve.compute.cuda.decoder import CudaDecoder
from kunserve.compute.cuda.sampling import PendingTokens, is_plain, sampled
from kunserve.compute.sampler import SampledToken, SamplingRow, reads_output, sample
from kunserve.engine.group import Group
from kunserve.engine.occupancy import Passage
from kunserve.engine.step.executor import Executor, probe_weights
from kunserve.engine.step.microbatch import StepInputs, fill_sampling
from kunserve.engine.step.stage import has_scored_rows, run_stage, sample_in_slices
from kunserve.gpu.cuda.copy import bring
from kunserve.gpu.cuda.device import CudaDevice
from kunserve.gpu.cuda.stream import Launched
from kunserve.gpu.queue import to_the_end
from kunserve.gpu.watched import WatchedDevice

_PreviousTokens = Launched[PendingTokens] | None


class CudaExecutor(Executor):
    """`Executor` on CUDA devices."""

    def __init__(
        self, devices: Sequence[CudaDevice], decoders: Sequence[CudaDecoder], watched: Sequence[WatchedDevice]
    ) -> None:
        """Run on `devices`. `watched`: the same devices, as those see them who wait no longer than they live."""
        super().__init__()
        self.devices, self.decoders, self._watched = devices, decoders, watched
        self._turns = [asyncio.Lock() for _ in devices]  # who launches next, of those that begin on a device

    async def probe(self, group: Group | None, device: int) -> None:
        """See `Executor.probe`."""
        await probe_weights(group, device, self.decoders[device], self._watched[device])

    async def pass_through(self, group: Group, inputs: StepInputs, passage: Passage) -> list[SampledToken]:
        """See `Executor.pass_through`. A cancelled caller waits: requests' blocks must not change under the work."""
        return await to_the_end(self._pass(group, inputs, passage))

    async def _pass(self, group: Group, inputs: StepInputs, passage: Passage) -> list[SampledToken]:
        last, plain = self.devices[group.stages[-1].device], is_plain(inputs.sampling)
        seen: asyncio.Future[Any] | None = None  # done when all that was launched so far is
        at = 0  # the stage that is being launched
        is_timed = passage.stage_s is not None
        timed = list[tuple[int, Launched[Any]]]()  # with the positions of their stages

        def see(position: int, launched: Launched[Any]) -> None:
            nonlocal seen
            if is_timed:  # else nobody keeps what a stage has handed on
                timed.append((position, launched))
            index = group.stages[position].device
            finish = self._watched[index].wait_for(self.devices[index].finish(launched))
            seen = asyncio.ensure_future(_finish(finish, passage.at(position), seen))

        try:
            async with self._turns[group.stages[0].device]:
                previous = await _previous_tokens(inputs)
                launched = await self._launch(group, 0, inputs, previous, is_plain=plain, is_timed=is_timed)
            if previous is not None and len(group.stages) > 1:
                # Until these tokens are there the first stage has nothing to do: a bubble. Only this waits on the
                # sampling queue's thread: on the compute queue's it would stand behind microbatches that end later.
                last_device = self._watched[group.stages[-1].device]
                seen = asyncio.ensure_future(last_device.wait_for(last.sampling.finish(previous)))
            see(0, launched)
            for at in range(1, len(group.stages)):
                launched = await self._launch(group, at, inputs, previous, launched, is_plain=plain, is_timed=is_timed)
                see(at, launched)
            if not plain:
                decoder = self.decoders[group.stages[-1].device]
                work = partial(_sample_on_host, last, decoder, launched.value, inputs, previous)
                watched = self._watched[group.stages[-1].device]
                sampling = last.sampling.launch(work, [launched], is_timed=is_timed)
                launched = await watched.wait_for(sampling)
                see(at, launched)
            inputs.sampled.set_result(launched)
        except BaseException:
            inputs.sampled.cancel()
            if seen is not None:  # what earlier stages still do with the requests' blocks
                await asyncio.wait([seen])
                seen.exception()  # nobody else asks for it
            passage.fails(at)  # unless an earlier one has
            raise
        assert seen is not None
        pending: PendingTokens = await seen
        if passage.stage_s is not None:
            for position, part in timed:
                passage.stage_s[position] += part.seconds
        return pending.tokens()

    async def _launch(
        self,
        group: Group,
        position: int,
        inputs: StepInputs,
        previous: _PreviousTokens,
        before: Launched[Tensor] | None = None,
        *,
        is_plain: bool,
        is_timed: bool,
    ) -> Launched[Any]:
        """Launch the stage at `position` behind the one `before`; the first behind the `previous` microbatch's tokens.

        The last returns tokens, or where the host has to look at them, logits; where prompts are scored, hidden states.
        """
        stage = group.stages[position]
        device, decoder, is_last = (
            self.devices[stage.device],
            self.decoders[stage.device],
            position + 1 == len(group.stages),
        )
        sender = self.devices[group.stages[position - 1].device]  # to the first stage the last one sends its tokens

        def work() -> Any:
            if before:
                x = bring(sender, device, before.value)
            elif previous is None:
                x = inputs.token_ids.clamp(min=0)  # what failed needs no tokens
            else:
                decoder.put_previous_tokens(bring(sender, device, previous.value.on_device))
                x = inputs.token_ids
            if is_last and is_plain:
                batch, rows = inputs.attention(position), inputs.sampled_rows
                return decoder.launch_tokens(stage.first_layer, x, batch, rows, inputs.sampling)
            with_head = not (is_last and has_scored_rows(inputs.sampling))
            return run_stage(decoder, stage, position, inputs, x, with_head=with_head)

        needed = before or previous
        launch = device.launch(work, [needed] if needed else (), is_timed=is_timed)
        return await self._watched[stage.device].wait_for(launch)


async def _finish(
    finish: Coroutine[Any, Any, Any],
    at_stage: AbstractContextManager[None],
    before: asyncio.Future[Any] | None,
) -> Any:
    """Wait for what was launched: work of its stage from when `before` is done. Raises what failed first."""
    error = None
    if before is not None:
        await asyncio.wait([before])
        error = before.exception()
    with at_stage:
        value = await finish  # even if one before has failed: it uses the requests' blocks
    if error is not None:
        raise error
    return value


async def _previous_tokens(inputs: StepInputs) -> _PreviousTokens:
    """Return what the microbatch before has sampled, once that is launched; None if there is none, or it has failed."""
    if inputs.depends_on is None:
        return None
    pending = asyncio.wrap_future(inputs.depends_on)
    await asyncio.wait([pending])
    return None if pending.cancelled() else pending.result()


def _sample_on_host(
    device: CudaDevice, decoder: CudaDecoder, y: Tensor, inputs: StepInputs, previous: _PreviousTokens
) -> PendingTokens:
    """Sample on the host a batch of which a row asks for more than `launch_sample` does; y: logits, or states."""
    rows = _rows(device, inputs, previous)
    return sampled(sample_in_slices(decoder, y, rows) if has_scored_rows(rows) else sample(y, rows), y.device)


def _rows(device: CudaDevice, inputs: StepInputs, previous: _PreviousTokens) -> Sequence[SamplingRow]:
    """Return the sampling rows. Waits for the tokens before only if a row depends on which they are."""
    if inputs.depends_on is None or not any(reads_output(row.params) for row in inputs.sampling):
        return inputs.sampling
    token_ids: list[int] | None = None
    if previous is not None:
        device.driver.synchronize_event(previous.ready)
        token_ids = [token.token_id for token in previous.value.tokens()]
    return fill_sampling(inputs.sampling, token_ids)
