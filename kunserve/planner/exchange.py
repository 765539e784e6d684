"""Plan the exchange after a merge: in which order the KV of live requests follows its layers.

Right after a drop each device has: the weights it keeps, the KV of all layers it had, and the chunks of the dropped
weights, free. Incoming KV needs room in the kept layers' ranges; outgoing KV gives room back only when the last
request has left a layer's range. By request is kinder (each resumes on its own) but needs room for one whole side;
by layer needs the growth of one layer, since every layer that has left makes room for the next to come. What is free
beyond that is for new requests at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kunserve.planner.layouts import merged_layouts
from kunserve.planner.plan import EarlyGrowth, ExchangeMode, ExchangePlan, KvMove, Merge
from kunserve.planner.snapshot import ModelShape, Snapshot, StageView

NUM_GROWING = 6  # layers whose ranges can grow at once, if that leaves half of the freed chunks to new requests


class LiveRequest(NamedTuple):
    """A request with KV to exchange: the group it ran in, the blocks it holds, and how little it can wait."""

    request_id: str
    group_id: int
    num_blocks: int
    urgency: float = 0.0  # greater goes first
    num_near: int = 0  # of those of layers with a window, if these are a kind of its own

    def by_kind(self, num_kinds: int) -> tuple[int, ...]:
        """Return its blocks of each kind."""
        return (self.num_blocks, self.num_near)[:num_kinds]


class LayerMove(NamedTuple):
    """Layers `[first_layer, last_layer)` change their device."""

    first_layer: int
    last_layer: int
    source: int
    destination: int

    @property
    def num_layers(self) -> int:
        """Return the number of layers that move."""
        return self.last_layer - self.first_layer


def layer_moves(before: Sequence[StageView], after: Sequence[StageView]) -> tuple[LayerMove, ...]:
    """Return the layers whose device differs between two chains, in runs as long as can be."""
    moves = []
    for old in before:
        for new in after:
            first, last = max(old.first_layer, new.first_layer), min(old.last_layer, new.last_layer)
            if first < last and old.device != new.device:
                moves.append(LayerMove(first, last, old.device, new.device))
    return tuple(moves)


def plan_exchange(
    snapshot: Snapshot, merge: Merge, requests: Sequence[LiveRequest], cached_groups: frozenset[int] = frozenset()
) -> ExchangePlan:
    """Order the moves of all live requests of the merged groups; `snapshot` is from before the merge.

    `cached_groups` have cached blocks that are to follow, which takes room for as long: if there is none, they do not.

    By request if that fits (urgent first, then small; or one group after the other), else by layer, else
    `INFEASIBLE` without moves: then all of them are recomputed, and the layouts keep no KV of theirs. Exact in chunks:
    each move fits once the moves before it are done, if after each the ranges are unmapped whose last request left.
    """
    live = [request for request in requests if request.num_blocks > 0]
    live_groups = {request.group_id for request in live}
    for staying in (cached_groups, frozenset[int]()) if cached_groups else (cached_groups,):
        scene = _Scene.after_drop(snapshot, merge, live, staying)
        kindest = sorted(live, key=lambda request: (-request.urgency, request.num_blocks, request.request_id))
        by_group = sorted(kindest, key=lambda request: (scene.used[request.group_id][0], request.group_id))
        for wanted in (kindest, by_group):
            if (order := _order_requests(scene, wanted)) is not None:
                moves = [KvMove((r.request_id,), *move) for r in order for move in scene.moves[r.group_id]]
                layouts = merged_layouts(snapshot, merge, live_groups | staying)
                return ExchangePlan(ExchangeMode.BY_REQUEST, tuple(moves), (), layouts, staying)
    steps, growth_chunks = _order_layers(scene, most := _most_early_growth(scene)), most
    if steps is None:
        steps, growth_chunks = _order_layers(scene, none := dict.fromkeys(most, 0)), none
    if steps is not None:
        ids = {group: tuple(r.request_id for r in kindest if r.group_id == group) for group in scene.used}
        moves = [KvMove(ids[scene.group_of[step.source]], *step) for step in steps]
        early = tuple(EarlyGrowth(d, chunks, *scene.num_blocks(d, chunks)) for d, chunks in growth_chunks.items())
        layouts = merged_layouts(snapshot, merge, live_groups, early)
        return ExchangePlan(ExchangeMode.BY_LAYER, tuple(moves), early, layouts)
    return ExchangePlan(ExchangeMode.INFEASIBLE, (), layouts=merged_layouts(snapshot, merge, ()))


@dataclass(frozen=True, slots=True)
class _Scene:
    """The chain's devices right after the drop. Layers that no live request uses have left already."""

    model: ModelShape
    group_of: dict[int, int]  # device -> the group it was in
    used: dict[int, tuple[int, ...]]  # group -> blocks of each kind of its live requests
    moves: dict[int, tuple[LayerMove, ...]]  # group -> where its KV goes
    range_chunks: dict[int, int]  # device -> KV chunks that each of its layers had; a full one, if there are two kinds
    kept: dict[int, tuple[int, ...]]  # device -> layers of each kind that stay
    leaving: dict[int, tuple[int, ...]]  # device -> layers of each kind whose KV has to leave
    free: dict[int, int]  # device -> chunks of nobody

    @staticmethod
    def after_drop(
        snapshot: Snapshot, merge: Merge, requests: Sequence[LiveRequest], cached_groups: Container[int]
    ) -> _Scene:
        """Unmap the dropped weights of `merge`. Layers of `cached_groups` stay, too: cached blocks are there."""
        model, budgets = snapshot.model, snapshot.budgets()
        groups = [group for group in snapshot.groups if group.group_id in merge.group_ids]
        nothing = (0,) * model.num_kinds
        scene = _Scene(model, {}, {group.group_id: nothing for group in groups}, {}, {}, {}, {}, {})
        for request in requests:
            scene.used[request.group_id] = _plus(scene.used[request.group_id], request.by_kind(model.num_kinds))
        new = {stage.device: stage for stage in merge.stages}
        for group in groups:
            scene.moves[group.group_id] = layer_moves(group.stages, merge.stages)
            for old in group.stages:
                device, stage = old.device, new[old.device]
                chunks = model.kv_chunks(budgets[device], old.first_layer, old.last_layer)
                kept = model.by_kind(range(stage.first_layer, stage.last_layer))
                has_kv = any(scene.used[group.group_id]) or group.group_id in cached_groups
                leaving = _minus(model.by_kind(range(old.first_layer, old.last_layer)), kept) if has_kv else nothing
                weights = model.weight_chunks(stage.first_layer, stage.last_layer)
                scene.group_of[device], scene.range_chunks[device] = group.group_id, chunks
                scene.kept[device], scene.leaving[device] = kept, leaving
                scene.free[device] = budgets[device] - weights - scene.ranges(device, _plus(kept, leaving))
        return scene

    def ranges(self, device: int, layers: tuple[int, ...]) -> int:
        """Return the chunks of KV that so many layers of each kind had on a device."""
        chunks = self.model.chunks_by_kind(self.range_chunks[device])
        return sum(number * of_one for number, of_one in zip(layers, chunks, strict=True))

    def holds(self, device: int, free: int) -> tuple[int, ...]:
        """Return the blocks of each kind that a device holds once its kept layers have `free` chunks more."""
        kept = self.kept[device]
        chunks = self.model.chunks_within(self.ranges(device, kept) + free, kept)
        return self.model.blocks_by_kind(chunks)

    def num_blocks(self, device: int, room_chunks: int) -> tuple[int, ...]:
        """Return how many ids of each kind a device needs once all KV has come, if kept layers have `room_chunks` more.

        KV that comes gets ids beyond those of the added chunks, which are left to new requests. Where nothing is added,
        it gets any id that is free.
        """
        mapped = self.model.blocks_by_kind(self.range_chunks[device] + room_chunks)
        used = self.used[self.group_of[device]]
        in_all = [sum(of_kind) for of_kind in zip(*self.used.values(), strict=True)]
        by_kind = zip(mapped, used, in_all, strict=True)
        return tuple(has + (total - own if room_chunks else max(0, total - has)) for has, own, total in by_kind)


def _plus(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _minus(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def _most_early_growth(scene: _Scene) -> dict[int, int]:
    """Return, by device, the chunks that each kept layer can get at once for new requests.

    They leave room for a few ranges to grow while KV comes, so that copies seldom wait for a step boundary, and for all
    KV once it has come. Where KV is of two kinds they are none: new requests get theirs when all KV has come.
    """
    if scene.model.near is not None:
        return dict.fromkeys(scene.group_of, 0)
    growth_chunks = {}
    for device, group in scene.group_of.items():
        growth = scene.model.chunks_for(sum(used for (used,) in scene.used.values()) - scene.used[group][0]) + 1
        spare, [kept] = scene.free[device], scene.kept[device]
        num_growing = max(1, min(NUM_GROWING, spare // (2 * growth)))
        in_the_end = (spare + scene.ranges(device, scene.leaving[device])) // kept - growth
        growth_chunks[device] = max(0, min((spare - num_growing * growth) // kept, in_the_end))
    return growth_chunks


def _order_requests(scene: _Scene, wanted: Sequence[LiveRequest]) -> list[LiveRequest] | None:
    """Order requests so that each fits, as near to `wanted` as can be; None if some never fit.

    A request needs its blocks on every device where it was not. The last one of a group makes room on its devices.
    """
    order = list[LiveRequest]()
    free, occupied = dict(scene.free), {device: scene.used[group] for device, group in scene.group_of.items()}
    num_left = Counter(request.group_id for request in wanted)
    holds = {device: scene.holds(device, chunks) for device, chunks in free.items()}
    pending = list(wanted)
    while pending:
        waiting = []
        for request in pending:
            group, blocks = request.group_id, request.by_kind(scene.model.num_kinds)
            others = [device for device in free if scene.group_of[device] != group]
            if any(a + b > c for d in others for a, b, c in zip(occupied[d], blocks, holds[d], strict=True)):
                waiting.append(request)
                continue
            order.append(request)
            for device in others:
                occupied[device] = _plus(occupied[device], blocks)
            num_left[group] -= 1
            for device in free if num_left[group] == 0 else ():
                if scene.group_of[device] == group:
                    free[device] += scene.ranges(device, scene.leaving[device])
                    holds[device] = scene.holds(device, free[device])
        if len(waiting) == len(pending):
            return None
        pending = waiting
    return order


def _order_layers(scene: _Scene, growth_chunks: dict[int, int]) -> list[LayerMove] | None:
    """Order single layers of all requests so that each fits beside `growth_chunks`; None if at some point none does.

    Of the layers that fit, one leaves the device with the least room, which needs it most.
    """
    pending = {
        move: move.first_layer for group in scene.moves if any(scene.used[group]) for move in scene.moves[group]
    }  # -> the next layer of it
    free = {device: chunks - growth_chunks[device] * sum(scene.kept[device]) for device, chunks in scene.free.items()}
    steps = list[LayerMove]()
    filled = set[tuple[int, int]]()  # (device, layer) where KV has come

    def growth(move: LayerMove) -> int:
        """Return the chunks that the destination's range of the next layer must get.

        With the first KV that comes it gets room for all: everybody has blocks there already, in no order of groups.
        """
        device, early, kind = move.destination, growth_chunks[move.destination], scene.model.kind_of(pending[move])
        if (device, pending[move]) in filled:
            return 0
        has = scene.model.chunks_by_kind(scene.range_chunks[device] + early)[kind]
        return max(0, scene.model.chunks_for(scene.num_blocks(device, early)[kind]) - has)

    while pending:
        # A layer that comes before there is room for it would wait for one behind it in the order, which waits for it.
        fitting = [move for move in pending if growth(move) <= free[move.destination]]
        if not fitting:
            return None
        move = min(fitting, key=lambda move: (free[move.source], move))
        layer = pending[move]
        free[move.destination] -= growth(move)
        free[move.source] += scene.model.chunks_by_kind(scene.range_chunks[move.source])[scene.model.kind_of(layer)]
        filled.add((move.destination, layer))
        steps.append(LayerMove(layer, layer + 1, move.source, move.destination))
        if layer + 1 == move.last_layer:
            del pending[move]
        else:
            pending[move] = layer + 1
    return steps
