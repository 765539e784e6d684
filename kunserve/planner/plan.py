"""What the planner answers: frozen plans. engine/regroup/reconfigure.py applies each merge whole or not at all."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from kunserve.planner.snapshot import Lineage, Snapshot, StageView


class DeviceLayout(NamedTuple):
    """The use of a device's chunks: the weights of one stage, and so many of KV for each of the model's layers."""

    stage: StageView
    kv_chunks: tuple[int, ...]  # 0: no KV of that layer is here


@dataclass(frozen=True, slots=True)
class Merge:
    """Groups that become one chain. Every device keeps a part of the layers it has: nothing is loaded."""

    group_ids: tuple[int, ...]
    stages: tuple[StageView, ...]
    capacity_blocks: int  # once the KV of live requests is exchanged
    lineage: Lineage
    freed_bytes: int = 0  # of weights
    added_blocks: int = 0  # capacity after minus before


@dataclass(frozen=True, slots=True)
class Join:
    """A group that devices of none join. Once they hold their weights it is like a merge with them.

    `snapshot` has them as if they were a group, which holds their layers only.
    """

    group_id: int
    snapshot: Snapshot
    merge: Merge
    newcomers: tuple[StageView, ...]


@dataclass(frozen=True, slots=True)
class DropPlan:
    """The merges of a drop, each by itself. Without `meets_need` they are all that can be dropped."""

    epoch: int
    merges: tuple[Merge, ...]
    meets_need: bool

    @property
    def freed_bytes(self) -> int:
        """Return the bytes of weights that all merges free."""
        return sum(merge.freed_bytes for merge in self.merges)

    @property
    def added_blocks(self) -> int:
        """Return by how many blocks all merges raise the server's capacity."""
        return sum(merge.added_blocks for merge in self.merges)


@dataclass(frozen=True, slots=True)
class NewGroup:
    """One of the groups that a split makes.

    `num_blocks`, one per stage: before the split each device shrinks its KV to so many blocks, which hold the blocks
    of all live requests of the old group (a block id means the same in all layers of a device). `layouts`, one per
    stage: what the device's chunks are for once its weights are back.
    """

    stages: tuple[StageView, ...]
    num_blocks: tuple[int, ...]
    layouts: tuple[DeviceLayout, ...]
    lineage: Lineage | None

    @property
    def capacity_blocks(self) -> int:
        """Return how many blocks the new group holds: those of its poorest stage."""
        return min(self.num_blocks)


@dataclass(frozen=True, slots=True)
class Split:
    """A merged group that becomes two. Every device gets more layers around those it has: none leave."""

    group_id: int
    into: tuple[NewGroup, NewGroup]


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """The splits of a restore, one step each (4 -> 2 + 2, later 2 -> 1 + 1), largest first."""

    epoch: int
    splits: tuple[Split, ...]


class ExchangeMode(enum.StrEnum):
    """How the KV of live requests follows its layers."""

    BY_REQUEST = "by_request"  # all layers of one request after the other: each resumes as soon as it can
    BY_LAYER = "by_layer"  # all requests, one layer after the other: needs the slack of one layer only
    INFEASIBLE = "infeasible"  # no order fits into the budgets: recompute these requests instead


@dataclass(frozen=True, slots=True)
class KvMove:
    """KV of layers `[first_layer, last_layer)` of some requests goes from one device to another."""

    request_ids: tuple[str, ...]
    first_layer: int
    last_layer: int
    source: int
    destination: int


class EarlyGrowth(NamedTuple):
    """Block ids of one device while KV goes by layer: those below its limit are mapped in every layer that stays."""

    device: int
    chunks: int  # that each layer that stays gets at once, so that new requests can run meanwhile
    num_blocks: int  # with those beyond the limit, for the KV that comes
    num_near: int = 0  # likewise, of layers with a window whose KV is a kind of its own

    def by_kind(self, num_kinds: int) -> tuple[int, ...]:
        """Return the blocks of each kind."""
        return (self.num_blocks, self.num_near)[:num_kinds]


@dataclass(frozen=True, slots=True)
class ExchangePlan:
    """Moves in an order in which each fits, if ranges that nobody uses any more are unmapped after every move."""

    mode: ExchangeMode
    moves: tuple[KvMove, ...]
    early_growth: tuple[EarlyGrowth, ...] = ()  # by layer: of every device
    # Of every device right after the drop, before any KV has left. They follow from the merge and from the rest here.
    layouts: tuple[DeviceLayout, ...] = field(default=(), compare=False)
    cached_groups: frozenset[int] = frozenset()  # whose cached blocks, which no request uses, can follow after that
