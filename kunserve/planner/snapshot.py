"""What the planner sees: the server's memory as frozen values, and the arithmetic of chunks and blocks.

Flow: demand -> overload -> drop | restore -> exchange. Everything in this package is a pure function of values.
Each layer has its own KV range that grows by whole chunks, so a stage's capacity is found in two roundings: chunks per
layer, then blocks per layer. A group holds as many blocks as its poorest stage.

KV is of one kind, or of two: that of layers that see all tokens (full), and that of layers with a window (near), which
need less. Blocks and chunks are of a full layer, unless said otherwise; how many a near one has follows from them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from kunserve.sizes import ceil_div


class NearKv(NamedTuple):
    """Says which layers with a window have KV of a kind of its own, and how much."""

    layers: tuple[int, ...]  # in order
    share: int  # chunks, in thousandths of those of a full layer
    least_chunks: int = 1  # that one request needs, if a full layer has as many
    is_fixed: bool = True  # False: the share follows what is asked for

    def chunks(self, full_chunks: int) -> int:
        """Return the chunks of a near layer where full ones have `full_chunks`: no more than those."""
        return min(full_chunks, max(self.least_chunks, ceil_div(full_chunks * self.share, 1000)))

    def num_within(self, layers: range) -> int:
        """Count how many of some layers are near."""
        return bisect_left(self.layers, layers.stop) - bisect_left(self.layers, layers.start)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of one model in chunks, and what its parts cost in time (relative to each other).

    With `tied` embeddings the embedding's unit holds the final norm too and both ends of a chain need it. Where
    `shares_head`, both ends then compute the head too, each for half of the vocabulary.
    """

    num_layers: int
    layer_chunks: int  # of one layer's weights
    embed_chunks: int
    head_chunks: int  # 0 if tied
    tied: bool
    kv_block_bytes: int  # one block of one layer
    chunk_bytes: int
    block_size: int  # tokens
    layer_time: float = 1.0
    embed_time: float = 0.0
    head_time: float = 0.0  # norm, head and sampling
    shares_head: bool = False
    max_layer_chunks: int = 1 << 62  # of one layer's KV: what its addresses have room for
    near: NearKv | None = None  # None: KV is of one kind

    def __post_init__(self) -> None:
        assert self.num_layers > 0 and self.layer_chunks > 0 and self.layer_time > 0
        assert self.kv_block_bytes > 0 and self.chunk_bytes > 0 and self.block_size > 0
        assert not (self.tied and self.head_chunks) and (self.tied or not self.shares_head)

    def end_chunks(self, is_first: bool, is_last: bool) -> int:
        """Return the chunks of embedding and head that a stage holds besides its layers."""
        embed = self.embed_chunks if is_first or (is_last and self.tied) else 0
        return embed + (self.head_chunks if is_last else 0)

    def end_time(self, is_first: bool, is_last: bool) -> float:
        """Return the time of embedding and head on a stage."""
        if self.shares_head and is_first != is_last:
            return self.head_time / 2 + (self.embed_time if is_first else 0.0)
        return (self.embed_time if is_first else 0.0) + (self.head_time if is_last else 0.0)

    def weight_chunks(self, first_layer: int, last_layer: int) -> int:
        """Return the chunks of all units that layers `[first_layer, last_layer)` need."""
        ends = self.end_chunks(first_layer == 0, last_layer == self.num_layers)
        return ends + (last_layer - first_layer) * self.layer_chunks

    def stage_time(self, first_layer: int, last_layer: int) -> float:
        """Return the time of one pass through layers `[first_layer, last_layer)`."""
        ends = self.end_time(first_layer == 0, last_layer == self.num_layers)
        return ends + (last_layer - first_layer) * self.layer_time

    def kv_chunks(self, budget_chunks: int, first_layer: int, last_layer: int) -> int:
        """Return the chunks of KV that each layer of a stage can have; negative if not even the weights fit."""
        left = budget_chunks - self.weight_chunks(first_layer, last_layer)
        return min(self.max_layer_chunks, self.chunks_within(left, self.by_kind(range(first_layer, last_layer))))

    def by_kind(self, layers: range) -> tuple[int, ...]:
        """Count how many of some layers are of each kind: full, then near if there are two."""
        if self.near is None:
            return (len(layers),)
        num_near = self.near.num_within(layers)
        return (len(layers) - num_near, num_near)

    @property
    def num_kinds(self) -> int:
        """Return how many kinds of KV there are."""
        return 1 if self.near is None else 2

    def kind_of(self, layer: int) -> int:
        """Return the index of a layer's kind in tuples that have one entry for each kind: 0 full, 1 near."""
        return 0 if self.near is None else self.near.num_within(range(layer, layer + 1))

    def chunks_by_kind(self, chunks: int) -> tuple[int, ...]:
        """Return the chunks of one layer of each kind where full ones have `chunks`."""
        return (chunks,) if self.near is None else (chunks, self.near.chunks(chunks))

    def chunks_within(self, num_chunks: int, num_layers: tuple[int, ...]) -> int:
        """Return the chunks of a full layer where `num_layers` of each kind share `num_chunks`.

        Without full layers: the chunks that a full one would have beside near ones of this size.
        """
        kind = self.near
        if kind is None or num_chunks < 0:
            return num_chunks // sum(num_layers)
        full, near = num_layers
        most = num_chunks // full if full else num_chunks // near * 1000 // kind.share
        return bisect_left(range(1, most + 1), True, key=lambda n: full * n + near * kind.chunks(n) > num_chunks)

    def with_share(self, share: int) -> ModelShape:
        """Return the same model where layers with a window have another share of KV; there are two kinds."""
        assert self.near is not None
        return replace(self, near=self.near._replace(share=share))

    def with_most_full(self) -> ModelShape:
        """Return the same model with the share that leaves most to full layers, unless the share is fixed."""
        return self if self.near is None or self.near.is_fixed else self.with_share(1)

    def blocks_by_kind(self, chunks: int) -> tuple[int, ...]:
        """Return the blocks of each kind that one layer holds where full layers have `chunks`."""
        return tuple(map(self.blocks_in, self.chunks_by_kind(chunks)))

    def blocks_in(self, chunks: int) -> int:
        """Return the blocks that `chunks` chunks of one layer's KV hold."""
        return max(0, chunks) * self.chunk_bytes // self.kv_block_bytes

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks that hold `tokens` tokens of one request."""
        return ceil_div(tokens, self.block_size)

    def chunks_for(self, blocks: int) -> int:
        """Return the chunks that one layer's KV needs to hold `blocks` blocks."""
        return ceil_div(blocks * self.kv_block_bytes, self.chunk_bytes)


@dataclass(frozen=True, slots=True)
class DeviceView:
    """One device: its budget, and the island of devices it has fast links with."""

    device: int
    budget_chunks: int
    island: int = 0


class StageView(NamedTuple):
    """Layers `[first_layer, last_layer)` on one device."""

    device: int
    first_layer: int
    last_layer: int


class Lineage(NamedTuple):
    """Where a group came from: the stages it was launched with, or the two lineages it was merged from."""

    stages: tuple[StageView, ...] = ()
    merged_from: tuple[Lineage, ...] = ()

    def launched(self) -> Iterator[Lineage]:
        """Yield all lineages of the tree that were launched, not merged."""
        if not self.merged_from:
            yield self
        for lineage in self.merged_from:
            yield from lineage.launched()


@dataclass(frozen=True, slots=True)
class GroupView:
    """One complete copy of the model, and what its live requests hold (as many blocks on each of its devices)."""

    group_id: int
    stages: tuple[StageView, ...]
    used_blocks: int = 0
    lineage: Lineage | None = None  # None: not known; restoring then halves the group


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The server at one moment: every plan made from it is for `epoch` only."""

    epoch: int
    model: ModelShape
    devices: tuple[DeviceView, ...]
    groups: tuple[GroupView, ...]

    def budgets(self) -> dict[int, int]:
        """Return the budget of each device, in chunks."""
        return {view.device: view.budget_chunks for view in self.devices}

    def capacity_blocks(self) -> int:
        """Return the blocks that all groups hold together now."""
        budgets = self.budgets()
        return sum(capacity_blocks(self.model, budgets, group.stages) for group in self.groups)

    def longest_blocks(self) -> int:
        """Return the most blocks of one request wherever it runs first, with every drop undone: the largest group's."""
        budgets = self.budgets()
        launched = (stages for group in self.groups for stages in launched_stages(self.model, budgets, group))
        return max((capacity_blocks(self.model, budgets, stages) for stages in launched), default=0)

    def undropped_blocks(self) -> int:
        """Return the blocks that all groups would hold together if every drop were undone."""
        budgets = self.budgets()
        launched = (stages for group in self.groups for stages in launched_stages(self.model, budgets, group))
        return sum(capacity_blocks(self.model, budgets, stages) for stages in launched)


def stage_blocks(model: ModelShape, budgets: dict[int, int], stage: StageView) -> int:
    """Return the blocks that one stage holds when all its device's chunks are given to it."""
    return model.blocks_in(model.kv_chunks(budgets[stage.device], stage.first_layer, stage.last_layer))


def capacity_blocks(model: ModelShape, budgets: dict[int, int], stages: Iterable[StageView]) -> int:
    """Return the blocks that a group with these stages holds: the least of its stages'."""
    return min(stage_blocks(model, budgets, stage) for stage in stages)


def launched_stages(model: ModelShape, budgets: dict[int, int], group: GroupView) -> list[tuple[StageView, ...]]:
    """Return the stages of the groups that a group was at launch.

    Of a group without a known lineage: each device alone, if each can hold the model and some KV; else as it is.
    """
    if group.lineage is not None:
        return [lineage.stages for lineage in group.lineage.launched()]
    alone: list[tuple[StageView, ...]] = [(StageView(stage.device, 0, model.num_layers),) for stage in group.stages]
    return alone if all(capacity_blocks(model, budgets, stages) for stages in alone) else [group.stages]
