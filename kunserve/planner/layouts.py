"""Layouts: what each device's chunks are for after a step of a transition. Exact in chunks."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from kunserve.planner.plan import DeviceLayout, Merge, Part, Room
from kunserve.planner.snapshot import ModelShape, Origin, Snapshot, StageView, stage_blocks


def stage_layout(model: ModelShape, budget_chunks: int, stage: StageView) -> DeviceLayout:
    """Return the layout of a device that serves one stage and nothing else: all other chunks evenly for its KV."""
    chunks = model.kv_chunks(budget_chunks, stage.first_layer, stage.last_layer)
    return _layout(model, stage, dict.fromkeys(range(stage.first_layer, stage.last_layer), chunks))


def whole_part(
    model: ModelShape, budgets: dict[int, int], stages: tuple[StageView, ...], origin: Origin | None
) -> Part:
    """Return the part with these stages, each of which gets all chunks of its device."""
    return Part(
        stages,
        tuple(stage_blocks(model, budgets, stage) for stage in stages),
        tuple(stage_layout(model, budgets[stage.device], stage) for stage in stages),
        origin,
    )


def merged_layouts(
    snapshot: Snapshot, merge: Merge, live_groups: Container[int], rooms: Iterable[Room] = ()
) -> tuple[DeviceLayout, ...]:
    """Return the layouts of all devices of a merge right after the drop, before any KV has left.

    Layers that go keep their KV until it is copied, where one of `live_groups` has any. The layers that stay get the
    freed chunks, or only `rooms` if KV comes layer by layer, and the rest stays free for that.
    """
    model, budgets = snapshot.model, snapshot.budgets()
    room_of = {room.device: room.chunks for room in rooms}
    before = {stage.device: (group.group_id, stage) for group in snapshot.groups for stage in group.stages}
    layouts = []
    for stage in merge.stages:
        group_id, old = before[stage.device]
        chunks = model.kv_chunks(budgets[stage.device], old.first_layer, old.last_layer)
        stay = range(stage.first_layer, stage.last_layer)
        leaving = [i for i in range(old.first_layer, old.last_layer) if i not in stay and group_id in live_groups]
        spare = budgets[stage.device] - len(leaving) * chunks
        spare -= model.weight_chunks(stage.first_layer, stage.last_layer)
        grown = chunks + room_of[stage.device] if room_of else spare // len(stay)
        layouts.append(_layout(model, stage, dict.fromkeys(leaving, chunks) | dict.fromkeys(stay, grown)))
    return tuple(layouts)


def _layout(model: ModelShape, stage: StageView, chunks: Mapping[int, int]) -> DeviceLayout:
    return DeviceLayout(stage, tuple(chunks.get(layer, 0) for layer in range(model.num_layers)))
