"""Takes a microbatch through its chain: device after device, without ever blocking the event loop."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, final
from weakref import WeakKeyDictionary

from torch import Tensor

from kunserve.compute.decoder import Decoder
from kunserve.compute.sampler import SampledToken
from kunserve.engine.batch import Microbatch
from kunserve.engine.group import Group
from kunserve.engine.occupancy import Passage
from kunserve.engine.step.kept_rows import KeptRows
from kunserve.engine.step.microbatch import StepInputs, step_inputs
from kunserve.engine.step.shared_head import HeadBalance, SharedHead
from kunserve.engine.step.stage import has_scored_rows, run_last_stage, run_stage, run_timed
from kunserve.errors import EngineError, KunServeError
from kunserve.gpu.device import Device

T = TypeVar("T")


class StepError(EngineError):
    """A step failed: with which error, and on which device, if that is known."""

    def __init__(self, error: Exception, device: int | None) -> None:
        message = error.message if isinstance(error, KunServeError) else f"a step failed: {error!r}"
        super().__init__(message)
        self.error, self.device = error, device


class Executor(ABC):
    """Runs microbatches; the engine knows nothing else of how.

    `shares_head`: both ends of a chain compute the head, each for a part of the vocabulary.
    """

    shares_head = False

    def __init__(self) -> None:
        self._kept_rows = WeakKeyDictionary[Group, KeptRows]()  # from one microbatch of a group to the next

    def inputs(self, group: Group, batch: Microbatch, eos_token_ids: tuple[int, ...]) -> Any:
        """Take what `execute` needs of a microbatch now: its requests may change later."""
        if (kept := self._kept_rows.get(group)) is None:
            kept = self._kept_rows[group] = KeptRows()
        return step_inputs(batch, group.block_size, eos_token_ids, group.in_flight[0], kept)

    @final
    async def execute(self, group: Group, inputs: Any, stage_s: list[float] | None = None) -> list[SampledToken]:
        """Pass a microbatch through all stages of `group`; one token, or its error, per sampled row, in their order.

        Microbatches of one group pass each stage in the order of the calls. StepError if a stage raises.
        `stage_s` as in `Passage`.
        Keeps the group's occupancy: an executor that does not say where a microbatch is fails its first step, as
        bubbles that nobody measured would look like none.
        """
        passage = Passage(group.occupancy, asyncio.get_running_loop().time, stage_s)
        try:
            tokens = await self.pass_through(group, inputs, passage)
        except Exception as error:
            position = passage.failed_at
            raise StepError(error, None if position is None else group.stages[position].device) from error
        passage.check()
        return tokens

    async def probe(self, group: Group | None, device: int) -> None:
        """Let a device do work that has to succeed on any that is sound, whatever a client sent: raises if it fails.

        `group`: the one that it serves in.
        """
        return

    @abstractmethod
    async def pass_through(self, group: Group, inputs: Any, passage: Passage) -> list[SampledToken]:
        """Do what `execute` promises, and tell `passage` while the microbatch is work of a stage.

        Tokens that `inputs` lacks are taken from `inputs.depends_on`, and what is sampled is put into `inputs.sampled`,
        without waiting for the caller.
        """


class DeviceExecutor(Executor):
    """Runs stages on real devices, each on its compute queue.

    `shares_head`: both ends of a chain hold the head (tied embeddings) and compute it, each for a part of the
    vocabulary. In a small model it costs as much as many layers, and at one end alone it would unbalance the chain.
    """

    def __init__(self, devices: Sequence[Device], decoders: Sequence[Decoder], *, shares_head: bool = False) -> None:
        super().__init__()
        self._devices, self._decoders, self.shares_head = list(devices), list(decoders), shares_head
        self._balances = WeakKeyDictionary[Group, HeadBalance]()
        self._entrances = WeakKeyDictionary[Group, asyncio.Lock]()  # of chains: one microbatch after the other

    def renew(self, index: int, device: Device, decoder: Decoder) -> None:
        """Compute on another device in the place of one that is gone."""
        self._devices[index], self._decoders[index] = device, decoder

    async def pass_through(self, group: Group, inputs: StepInputs, passage: Passage) -> list[SampledToken]:
        """See `Executor.pass_through`."""
        take = self._pass_chain if len(group.stages) > 1 else self._run_alone
        try:
            return await take(group, inputs, passage)
        except BaseException:
            inputs.sampled.cancel()  # somebody may be waiting for it
            raise

    async def _run_alone(self, group: Group, inputs: StepInputs, passage: Passage) -> list[SampledToken]:
        """Run on one device, whose queue keeps the order: what the microbatch before has sampled is there in time."""
        [stage] = group.stages
        work = partial(run_last_stage, self._decoders[stage.device], stage, 0, inputs, None)
        return await self._run(group, 0, passage, work)

    async def _pass_chain(self, group: Group, inputs: StepInputs, passage: Passage) -> list[SampledToken]:
        x = await self._enter(group, inputs, passage)
        *between, last = list(enumerate(group.stages))[1:]
        for position, stage in between:
            decoder = self._decoders[stage.device]
            x = await self._run(group, position, passage, partial(run_stage, decoder, stage, position, inputs, x))
        if self.shares_head and inputs.sampling:
            if not has_scored_rows(inputs.sampling):
                return await self._end_at_both_ends(group, inputs, x, passage)
            passage.stage_s = None  # the times would be taken for those of a head that is shared
        position, stage = last
        decoder = self._decoders[stage.device]
        return await self._run(group, position, passage, partial(run_last_stage, decoder, stage, position, inputs, x))

    async def _enter(self, group: Group, inputs: StepInputs, passage: Passage) -> Tensor:
        """Run the first stage, once its tokens are known: its device must not wait for them, as it may sample some."""
        stage = group.stages[0]
        async with self._entrances.setdefault(group, asyncio.Lock()):
            if inputs.depends_on is not None:
                await asyncio.wait([asyncio.wrap_future(inputs.depends_on)])
            work = partial(run_stage, self._decoders[stage.device], stage, 0, inputs, None)
            running = asyncio.ensure_future(self._run(group, 0, passage, work))  # queued before the next one enters
        return await running

    async def _end_at_both_ends(
        self, group: Group, inputs: StepInputs, x: Tensor, passage: Passage
    ) -> list[SampledToken]:
        """Run the last stage, and the head at each end of the chain."""
        (first, start), (last, end) = (0, group.stages[0]), (len(group.stages) - 1, group.stages[-1])
        first_decoder, last_decoder = self._decoders[start.device], self._decoders[end.device]
        head = SharedHead(inputs, self._balances.setdefault(group, HeadBalance()), last_decoder.vocab_size)

        async def other_part() -> list[SampledToken]:
            await asyncio.wait([asyncio.wrap_future(head.first_can_begin)])
            if head.first_can_begin.cancelled():  # the last stage failed, and says why
                return []
            work = partial(head.run_first, first_decoder)
            while (tokens := await self._run(group, first, passage, work)) is None:
                await asyncio.wait([asyncio.wrap_future(head.is_multiplied)])
            return tokens

        rest = asyncio.ensure_future(other_part())
        try:
            work = partial(head.run_last, last_decoder, end, last, x)
            tokens = await self._run(group, last, passage, work)  # queued at once: no microbatch overtakes another
        except BaseException:
            rest.cancel()
            await asyncio.wait([rest])
            raise
        tokens += await rest
        head.learn()
        return tokens

    async def probe(self, group: Group | None, device: int) -> None:
        """See `Executor.probe`."""
        await probe_weights(group, device, self._decoders[device], self._devices[device])

    async def _run(self, group: Group, position: int, passage: Passage, work: Callable[[], T]) -> T:
        """Run work of one stage on its device."""
        if passage.stage_s is not None:
            work = partial(run_timed, work, passage.stage_s, position)
        with passage.at(position):
            return await self._devices[group.stages[position].device].run(work)


async def probe_weights(group: Group | None, index: int, decoder: Decoder, device: Device) -> None:
    """Pass one row through the weights that device `index` has in a group; raises if that fails."""
    for stage in group.stages if group is not None else ():
        if stage.device == index:
            await device.run(partial(decoder.probe, stage.first_layer, stage.last_layer))
