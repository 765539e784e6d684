"""The engine seen from outside: figures for `/metrics`, everything for `/kunserve/state`, invariants for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kunserve.engine.signals import loop_time
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.metrics import DeviceStats, EngineStats, GroupStats
from kunserve.model.layout import units_of_stage

if TYPE_CHECKING:
    from kunserve.engine.engine import Engine


def engine_stats(engine: Engine) -> EngineStats:
    """The figures that metrics show."""
    return EngineStats(
        num_running=engine.num_running,
        num_waiting=engine.scheduler.num_waiting,
        num_blocks=sum(g.num_blocks for g in engine.groups),
        num_used_blocks=sum(g.num_used for g in engine.groups),
        block_size=engine.groups[0].block_size,
        devices=tuple(_device_stats(m) for m in engine.memories),
        groups=tuple(
            GroupStats(g.group_id, len(g.stages), g.occupancy.bubble_share(loop_time())) for g in engine.groups
        ),
        weights_dropped_bytes=engine.launched_weight_bytes - weight_bytes(engine.memories),
    )


def engine_health(engine: Engine) -> str | None:
    """Return None if the engine does its work; else what is wrong."""
    if not engine.is_running:
        return "the engine has stopped"
    if engine.num_live and engine.silent_s > engine.limits.stall_s:
        return f"no step has finished for {engine.silent_s:.0f} s although {engine.num_live} requests are not done"
    return None


def engine_state(engine: Engine, num_transitions: int | None = None) -> dict[str, Any]:
    """What `/kunserve/state` shows: devices with chunks by owner, groups with stages, requests, epoch.

    The last `num_transitions`, or all that are remembered.
    """
    home = _home_units(engine)
    return {
        "now_s": loop_time(),
        "epoch": engine.epoch,
        "overload_policy": engine.overload_policy,
        "num_layers": engine.model.num_layers,
        "block_size": engine.groups[0].block_size,
        "copies": {"now": len(engine.groups), "at_launch": _num_launched(engine), "no_drop": engine.no_drop},
        "chunks_of_unit": engine.memories[0].weights.chunks_of_unit,
        "devices": [
            {
                "name": memory.device.name,
                "chunk_bytes": memory.device.chunk_bytes,
                "chunks": {
                    "budget": (counts := memory.counts).budget,
                    "weights": counts.weights,
                    "kv": counts.kv,
                    "free": counts.free,
                },
                "weights": memory.weights.present,
                "home": home.get(index, memory.weights.present),
                "blocks": {"total": engine.fleet.pools[index].limit, "used": engine.fleet.pools[index].num_used},
            }
            for index, memory in enumerate(engine.memories)
        ],
        "groups": [
            {
                "id": group.group_id,
                "stages": [
                    {
                        "device": engine.memories[s.device].device.name,
                        "layers": [s.first_layer, s.last_layer],
                    }
                    for s in group.stages
                ],
                "blocks": {"total": group.num_blocks, "used": group.num_used},
                "running": len(group.running),
                "microbatches_in_flight": group.num_in_flight,
                "bubbles": {
                    "share": group.occupancy.bubble_share(loop_time()),
                    "active_s": group.occupancy.active_s(loop_time()),
                    "busy_s": group.occupancy.busy_s(loop_time()),
                },
            }
            for group in engine.groups
        ],
        "requests": {
            "running": engine.num_running,
            "waiting": engine.scheduler.num_waiting,
            "preemptions": engine.scheduler.num_preemptions,
            "swaps": engine.scheduler.swapped.num_swaps,
            "migrations": engine.scheduler.num_migrations,
        },
        **(engine.control.state(num_transitions) if engine.control is not None else {}),
    }


def _home_units(engine: Engine) -> dict[int, list[str]]:
    """Units that each device was launched with: where dropped weights come back to."""
    origins = [origin for group in engine.groups if group.origin for origin in group.origin.launched()]
    return {
        stage.device: list(units_of_stage(engine.model, stage.first_layer, stage.last_layer))
        for origin in origins
        for stage in origin.stages
    }


def _num_launched(engine: Engine) -> int:
    """Return the number of groups at launch, each of them a complete copy of the weights."""
    return sum(1 if group.origin is None else sum(1 for _ in group.origin.launched()) for group in engine.groups)


def check_engine(engine: Engine) -> None:
    """Assert the invariants of memory and grouping."""
    engine.scheduler.swapped.check()
    for memory in engine.memories:
        memory.check()
    engine.fleet.check(engine.model.num_layers)
    for group in engine.groups:
        if group.is_paused and not group.num_in_flight:
            continue  # it is being remapped, perhaps
        for stage in group.stages:
            memory = engine.memories[stage.device]
            tables = (request.table.ids.get(stage.device, ()) for request in group.running)
            needed = max(stage.pool.limit, 1 + max((block for ids in tables for block in ids), default=0))
            layers = range(stage.first_layer, stage.last_layer)
            assert all(memory.kv.num_blocks(layer) >= needed for layer in layers)
            units = units_of_stage(engine.model, stage.first_layer, stage.last_layer)
            assert all(memory.weights.is_filled(unit) for unit in units)


def weight_bytes(memories: Sequence[DeviceMemory]) -> int:
    """Bytes that weights take on all devices together."""
    return sum(memory.counts.weights * memory.device.chunk_bytes for memory in memories)


def _device_stats(memory: DeviceMemory) -> DeviceStats:
    counts, size = memory.counts, memory.device.chunk_bytes
    return DeviceStats(memory.device.name, counts.weights * size, counts.kv * size, counts.free * size)
