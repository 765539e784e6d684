"""Plan a drop: which groups merge so that the server holds what is needed, in chains as short as can be.

Source: KunServe (EuroSys 2026), section 4.1 and figure 6: merge the two smallest groups until enough is freed. Each
merge frees one copy of the layers both hold, and makes a group like any other, so merged groups merge again. Here
"enough" is exact: blocks of the split that holds most, in whole chunks, with embedding and head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from kunserve.errors import ConflictError, InvalidRequestError
from kunserve.planner.layer_split import Chain, cuts_within, stages_of
from kunserve.planner.plan import DropPlan, Merge
from kunserve.planner.snapshot import ModelShape, Origin, Snapshot
from kunserve.sizes import ceil_div

FULL = 0.85  # share of a group's blocks in use
LEAST_GAIN = 0.08  # of a merge, as a share of the blocks that its groups hold apart

# First and last layer that a device of a chain holds now, and its budget (negative: the richest of equals is first).
Place = tuple[int, int, int]
Seat = tuple[int, int, int, int, int]  # a place; how many blocks its group uses (negative), and the device itself


@dataclass(frozen=True, slots=True)
class _Cut:
    """A split: where stages end, places from long to short among equals, blocks it holds, weights that leave."""

    ends: tuple[int, ...]
    by_length: tuple[int, ...]
    blocks: int
    freed_chunks: int


@dataclass(slots=True, eq=False)
class _Shape:
    """All that a split depends on. Most groups of a server are alike, so each shape is worked out once."""

    places: tuple[Place, ...]  # in the order of the chain
    chain: Chain
    standing: int  # blocks it holds as it stands
    merged: dict[_Shape, _Shape] = field(default_factory=dict)
    cuts: dict[int, _Cut] = field(default_factory=dict)  # by the chunks of KV per layer that are needed


class _Shapes:
    """The shapes of one plan."""

    def __init__(self, model: ModelShape) -> None:
        self.model = model
        self._known: dict[tuple[Place, ...], _Shape] = {}

    def of(self, places: tuple[Place, ...]) -> _Shape:
        """Return the one shape with these places. Its devices keep a part of what they hold: a drop loads nothing."""
        if (shape := self._known.get(places)) is None:
            cuts = cuts_within([(first, last) for first, last, _ in places])
            chain = Chain(self.model, [-budget for _, _, budget in places], cuts)
            chunks = min(self.model.kv_chunks(-budget, first, last) for first, last, budget in places)
            shape = self._known[places] = _Shape(places, chain, self.model.blocks_in(chunks))
        return shape

    def merge(self, a: _Shape, b: _Shape) -> _Shape:
        """Join two shapes in one chain, in which every device stays near the layers it has."""
        if (shape := a.merged.get(b)) is None:
            shape = a.merged[b] = self.of(tuple(sorted(a.places + b.places)))
        return shape

    def most_blocks(self, shape: _Shape) -> int:
        """Return the blocks of the split that holds most; 0 if no cut leaves each device layers of its own, with KV."""
        return self.model.blocks_in(shape.chain.most_chunks or 0)

    def cut(self, shape: _Shape, need_blocks: int) -> _Cut:
        """Return the best split that holds `need_blocks`; there must be one."""
        min_chunks = self.model.chunks_for(need_blocks)
        if (cut := shape.cuts.get(min_chunks)) is None:
            ends = shape.chain.best(min_chunks)
            assert ends is not None
            cut = shape.cuts[min_chunks] = self._cut(shape.places, ends)
        return cut

    def _cut(self, places: tuple[Place, ...], ends: tuple[int, ...]) -> _Cut:
        model, starts = self.model, (0, *ends[:-1])
        by_length = sorted(range(len(ends)), key=lambda i: (places[i], starts[i] - ends[i]))
        after = [(first, last, place[2]) for first, last, place in zip(starts, ends, places, strict=True)]
        chunks = min(model.kv_chunks(-budget, first, last) for first, last, budget in after)
        freed = sum(model.weight_chunks(first, last) for first, last, _ in places)
        freed -= sum(model.weight_chunks(first, last) for first, last, _ in after)
        return _Cut(ends, tuple(by_length), model.blocks_in(chunks), freed)


@dataclass(slots=True, eq=False)
class _Node:
    """A group, or several that the plan merges."""

    shape: _Shape
    num_devices: int
    blocks: int  # it holds; of several: in the split that holds most
    apart: int  # blocks that its groups hold as they stand
    used: int
    island: int | None  # None: it spans several
    group_ids: tuple[int, ...]  # from the least
    seats: tuple[Seat, ...]
    origin: Origin
    gain: int = 0  # blocks it holds more than its two parts
    is_full: bool = False  # hardly any of its blocks is free
    is_waiting: bool = True  # for a partner
    is_part: bool = False  # of another node


def _merged(shapes: _Shapes, a: _Node, b: _Node, least_gain: float) -> _Node | None:
    """Merge two nodes; None unless they hold blocks together, and more by `least_gain` than the two do alone."""
    num_devices = a.num_devices + b.num_devices
    if num_devices > shapes.model.num_layers:
        return None
    shape = shapes.merge(a.shape, b.shape)
    blocks = shapes.most_blocks(shape)
    gain = blocks - a.blocks - b.blocks
    if not blocks or gain <= least_gain * (a.blocks + b.blocks):
        return None
    return _Node(
        shape,
        num_devices,
        blocks,
        a.apart + b.apart,
        a.used + b.used,
        a.island if a.island == b.island else None,
        a.group_ids + b.group_ids if a.group_ids < b.group_ids else b.group_ids + a.group_ids,
        a.seats + b.seats,
        Origin((), (a.origin, b.origin)),
        gain,
    )


Entry = tuple[int, bool, int, int, _Node]


class _Smallest:
    """Nodes that may merge: fewest devices first, then the full, then least KV to exchange; of each island at hand."""

    def __init__(self, nodes: Iterable[_Node]) -> None:
        self._all = [self._entry(node) for node in nodes]
        self._of_island: defaultdict[int | None, list[Entry]] = defaultdict(list)
        for entry in self._all:
            self._of_island[entry[-1].island].append(entry)
        heapify(self._all)
        for heap in self._of_island.values():
            heapify(heap)

    @staticmethod
    def _entry(node: _Node) -> Entry:
        return node.num_devices, not node.is_full, node.used, node.group_ids[0], node

    @staticmethod
    def _first(heap: list[Entry]) -> _Node | None:
        # A node is in two heaps and is taken out of neither when it finds a partner: left there it would merge twice.
        while heap and not heap[0][-1].is_waiting:
            heappop(heap)
        return heap[0][-1] if heap else None

    def _partners(self, node: _Node, other: _Node) -> tuple[_Node, ...]:
        if node.island is None or node.island == other.island:
            return (other,)
        near = self._first(self._of_island[node.island])
        return (near, other) if near and near.num_devices == other.num_devices else (other,)

    def merge_next(self, shapes: _Shapes, least_gain: float) -> _Node | None:
        """Merge the smallest node and the smallest other, on its island if one is as small; None if no two can.

        A node that gains no more than this share of their blocks with either is left as it is.
        """
        while node := self._first(self._all):
            node.is_waiting = False
            other = self._first(self._all)
            for partner in self._partners(node, other) if other else ():
                if merged := _merged(shapes, node, partner, least_gain):
                    partner.is_waiting = False
                    node.is_part = partner.is_part = True
                    entry = self._entry(merged)
                    heappush(self._all, entry)
                    heappush(self._of_island[merged.island], entry)
                    return merged
        return None


def plan_drop(snapshot: Snapshot, need_blocks: int, room_blocks: int = 0) -> DropPlan:
    """Merge groups, two smallest first, until the server holds `need_blocks` in all. O(N log N).

    `need_blocks` is the whole demand, not what is short. `room_blocks`: what the merged groups are cut for beyond that,
    as far as they can hold it: a chain cannot be cut anew, but no group merges for it. If all merges are not enough
    they are planned nevertheless, and `meets_need` is false. No merges if the need is met as it is. Two groups that
    hold hardly more together than apart (`LEAST_GAIN`) stay apart: their requests would stand still, while their KV
    moves, for longer than what waits would wait.

    Where anything has to merge, all groups do that are full (`FULL`) or soon will be. Room elsewhere is nothing to
    their requests, and whoever has the only room gets all new requests, which are more than it can compute.
    """
    shapes = _Shapes(snapshot.model)
    nodes = _nodes(snapshot, shapes)
    before = capacity = sum(node.blocks for node in nodes)
    heap, merged = _Smallest(nodes), []
    num_full = sum(node.is_full for node in nodes) if capacity < need_blocks else 0
    while (capacity < need_blocks or num_full) and (node := heap.merge_next(shapes, LEAST_GAIN)):
        capacity += node.gain
        num_full = max(0, num_full - 2)
        merged.append(node)
    return _plan(snapshot, shapes, before, [node for node in merged if not node.is_part], need_blocks, room_blocks)


def plan_drop_of(snapshot: Snapshot, group_ids: Sequence[int], need_blocks: int = 0) -> DropPlan:
    """Merge exactly these groups, as an operator asks; `need_blocks` is what the whole server should hold.

    Errors: InvalidRequestError (fewer than two groups, twice the same, no such group), ConflictError (the groups have
    more devices than there are layers, or would hold less than now).
    """
    shapes = _Shapes(snapshot.model)
    nodes = {node.group_ids[0]: node for node in _nodes(snapshot, shapes)}
    if len(group_ids) < 2 or len(set(group_ids)) < len(group_ids):
        raise InvalidRequestError("a drop needs two or more different groups", param="groups")
    if unknown := [group_id for group_id in group_ids if group_id not in nodes]:
        raise InvalidRequestError(f"no such group: {unknown[0]}", param="groups")
    before = sum(node.blocks for node in nodes.values())
    heap = _Smallest(nodes[group_id] for group_id in group_ids)
    merged = [node for _ in group_ids[1:] if (node := heap.merge_next(shapes, least_gain=-1.0))]
    if len(merged) < len(group_ids) - 1 or merged[-1].blocks < merged[-1].apart:
        raise ConflictError("cannot merge: fewer layers than devices, or the merged group would hold less KV than now")
    return _plan(snapshot, shapes, before, merged[-1:], need_blocks)


def _nodes(snapshot: Snapshot, shapes: _Shapes) -> list[_Node]:
    """Return a node for each group of the server, before any merge."""
    devices = {view.device: (-view.budget_chunks, view.island) for view in snapshot.devices}
    nodes = []
    for group in snapshot.groups:
        places, seats = [], []
        near: int | None = devices[group.stages[0].device][1]
        for device, first, last in group.stages:
            budget, island = devices[device]
            places.append((first, last, budget))
            seats.append((first, last, budget, -group.used_blocks, device))
            near = near if near == island else None
        shape = shapes.of(tuple(places))
        origin = group.origin or Origin(group.stages)
        blocks, used, ids = shape.standing, group.used_blocks, (group.group_id,)
        is_full = used > FULL * blocks
        nodes.append(_Node(shape, len(places), blocks, blocks, used, near, ids, tuple(seats), origin, 0, is_full))
    return nodes


def _plan(
    snapshot: Snapshot, shapes: _Shapes, before: int, merged: list[_Node], need_blocks: int, room_blocks: int = 0
) -> DropPlan:
    """Cut the layers of every merged node, each for its share of need and room; `before`: capacity of the server."""
    wanted = max(need_blocks, room_blocks)
    rest = wanted - before + sum(node.apart for node in merged)  # what the merged ones must hold
    most = sum(node.blocks for node in merged)
    merges, chunk_bytes = [], snapshot.model.chunk_bytes
    for node in merged:
        share = node.blocks if rest > most else ceil_div(rest * node.blocks, most)
        cut = shapes.cut(node.shape, min(node.blocks, max(share, node.apart)))
        stages = stages_of(_seated(node.seats, cut), cut.ends)
        ids, freed_bytes, added = tuple(sorted(node.group_ids)), cut.freed_chunks * chunk_bytes, cut.blocks - node.apart
        merges.append(Merge(ids, stages, cut.blocks, node.origin, freed_bytes, added))
    meets_need = before + sum(merge.added_blocks for merge in merges) >= need_blocks
    return DropPlan(snapshot.epoch, tuple(merges), meets_need)


def _seated(seats: Iterable[Seat], cut: _Cut) -> list[int]:
    """Return the devices in the order of the chain. Of equal places, the longer is for who has more KV: less moves."""
    devices = [seat[4] for seat in sorted(seats)]
    seated = devices.copy()
    for position, device in zip(cut.by_length, devices, strict=True):
        seated[position] = device
    return seated
