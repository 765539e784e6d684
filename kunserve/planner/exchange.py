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
from kunserve.planner.plan import ExchangeMode, ExchangePlan, KvMove, Merge, Room
from kunserve.planner.snapshot import ModelShape, Snapshot, StageView

NUM_GROWING = 6  # layers whose ranges can grow at once, if that leaves half of the freed chunks to new requests


class LiveRequest(NamedTuple):
    """A request with KV to exchange: the group it ran in, the blocks it holds, and how little it can wait."""

    request_id: str
    group_id: int
    num_blocks: int
    urgency: float = 0.0  # greater goes first


class LayerMove(NamedTuple):
    """Layers `[first_layer, last_layer)` change their device."""

    first_layer: int
    last_layer: int
    source: int
    destination: int

    @property
    def num_layers(self) -> int:
        """Number of layers that move."""
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
        by_group = sorted(kindest, key=lambda request: (scene.used[request.group_id], request.group_id))
        for wanted in (kindest, by_group):
            if (order := _order_requests(scene, wanted)) is not None:
                moves = [KvMove((r.request_id,), *move) for r in order for move in scene.moves[r.group_id]]
                layouts = merged_layouts(snapshot, merge, live_groups | staying)
                return ExchangePlan(ExchangeMode.BY_REQUEST, tuple(moves), (), layouts, staying)
    steps, rooms = _order_layers(scene, most := _most_rooms(scene)), most
    if steps is None:
        steps, rooms = _order_layers(scene, none := dict.fromkeys(most, 0)), none
    if steps is not None:
        ids = {group: tuple(r.request_id for r in kindest if r.group_id == group) for group in scene.used}
        moves = [KvMove(ids[scene.group_of[step.source]], *step) for step in steps]
        given = tuple(Room(device, chunks, scene.num_blocks(device, chunks)) for device, chunks in rooms.items())
        layouts = merged_layouts(snapshot, merge, live_groups, given)
        return ExchangePlan(ExchangeMode.BY_LAYER, tuple(moves), given, layouts)
    return ExchangePlan(ExchangeMode.INFEASIBLE, (), layouts=merged_layouts(snapshot, merge, ()))


@dataclass(frozen=True, slots=True)
class _Scene:
    """The chain's devices right after the drop. Layers that no live request uses have left already."""

    model: ModelShape
    group_of: dict[int, int]  # device -> the group it was in
    used: dict[int, int]  # group -> blocks of its live requests
    moves: dict[int, tuple[LayerMove, ...]]  # group -> where its KV goes
    range_chunks: dict[int, int]  # device -> KV chunks that each of its layers had
    kept: dict[int, int]  # device -> layers that stay
    leaving: dict[int, int]  # device -> layers whose KV has to leave
    free: dict[int, int]  # device -> chunks of nobody

    @staticmethod
    def after_drop(
        snapshot: Snapshot, merge: Merge, requests: Sequence[LiveRequest], cached_groups: Container[int]
    ) -> _Scene:
        """Unmap the dropped weights of `merge`. Layers of `cached_groups` stay, too: cached blocks are there."""
        model, budgets = snapshot.model, snapshot.budgets()
        groups = [group for group in snapshot.groups if group.group_id in merge.group_ids]
        scene = _Scene(model, {}, {group.group_id: 0 for group in groups}, {}, {}, {}, {}, {})
        for request in requests:
            scene.used[request.group_id] += request.num_blocks
        new = {stage.device: stage for stage in merge.stages}
        for group in groups:
            scene.moves[group.group_id] = layer_moves(group.stages, merge.stages)
            for old in group.stages:
                device, stage = old.device, new[old.device]
                chunks = model.kv_chunks(budgets[device], old.first_layer, old.last_layer)
                kept = stage.last_layer - stage.first_layer
                has_kv = scene.used[group.group_id] or group.group_id in cached_groups
                leaving = old.last_layer - old.first_layer - kept if has_kv else 0
                weights = model.weight_chunks(stage.first_layer, stage.last_layer)
                scene.group_of[device], scene.range_chunks[device] = group.group_id, chunks
                scene.kept[device], scene.leaving[device] = kept, leaving
                scene.free[device] = budgets[device] - weights - (kept + leaving) * chunks
        return scene

    def num_blocks(self, device: int, room_chunks: int) -> int:
        """Block ids that a device needs when all KV has come, if its layers that stay have so many chunks more.

        What comes is beyond those, so that new requests can have them; without any it goes wherever nobody is.
        """
        mapped, used = self.model.blocks_in(self.range_chunks[device] + room_chunks), self.used[self.group_of[device]]
        coming = sum(self.used.values()) - used
        return mapped + coming if room_chunks else max(mapped, used + coming)


def _most_rooms(scene: _Scene) -> dict[int, int]:
    """Return the chunks that each kept layer can get at once beside the growth of a few ranges, and in the end.

    The more layers' ranges can grow before others have left, the less the copies wait for step boundaries.
    """
    rooms = {}
    for device, group in scene.group_of.items():
        growth = scene.model.chunks_for(sum(scene.used.values()) - scene.used[group]) + 1
        spare, kept = scene.free[device], scene.kept[device]
        num_growing = max(1, min(NUM_GROWING, spare // (2 * growth)))
        in_the_end = (spare + scene.leaving[device] * scene.range_chunks[device]) // kept - growth
        rooms[device] = max(0, min((spare - num_growing * growth) // kept, in_the_end))
    return rooms


def _order_requests(scene: _Scene, wanted: Sequence[LiveRequest]) -> list[LiveRequest] | None:
    """Order in which the requests fit, as near to `wanted` as can be; None if some never fit.

    A request needs its blocks on every device where it was not. The last one of a group makes room on its devices.
    """
    model, order = scene.model, list[LiveRequest]()
    free, occupied = dict(scene.free), {device: scene.used[group] for device, group in scene.group_of.items()}
    num_left = Counter(request.group_id for request in wanted)
    holds = {d: model.blocks_in(scene.range_chunks[d] + free[d] // scene.kept[d]) for d in free}
    pending = list(wanted)
    while pending:
        waiting = []
        for request in pending:
            group, blocks = request.group_id, request.num_blocks
            others = [device for device in free if scene.group_of[device] != group]
            if any(occupied[device] + blocks > holds[device] for device in others):
                waiting.append(request)
                continue
            order.append(request)
            for device in others:
                occupied[device] += blocks
            num_left[group] -= 1
            for device in free if num_left[group] == 0 else ():
                if scene.group_of[device] == group:
                    free[device] += scene.leaving[device] * scene.range_chunks[device]
                    holds[device] = model.blocks_in(scene.range_chunks[device] + free[device] // scene.kept[device])
        if len(waiting) == len(pending):
            return None
        pending = waiting
    return order


def _order_layers(scene: _Scene, rooms: dict[int, int]) -> list[LayerMove] | None:
    """Order in which single layers of all requests fit beside `rooms`; None if at some point no layer does.

    Of the layers that fit, one leaves the device with the least room, which needs it most.
    """
    pending = {
        move: move.first_layer for group in scene.moves if scene.used[group] for move in scene.moves[group]
    }  # -> the next layer of it
    free = {device: chunks - rooms[device] * scene.kept[device] for device, chunks in scene.free.items()}
    steps = list[LayerMove]()
    filled = set[tuple[int, int]]()  # (device, layer) where KV has come

    def growth(move: LayerMove) -> int:
        """Return the chunks that the destination's range of the next layer must get.

        With the first KV that comes it gets room for all: everybody has blocks there already, in no order of groups.
        """
        device, room = move.destination, rooms[move.destination]
        if (device, pending[move]) in filled:
            return 0
        return max(0, scene.model.chunks_for(scene.num_blocks(device, room)) - scene.range_chunks[device] - room)

    while pending:
        # A layer that comes before there is room for it would wait for one behind it in the order, which waits for it.
        fitting = [move for move in pending if growth(move) <= free[move.destination]]
        if not fitting:
            return None
        move = min(fitting, key=lambda move: (free[move.source], move))
        layer = pending[move]
        free[move.destination] -= growth(move)
        free[move.source] += scene.range_chunks[move.source]
        filled.add((move.destination, layer))
        steps.append(LayerMove(layer, layer + 1, move.source, move.destination))
        if layer + 1 == move.last_layer:
            del pending[move]
        else:
            pending[move] = layer + 1
    return steps
