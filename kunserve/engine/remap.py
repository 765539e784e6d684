"""Remap: what each device's chunks are for before and after a transition, applied to all its devices or to none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import structlog

from kunserve.engine.group import Group, Stage
from kunserve.engine.weight_loader import WeightLoader
from kunserve.errors import DeviceError
from kunserve.gpu.device_memory import DeviceMemory, Layout
from kunserve.gpu.links import Links
from kunserve.gpu.queue import gather_all
from kunserve.model.config import ModelConfig
from kunserve.model.layout import units_of_stage
from kunserve.planner.plan import Merge, Part, Room
from kunserve.planner.snapshot import ModelShape, StageView

Layouts = dict[int, Layout]  # by device

log = structlog.get_logger()

ROLLBACK_ATTEMPTS = 3


class NoWayBackError(DeviceError):
    """Weights or KV that groups need are not on their devices any more."""


class Remap:
    """Layouts of stages, and the verbs that bring devices to them."""

    def __init__(
        self,
        model: ModelConfig,
        shape: ModelShape,
        memories: Sequence[DeviceMemory],
        loader: WeightLoader,
        links: Links,
    ) -> None:
        self._model, self.shape, self._memories = model, shape, memories
        self._loader, self._links = loader, links

    # --- layouts ------------------------------------------------------------------------------------------------

    def of_stage(self, stage: StageView) -> Layout:
        """A device that serves one stage and nothing else: its units, and all other chunks evenly for KV."""
        budget = self._memories[stage.device].pool.num_chunks
        chunks = self.shape.kv_chunks(budget, stage.first_layer, stage.last_layer)
        return self._layout(stage, dict.fromkeys(range(stage.first_layer, stage.last_layer), chunks))

    def of_parts(self, parts: Iterable[Part]) -> Layouts:
        """All devices of the groups that a split makes."""
        return {stage.device: self.of_stage(stage) for part in parts for stage in part.stages}

    def of_merge(self, merge: Merge, groups: Sequence[Group], rooms: Sequence[Room]) -> Layouts:
        """All devices of a merge right after the drop, before any KV has left.

        Layers that go keep the KV of running requests until it is copied. The layers that stay get the freed chunks,
        or only `rooms` if KV comes layer by layer, and the rest stays free for that.
        """
        room_of = {room.device: room.chunks for room in rooms}
        old = {stage.device: (group, stage) for group in groups for stage in group.stages}
        layouts = {}
        for stage in merge.stages:
            memory, (group, before) = self._memories[stage.device], old[stage.device]
            chunks = memory.kv.num_chunks(before.first_layer)
            stay = range(stage.first_layer, stage.last_layer)
            leaving = [i for i in range(before.first_layer, before.last_layer) if i not in stay]
            if not group.running:
                leaving = []
            spare = memory.pool.num_chunks - len(leaving) * chunks
            spare -= self.shape.weight_chunks(stage.first_layer, stage.last_layer)
            grown = chunks + room_of[stage.device] if rooms else spare // len(stay)
            layouts[stage.device] = self._layout(stage, dict.fromkeys(leaving, chunks) | dict.fromkeys(stay, grown))
        return layouts

    def _layout(self, stage: StageView, chunks: Mapping[int, int]) -> Layout:
        units = units_of_stage(self._model, stage.first_layer, stage.last_layer)
        return Layout(units, tuple(chunks.get(layer, 0) for layer in range(self.shape.num_layers)))

    def now(self, groups: Iterable[Group]) -> Layouts:
        """The layouts that the groups' devices have."""
        return {stage.device: self._memories[stage.device].layout for group in groups for stage in group.stages}

    # --- verbs --------------------------------------------------------------------------------------------------

    async def apply(self, layouts: Layouts) -> None:
        """Rearrange all devices at once, each on its compute queue.

        If one fails, all go back, with their weights filled again, before the error is raised. NoWayBackError if that
        fails too: nothing may run on these devices then.
        """
        before = {device: self._memories[device].layout for device in layouts}
        try:
            await self._rearrange(layouts)
        except BaseException:
            await self._go_back(before)
            raise

    async def _go_back(self, before: Layouts) -> None:
        for attempts_left in reversed(range(ROLLBACK_ATTEMPTS)):
            try:
                await self._rearrange(before)
                await self.load(before)
                return
            except Exception as error:
                log.error("rolling back failed", error=repr(error), attempts_left=attempts_left)
                if not attempts_left:
                    raise NoWayBackError(f"a transition failed and could not be rolled back: {error}") from error

    async def load(self, devices: Iterable[int], is_cancelled: Callable[[], bool] = lambda: False) -> int:
        """Fill the units that are mapped but not filled, all devices at once, in the background; returns bytes loaded.

        Each unit takes its turns on the link that it comes over; between two of them it stops if it is cancelled.
        """

        async def load(device: int) -> int:
            memory, loaded = self._memories[device], 0
            for unit in memory.weights.unfilled:
                if is_cancelled():
                    break
                await self._loader.load(device, unit, self._links)
                loaded += memory.weights.num_chunks(unit) * memory.device.chunk_bytes
            return loaded

        return sum(await gather_all(load(device) for device in devices))

    async def resize_kv(self, device: int, chunks: Mapping[int, int]) -> None:
        """Give some layers of a device another number of KV chunks. What others ask for at the same time stands."""
        memory = self._memories[device]

        def resize() -> None:  # of the layout that is there then: it may change until its turn has come
            before = memory.layout
            after = Layout(before.units, tuple(chunks.get(i, n) for i, n in enumerate(before.kv_chunks)))
            if after != before:
                memory.rearrange(after)

        await memory.device.run(resize)

    async def settle(self, stages: Iterable[Stage]) -> None:
        """Unmap KV of layers that are not served here any more, and give the chunks to those that are."""
        stages = list(stages)
        await self._rearrange({stage.device: self.of_stage(stage.view) for stage in stages})
        for stage in stages:
            stage.pool.grow(self._memories[stage.device].kv.num_blocks(stage.first_layer))

    async def _rearrange(self, layouts: Layouts) -> None:
        work = []
        for device, layout in layouts.items():
            memory = self._memories[device]
            if memory.layout != layout:
                work.append(memory.device.run(partial(memory.rearrange, layout)))
        await gather_all(work)
