"""Remap: applies layouts, to all devices of a transition or to none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import structlog

from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group, Stage
from kunserve.engine.regroup.weight_loader import WeightLoader
from kunserve.gpu.device_memory import DeviceMemory, Layout
from kunserve.gpu.links import Links
from kunserve.gpu.queue import gather_all
from kunserve.gpu.refusal import log_failure
from kunserve.model.config import ModelConfig
from kunserve.model.layout import units_of_stage
from kunserve.planner.layouts import blocks_of, stage_layout
from kunserve.planner.plan import DeviceLayout
from kunserve.planner.snapshot import ModelShape, StageView

Layouts = dict[int, Layout]  # by device

log = structlog.get_logger()

ATTEMPTS = 3  # at what has to succeed


class Remap:
    """Brings devices to layouts: of a plan, of before, or those that their groups have by themselves.

    `lose` gives up a device, which cannot be brought to any layout, for a reason.
    """

    def __init__(
        self,
        fleet: Fleet,
        model: ModelConfig,
        shape: ModelShape,
        memories: Sequence[DeviceMemory],
        loader: WeightLoader,
        links: Links,
        lose: Callable[[int, str], None],
    ) -> None:
        self._fleet, self._model, self.shape, self.memories = fleet, model, shape, memories
        self._loader, self._links, self._lose = loader, links, lose
        # Whoever goes back may copy weights from any device that has them: no other merge may drop them meanwhile.
        self._turn = asyncio.Lock()

    # --- layouts ------------------------------------------------------------------------------------------------

    def of_stage(self, stage: StageView) -> Layout:
        """Return the layout of a device that serves one stage and nothing else."""
        return self._layout(stage_layout(self.shape, self.memories[stage.device].pool.num_chunks, stage))

    def planned(self, layouts: Iterable[DeviceLayout]) -> Layouts:
        """Return planned layouts as devices take them."""
        return {planned.stage.device: self._layout(planned) for planned in layouts}

    def _layout(self, planned: DeviceLayout) -> Layout:
        stage = planned.stage
        return Layout(units_of_stage(self._model, stage.first_layer, stage.last_layer), planned.kv_chunks)

    def units_beyond(self, stage: StageView) -> list[str]:
        """Return the weight units that a device holds and `stage` does not need."""
        kept = units_of_stage(self._model, stage.first_layer, stage.last_layer)
        return [unit for unit in self.memories[stage.device].weights.present if unit not in kept]

    def num_blocks(self, stage: Stage | StageView) -> tuple[int, ...]:
        """Return how many blocks of each kind the layers of a stage have mapped."""
        return blocks_of(
            self.shape,
            DeviceLayout(
                StageView(stage.device, stage.first_layer, stage.last_layer),
                self.memories[stage.device].layout.kv_chunks,
            ),
        )

    def now(self, groups: Iterable[Group]) -> Layouts:
        """Return the layouts that the groups' devices have."""
        return {stage.device: self.memories[stage.device].layout for group in groups for stage in group.stages}

    # --- verbs --------------------------------------------------------------------------------------------------

    async def apply(self, layouts: Layouts) -> None:
        """Rearrange all devices at once, each on its compute queue.

        If one fails, all go back, with their weights filled again, before the error is raised. A device that cannot
        go back is lost: weights or KV that its group needs are not there any more.
        """
        async with self._turn:
            before = {device: self.memories[device].layout for device in layouts}
            try:
                await self._rearrange(layouts)
            except BaseException as error:
                await self._all_back(before, error)
                raise

    async def go_back(self, before: Layouts, error: BaseException) -> None:
        """Bring devices back to layouts of before, with their weights, after an error; one that cannot be is lost."""
        async with self._turn:
            await self._all_back(before, error)

    async def _all_back(self, before: Layouts, error: BaseException) -> None:
        is_stopping = isinstance(error, asyncio.CancelledError)  # then nobody needs weights any more
        await asyncio.gather(*(self._go_back(device, layout, is_stopping) for device, layout in before.items()))

    async def _go_back(self, device: int, before: Layout, is_stopping: bool) -> None:
        for attempts_left in reversed(range(ATTEMPTS)):
            if self.memories[device].device.is_lost:
                return
            try:
                await self._rearrange({device: before})
                await self.load([device], lambda: is_stopping)
                return
            except Exception as error:
                log.error("rolling back failed", device=device, error=repr(error), attempts_left=attempts_left)
                if not attempts_left:
                    self._lose(device, f"a transition failed and could not be rolled back: {error}")

    async def load(self, devices: Iterable[int], is_cancelled: Callable[[], bool] = lambda: False) -> int:
        """Fill the units that are mapped but not filled, all devices at once, in the background; returns bytes loaded.

        Each unit takes its turns on the link that it comes over; between two of them it stops if it is cancelled.
        """

        async def load(device: int) -> int:
            memory, loaded = self.memories[device], 0
            for unit in memory.weights.unfilled:
                if is_cancelled():
                    break
                await self._loader.load(device, unit, self._links)
                loaded += memory.weights.num_chunks(unit) * memory.device.chunk_bytes
            return loaded

        return sum(await gather_all(load(device) for device in devices))

    def num_unfilled_bytes(self, devices: Iterable[int]) -> int:
        """Return the bytes of weights that `load` would bring to these devices."""
        weights = [self.memories[device].weights for device in devices]
        return sum(w.num_chunks(unit) for w in weights for unit in w.unfilled) * self.shape.chunk_bytes

    async def resize_kv(self, device: int, chunks: Mapping[int, int]) -> None:
        """Give some layers of a device another number of KV chunks. What others ask for at the same time stands."""
        memory = self.memories[device]

        def resize() -> None:  # of the layout that is there then: it may change until its turn has come
            before = memory.layout
            after = Layout(before.units, tuple(chunks.get(i, n) for i, n in enumerate(before.kv_chunks)))
            if after != before:
                memory.rearrange(after)

        await memory.device.run(resize)

    async def reassign_chunks(self, stages: Iterable[Stage]) -> None:
        """Unmap KV of layers that are not served here any more, and give the chunks to those that are.

        Tries more than once: nobody would use these chunks until the next transition.
        """
        stages = list(stages)
        layouts = {stage.device: self.of_stage(stage.view) for stage in stages}
        for attempts_left in reversed(range(ATTEMPTS)):
            try:
                await self._rearrange(layouts)
                break
            except Exception as error:
                if not attempts_left:
                    raise
                log_failure("chunks could not be reassigned, trying again", error, attempts_left=attempts_left)
        for stage in stages:
            self._fleet.grow(stage.device, *self.num_blocks(stage))

    async def _rearrange(self, layouts: Layouts) -> None:
        work = []
        for device, layout in layouts.items():
            memory = self.memories[device]
            if memory.layout != layout:
                work.append(memory.device.run(partial(memory.rearrange, layout)))
        await gather_all(work)
