"""Layouts: what each device's chunks are for after a step of a transition. Exact in chunks."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from kunserve.planner.plan import DeviceLayout, EarlyGrowth, Merge, NewGroup
from kunserve.planner.snapshot import Lineage, ModelShape, Snapshot, StageView, stage_blocks


def stage_layout(model: ModelShape, budget_chunks: int, stage: StageView) -> DeviceLayout:
    """Return the layout of a device that serves one stage and nothing else: all other chunks evenly for its KV."""
    chunks = model.kv_chunks(budget_chunks, stage.first_layer, stage.last_layer)
    return _layout(model, stage, given(model, range(stage.first_layer, stage.last_layer), chunks))


def given(model: ModelShape, layers: Iterable[int], chunks: int) -> dict[int, int]:
    """Return the chunks of each of some layers where full ones have `chunks`."""
    of_kind = model.chunks_by_kind(chunks)
    return {layer: of_kind[model.kind_of(layer)] for layer in layers}


def blocks_of(model: ModelShape, layout: DeviceLayout) -> tuple[int, ...]:
    """Return how many blocks of each kind a device has ids for.

    They are mapped in its stage's layers. Of a kind that the stage has no layers of, there are as many ids as such a
    layer would have blocks: no memory is behind them, and other stages of the group may need them.
    """
    stage, mapped = layout.stage, layout.kv_chunks
    layers = range(stage.first_layer, stage.last_layer)
    chunks = [next((mapped[i] for i in layers if model.kind_of(i) == kind), None) for kind in range(model.num_kinds)]
    full, near = chunks[0], chunks[-1]
    if full is None:
        assert near is not None
        full = model.chunks_within(near * len(layers), (0, len(layers)))
    return tuple(
        model.blocks_in(c if c is not None else n) for c, n in zip(chunks, model.chunks_by_kind(full), strict=True)
    )


def whole_group(
    model: ModelShape, budgets: dict[int, int], stages: tuple[StageView, ...], lineage: Lineage | None
) -> NewGroup:
    """Return the new group with these stages, each of which gets all chunks of its device."""
    return NewGroup(
        stages,
        tuple(stage_blocks(model, budgets, stage) for stage in stages),
        tuple(stage_layout(model, budgets[stage.device], stage) for stage in stages),
        lineage,
    )


def merged_layouts(
    snapshot: Snapshot, merge: Merge, live_groups: Container[int], early_growth: Iterable[EarlyGrowth] = ()
) -> tuple[DeviceLayout, ...]:
    """Return the layouts of all devices of a merge right after the drop, before any KV has left.

    Layers that go keep their KV until it is copied, where one of `live_groups` has any. The layers that stay get the
    freed chunks, or only `early_growth` if KV comes layer by layer, and the rest stays free for that.
    """
    model, budgets = snapshot.model, snapshot.budgets()
    growth_of = {growth.device: growth.chunks for growth in early_growth}
    before = {stage.device: (group.group_id, stage) for group in snapshot.groups for stage in group.stages}
    layouts = []
    for stage in merge.stages:
        group_id, old = before[stage.device]
        chunks = model.kv_chunks(budgets[stage.device], old.first_layer, old.last_layer)
        stay = range(stage.first_layer, stage.last_layer)
        leaving = [i for i in range(old.first_layer, old.last_layer) if i not in stay and group_id in live_groups]
        spare = budgets[stage.device] - sum(given(model, leaving, chunks).values())
        spare -= model.weight_chunks(stage.first_layer, stage.last_layer)
        grown = chunks + growth_of[stage.device] if growth_of else model.chunks_within(spare, model.by_kind(stay))
        layouts.append(_layout(model, stage, given(model, leaving, chunks) | given(model, stay, grown)))
    return tuple(layouts)


def _layout(model: ModelShape, stage: StageView, chunks: Mapping[int, int]) -> DeviceLayout:
    return DeviceLayout(stage, tuple(chunks.get(layer, 0) for layer in range(model.num_layers)))
