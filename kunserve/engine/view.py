"""The engine seen from outside: figures for `/metrics`, everything for `/kunserve/state`, invariants for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.kinds.mixed_group import MixedGroup
from kunserve.engine.schedule.scheduler import Scheduler
from kunserve.engine.signals import loop_time
from kunserve.engine.survive.health import Health
from kunserve.gpu.device_memory import ChunkCounts, DeviceMemory
from kunserve.model.config import ModelConfig
from kunserve.model.layout import units_of_stage
from kunserve.observe.gauges import DeviceStats, EngineStats, GroupStats
from kunserve.policies import OverloadPolicy


class View:
    """What an engine shows of itself."""

    def __init__(
        self, model: ModelConfig, fleet: Fleet, scheduler: Scheduler, memories: Sequence[DeviceMemory], health: Health
    ) -> None:
        self._model, self._fleet, self._scheduler, self._memories = model, fleet, scheduler, memories
        self._health = health
        self._launched_weight_bytes = list(map(_weight_bytes, memories))
        self.overload_policy: OverloadPolicy | None = None  # as the flag names it
        self.no_drop: str | None = None  # why no weights are ever dropped by themselves

    def stats(self, demand_over_undropped: float = 0.0) -> EngineStats:
        """Return the figures that metrics show."""
        groups = [group for group in self._fleet.groups if not group.is_lost]
        return EngineStats(
            num_running=self._fleet.num_running,
            num_waiting=self._scheduler.num_waiting,
            # While KV goes by layer, blocks beyond the limit are used, too: they are mapped, layer by layer.
            num_blocks=sum(max(g.num_blocks, g.num_used) for g in groups),
            num_used_blocks=sum(g.num_used for g in groups),
            num_idle_blocks=sum(len(g.idle) for g in groups),
            block_size=self._fleet.block_size,
            devices=tuple(self._device_stats(index) for index in range(len(self._memories))),
            groups=tuple(GroupStats(g.group_id, len(g.stages), g.occupancy.bubble_share(loop_time())) for g in groups),
            weights_dropped_bytes=sum(
                max(0, launched - _weight_bytes(memory))  # it may hold more, for devices that are gone
                for launched, memory in zip(self._launched_weight_bytes, self._memories, strict=True)
                if not memory.device.is_lost
            ),
            demand_over_undropped=demand_over_undropped,
        )

    def state(self) -> dict[str, Any]:
        """Return what `/kunserve/state` shows: devices with chunks by use, groups with stages, requests, epoch."""
        launched, scheduler, lookahead = self._launched_units(), self._scheduler, self._scheduler.lookahead
        return {
            "now_s": loop_time(),
            "epoch": self._fleet.epoch,
            "overload_policy": self.overload_policy,
            "num_layers": self._model.num_layers,
            "block_size": self._fleet.block_size,
            "cost_model": lookahead and {"source": lookahead.source, "constants": lookahead.cost.to_dict()},
            "copies": {"now": len(self._fleet.groups), "at_launch": self._num_launched(), "no_drop": self.no_drop},
            "chunks_of_unit": self._memories[0].weights.chunks_of_unit,
            "devices": [
                self._device(index, launched.get(index, memory.weights.present))
                for index, memory in enumerate(self._memories)
            ],
            "groups": [self._group(group) for group in self._fleet.groups],
            "requests": {
                "running": self._fleet.num_running,
                "waiting": scheduler.num_waiting,
                "preemptions": scheduler.num_preemptions,
                "swaps": scheduler.swapped.num_swaps,
                "migrations": scheduler.num_migrations,
            },
        }

    def _device(self, index: int, launched: Sequence[str]) -> dict[str, Any]:
        """Describe a device. `launched`: the weight units that it was launched with."""
        memory, fleet = self._memories[index], self._fleet
        counts = self._counts(memory)
        if memory.device.is_lost:
            launched = []
        idle = sum(len(g.idle) for g in fleet.groups if any(stage.device == index for stage in g.stages))
        return {
            "name": memory.device.name,
            "state": self._health.state(index),
            "chunk_bytes": memory.device.chunk_bytes,
            "chunks": {"budget": counts.budget, "weights": counts.weights, "kv": counts.kv, "free": counts.free},
            "weights": [] if memory.device.is_lost else memory.weights.present,
            "home": launched,
            "blocks": _blocks(fleet.pools[index].limit, fleet.num_used(index), idle)
            if fleet.group_on(index) is not None
            else _blocks(0, 0, 0),
        }

    @staticmethod
    def _counts(memory: DeviceMemory) -> ChunkCounts:
        """Return the chunks of a device by use; of one that is gone, nobody knows, and none is of use."""
        return ChunkCounts(memory.device.num_chunks, 0, 0, 0) if memory.device.is_lost else memory.counts

    def _device_stats(self, index: int) -> DeviceStats:
        memory = self._memories[index]
        counts, size = self._counts(memory), memory.device.chunk_bytes
        of_owners = (counts.weights * size, counts.kv * size, counts.free * size)
        return DeviceStats(memory.device.name, *of_owners, state=self._health.state(index))

    def _group(self, group: Group) -> dict[str, Any]:
        now, occupancy = loop_time(), group.occupancy
        return {
            "id": group.group_id,
            "stages": [
                {"device": self._memories[s.device].device.name, "layers": [s.first_layer, s.last_layer]}
                for s in group.stages
            ],
            "blocks": _blocks(group.num_blocks, group.num_used, len(group.idle)),
            **(_near_blocks(group) if isinstance(group, MixedGroup) else {}),
            "running": len(group.running),
            "microbatches_in_flight": group.num_in_flight,
            "bubbles": {
                "share": occupancy.bubble_share(now),
                "active_s": occupancy.active_s(now),
                "busy_s": occupancy.busy_s(now),
            },
        }

    def _launched_units(self) -> dict[int, list[str]]:
        """Return the units that each device was launched with: where dropped weights come back to."""
        lineages = [lineage for group in self._fleet.groups if group.lineage for lineage in group.lineage.launched()]
        return {
            stage.device: list(units_of_stage(self._model, stage.first_layer, stage.last_layer))
            for lineage in lineages
            for stage in lineage.stages
        }

    def _num_launched(self) -> int:
        """Return the number of groups at launch, each of them a complete copy of the weights."""
        return sum(
            1 if group.lineage is None else sum(1 for _ in group.lineage.launched()) for group in self._fleet.groups
        )

    def check(self) -> None:
        """Assert the invariants of memory and grouping."""
        self._scheduler.swapped.check()
        for memory in self._memories:
            if not memory.device.is_lost:
                memory.check()
        self._fleet.check(self._model.num_layers)
        for group in self._fleet.groups:
            if group.is_lost or (group.is_paused and not group.num_in_flight):
                continue  # nobody computes there, or it is being remapped, perhaps
            for stage in group.stages:
                memory = self._memories[stage.device]
                for kind in range(self._fleet.num_kinds):
                    store = self._fleet.store(kind)
                    tables = (store.table(request).ids.get(stage.device, ()) for request in group.running)
                    last = max((block for ids in tables for block in ids), default=0)
                    needed = max(store.pool(stage).limit, 1 + last)
                    layers = self._fleet.layers_of(kind, range(stage.first_layer, stage.last_layer))
                    assert all(memory.kv.num_blocks(layer) >= needed for layer in layers)
                units = units_of_stage(self._model, stage.first_layer, stage.last_layer)
                assert all(memory.weights.is_filled(unit) for unit in units)


def _blocks(num_blocks: int, num_used: int, num_idle: int) -> dict[str, int]:
    return {"total": max(num_blocks, num_used), "used": num_used, "idle": num_idle}


def _near_blocks(group: MixedGroup) -> dict[str, Any]:
    """Return the blocks of layers with a window, where their KV is a kind of its own."""
    return {"near_blocks": _blocks(group.num_near_blocks, group.num_near_used, len(group.near_idle))}


def _weight_bytes(memory: DeviceMemory) -> int:
    """Return the bytes that weights take on a device."""
    return memory.counts.weights * memory.device.chunk_bytes
