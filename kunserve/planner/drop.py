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
from kunserve.planner.snapshot import Lineage, ModelShape, Snapshot
from kunserve.sizes import ceil_div

FULL_SHARE = 0.85  # share of a group's blocks in use; source: docs/measurements.md, "The planner's constants"
# Of a merge, as a share of the blocks that its groups hold unmerged: for 5 % simulated requests stood still for 6.2 s.
LEAST_MERGE_GAIN = 0.08

# First and last layer that a device of a chain holds now, and its budget (negative: the richest of equals is first).
HeldLayers = tuple[int, int, int]
# The same, then how many blocks the device's group uses (negative), and the device itself.
HeldByDevice = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class _Cut:
    """A split: where stages end, positions from long to short among equals, blocks it holds, weights that leave."""

    ends: tuple[int, ...]
    by_length: tuple[int, ...]
    blocks: int
    freed_chunks: int


@dataclass(slots=True, eq=False)
class _ChainType:
    """All that the split of a chain depends on. Most groups of a server are alike, so each type is worked out once."""

    held: tuple[HeldLayers, ...]  # in the order of the chain
    chain: Chain
    blocks_now: int  # blocks it holds as it stands
    merged: dict[_ChainType, _ChainType] = field(default_factory=dict)
    cuts: dict[int, _Cut] = field(default_factory=dict)  # by the chunks of KV per layer that are needed


class _ChainTypes:
    """The types of chains that one plan meets."""

    def __init__(self, model: ModelShape) -> None:
        self.model = model
        self._known: dict[tuple[HeldLayers, ...], _ChainType] = {}

    def of(self, held: tuple[HeldLayers, ...]) -> _ChainType:
        """Return the one type that holds these layers. Its devices keep a part of them: a drop loads nothing."""
        if (chain_type := self._known.get(held)) is None:
            cuts = cuts_within([(first, last) for first, last, _ in held])
            chain = Chain(self.model, [-budget for _, _, budget in held], cuts)
            chunks = min(self.model.kv_chunks(-budget, first, last) for first, last, budget in held)
            chain_type = self._known[held] = _ChainType(held, chain, self.model.blocks_in(chunks))
        return chain_type

    def merge(self, a: _ChainType, b: _ChainType) -> _ChainType:
        """Return the type of both in one chain, in which every device stays near the layers it has."""
        if (chain_type := a.merged.get(b)) is None:
            chain_type = a.merged[b] = self.of(tuple(sorted(a.held + b.held)))
        return chain_type

    def most_blocks(self, chain_type: _ChainType) -> int:
        """Return the blocks of the split that holds most; 0 if no cut leaves each device layers of its own, with KV."""
        return self.model.blocks_in(chain_type.chain.most_chunks or 0)

    def cut(self, chain_type: _ChainType, need_blocks: int) -> _Cut:
        """Return the best split that holds `need_blocks`; there must be one."""
        min_chunks = self.model.chunks_for(need_blocks)
        if (cut := chain_type.cuts.get(min_chunks)) is None:
            ends = chain_type.chain.best(min_chunks)
            assert ends is not None
            cut = chain_type.cuts[min_chunks] = self._cut(chain_type.held, ends)
        return cut

    def _cut(self, held: tuple[HeldLayers, ...], ends: tuple[int, ...]) -> _Cut:
        model, starts = self.model, (0, *ends[:-1])
        by_length = sorted(range(len(ends)), key=lambda i: (held[i], starts[i] - ends[i]))
        after = [(first, last, layers[2]) for first, last, layers in zip(starts, ends, held, strict=True)]
        chunks = min(model.kv_chunks(-budget, first, last) for first, last, budget in after)
        freed = sum(model.weight_chunks(first, last) for first, last, _ in held)
        freed -= sum(model.weight_chunks(first, last) for first, last, _ in after)
        return _Cut(ends, tuple(by_length), model.blocks_in(chunks), freed)


@dataclass(slots=True, eq=False)
class _Node:
    """A group, or several that the plan merges."""

    chain_type: _ChainType
    num_devices: int
    blocks: int  # it holds; of several: in the split that holds most
    blocks_unmerged: int  # blocks that its groups hold as they stand
    used: int
    island: int | None  # None: it spans several
    group_ids: tuple[int, ...]  # from the least
    by_device: tuple[HeldByDevice, ...]
    lineage: Lineage
    gain: int = 0  # blocks it holds more than its two parts
    is_full: bool = False  # hardly any of its blocks is free
    is_waiting: bool = True  # for a partner
    is_part: bool = False  # of another node


def _merged(types: _ChainTypes, a: _Node, b: _Node, least_gain: float) -> _Node | None:
    """Merge two nodes; None unless they hold blocks together, and more by `least_gain` than the two do alone."""
    num_devices = a.num_devices + b.num_devices
    if num_devices > types.model.num_layers:
        return None
    chain_type = types.merge(a.chain_type, b.chain_type)
    blocks = types.most_blocks(chain_type)
    gain = blocks - a.blocks - b.blocks
    if not blocks or gain <= least_gain * (a.blocks + b.blocks):
        return None
    return _Node(
        chain_type,
        num_devices,
        blocks,
        a.blocks_unmerged + b.blocks_unmerged,
        a.used + b.used,
        a.island if a.island == b.island else None,
        a.group_ids + b.group_ids if a.group_ids < b.group_ids else b.group_ids + a.group_ids,
        a.by_device + b.by_device,
        Lineage((), (a.lineage, b.lineage)),
        gain,
    )


Entry = tuple[int, bool, int, int, _Node]


class _Smallest:
    """Nodes that may merge: fewest devices first, then the full, then least KV to exchange; of each island at hand."""

    def __init__(self, nodes: Iterable[_Node]) -> None:
        self._all = [self._entry(node) for node in nodes]
        self._full = [entry for entry in self._all if entry[-1].is_full]
        self._of_island: defaultdict[int | None, list[Entry]] = defaultdict(list)
        for entry in self._all:
            self._of_island[entry[-1].island].append(entry)
        heapify(self._all)
        heapify(self._full)
        for heap in self._of_island.values():
            heapify(heap)

    @staticmethod
    def _entry(node: _Node) -> Entry:
        return node.num_devices, not node.is_full, node.used, node.group_ids[0], node

    @staticmethod
    def _first(heap: list[Entry]) -> _Node | None:
        # A node that finds a partner is still in heaps that it was not taken out of: it would merge twice.
        while heap and not heap[0][-1].is_waiting:
            heappop(heap)
        return heap[0][-1] if heap else None

    def _partners(self, node: _Node, other: _Node) -> tuple[_Node, ...]:
        if node.island is None or node.island == other.island:
            return (other,)
        near = self._first(self._of_island[node.island])
        return (near, other) if near and near.num_devices == other.num_devices else (other,)

    def merge_next(self, types: _ChainTypes, least_gain: float, *, only_full: bool = False) -> _Node | None:
        """Merge the smallest node and the smallest other, on its island if one is as small; None if no two can.

        `only_full`: the smallest of the full groups, with whatever is the smallest other. A node that gains no more
        than this share of their blocks with either is left as it is.
        """
        while node := self._first(self._full if only_full else self._all):
            # Taken off even if it finds no partner: a larger one would gain a smaller share still, and trying the same
            # two again would never end.
            node.is_waiting = False
            other = self._first(self._all)
            for partner in self._partners(node, other) if other else ():
                if merged := _merged(types, node, partner, least_gain):
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
    hold hardly more together (`LEAST_MERGE_GAIN`) stay unmerged: their requests would stand still, while
    their KV moves, for longer than what waits would wait.

    Where anything has to merge, all groups do that are full (`FULL_SHARE`) and gain by it: free blocks elsewhere are
    nothing to their requests, and the only group with free blocks would get all new requests, more than it can compute.
    """
    types = _ChainTypes(snapshot.model)
    nodes = _nodes(snapshot, types)
    before = capacity = sum(node.blocks for node in nodes)
    heap, merged = _Smallest(nodes), []
    has_to_merge = capacity < need_blocks
    while has_to_merge and (node := heap.merge_next(types, LEAST_MERGE_GAIN, only_full=capacity >= need_blocks)):
        capacity += node.gain
        merged.append(node)
    return _plan(snapshot, types, before, [node for node in merged if not node.is_part], need_blocks, room_blocks)


def plan_drop_of(snapshot: Snapshot, group_ids: Sequence[int], need_blocks: int = 0) -> DropPlan:
    """Merge exactly these groups, as an operator asks; `need_blocks` is what the whole server should hold.

    Errors: InvalidRequestError (fewer than two groups, twice the same, no such group), ConflictError (the groups have
    more devices than there are layers, or would hold less than now).
    """
    types = _ChainTypes(snapshot.model)
    nodes = {node.group_ids[0]: node for node in _nodes(snapshot, types)}
    if len(group_ids) < 2 or len(set(group_ids)) < len(group_ids):
        raise InvalidRequestError("a drop needs two or more different groups", param="groups")
    if unknown := [group_id for group_id in group_ids if group_id not in nodes]:
        raise InvalidRequestError(f"no such group: {unknown[0]}", param="groups")
    before = sum(node.blocks for node in nodes.values())
    heap = _Smallest(nodes[group_id] for group_id in group_ids)
    merged = [node for _ in group_ids[1:] if (node := heap.merge_next(types, least_gain=-1.0))]
    if len(merged) < len(group_ids) - 1 or merged[-1].blocks < merged[-1].blocks_unmerged:
        raise ConflictError("cannot merge: fewer layers than devices, or the merged group would hold less KV than now")
    return _plan(snapshot, types, before, merged[-1:], need_blocks)


def _nodes(snapshot: Snapshot, types: _ChainTypes) -> list[_Node]:
    """Return a node for each group of the server, before any merge."""
    devices = {view.device: (-view.budget_chunks, view.island) for view in snapshot.devices}
    nodes = []
    for group in snapshot.groups:
        held, by_device = [], []
        near: int | None = devices[group.stages[0].device][1]
        for device, first, last in group.stages:
            budget, island = devices[device]
            held.append((first, last, budget))
            by_device.append((first, last, budget, -group.used_blocks, device))
            near = near if near == island else None
        chain_type = types.of(tuple(held))
        lineage = group.lineage or Lineage(group.stages)
        blocks, used, ids = chain_type.blocks_now, group.used_blocks, (group.group_id,)
        node = _Node(chain_type, len(held), blocks, blocks, used, near, ids, tuple(by_device), lineage)
        node.is_full = used > FULL_SHARE * blocks
        nodes.append(node)
    return nodes


def _plan(
    snapshot: Snapshot, types: _ChainTypes, before: int, merged: list[_Node], need_blocks: int, room_blocks: int = 0
) -> DropPlan:
    """Cut the layers of every merged node, each for its share of need and room; `before`: capacity of the server."""
    wanted = max(need_blocks, room_blocks)
    rest = wanted - before + sum(node.blocks_unmerged for node in merged)  # what the merged ones must hold
    most = sum(node.blocks for node in merged)
    merges, chunk_bytes = [], snapshot.model.chunk_bytes
    for node in merged:
        share = node.blocks if rest > most else ceil_div(rest * node.blocks, most)
        cut = types.cut(node.chain_type, min(node.blocks, max(share, node.blocks_unmerged)))
        stages = stages_of(_in_chain_order(node.by_device, cut), cut.ends)
        ids, freed_bytes = tuple(sorted(node.group_ids)), cut.freed_chunks * chunk_bytes
        added = cut.blocks - node.blocks_unmerged
        merges.append(Merge(ids, stages, cut.blocks, node.lineage, freed_bytes, added))
    meets_need = before + sum(merge.added_blocks for merge in merges) >= need_blocks
    return DropPlan(snapshot.epoch, tuple(merges), meets_need)


def _in_chain_order(by_device: Iterable[HeldByDevice], cut: _Cut) -> list[int]:
    """Return the devices in chain order. Where they hold equal layers, the one with more KV gets more: less moves."""
    devices = [held[-1] for held in sorted(by_device)]
    ordered = devices.copy()
    for position, device in zip(cut.by_length, devices, strict=True):
        ordered[position] = device
    return ordered
