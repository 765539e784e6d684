"""A group whose KV is of two kinds: full, of layers that see all tokens, and near, of those with a window.

Everybody counts full blocks. Near ones are told where they are short: then nobody new comes in, and whoever runs and
needs one waits, or others make way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from kunserve.engine.blocks.block_pool import BlockPool
from kunserve.engine.blocks.block_table import Block
from kunserve.engine.group import Group, Stage
from kunserve.engine.request import Request
from kunserve.planner.demand import near_blocks
from kunserve.planner.snapshot import Lineage
from kunserve.sizes import ceil_div


class NearLayers(NamedTuple):
    """Names the layers with a window whose KV is a kind of its own."""

    layers: frozenset[int]
    window: int  # tokens that one sees, itself among them


def layers_of_kind(near: NearLayers | None, kind: int, layers: range) -> Sequence[int]:
    """Return those of some layers that are of a kind: full, then near if there are two."""
    return layers if near is None else [layer for layer in layers if (layer in near.layers) == bool(kind)]


def new_group(
    group_id: int, stages: Sequence[Stage], block_size: int, lineage: Lineage | None, near: NearLayers | None
) -> Group:
    """Return a group; `near`: layers whose KV is a kind of its own, if there are any."""
    if near is None:
        return Group(group_id, tuple(stages), block_size, lineage=lineage)
    return MixedGroup(group_id, tuple(stages), block_size, lineage=lineage, window=near.window)


def near_pool(stage: Stage) -> BlockPool:
    """Return the pool of near blocks of a stage of such a group."""
    assert stage.near_pool is not None
    return stage.near_pool


@dataclass(slots=True, eq=False)
class MixedGroup(Group):
    """A `Group` that counts both kinds of KV. `window`: of the near layers, in tokens."""

    is_mixed: ClassVar[bool] = True

    window: int = field(kw_only=True)
    near_idle: OrderedDict[Block, None] = field(default_factory=OrderedDict)  # as `idle`

    @property
    def num_near_free(self) -> int:
        """Return the near blocks that a request could get now."""
        return min(near_pool(stage).num_free for stage in self.stages) + len(self.near_idle)

    @property
    def num_near_blocks(self) -> int:
        """Return the near blocks that requests can hold at once."""
        return min(near_pool(stage).limit for stage in self.stages)

    @property
    def num_near_used(self) -> int:
        """Return the near blocks in use by requests on the fullest stage."""
        return max(near_pool(stage).num_used for stage in self.stages) - len(self.near_idle)

    @property
    def num_full_used(self) -> int:
        """Return the full blocks in use by requests on the fullest stage."""
        return max(stage.pool.num_used for stage in self.stages) - len(self.idle)

    @property
    def num_full_free(self) -> int:
        """Return the full blocks that a request could get now."""
        return min(stage.pool.num_free for stage in self.stages) + len(self.idle)

    @property
    def num_free(self) -> int:
        """Return the blocks that a request could get now of both kinds."""
        return min(self.num_full_free, self.num_near_free)

    @property
    def num_used(self) -> int:
        """Return the blocks in use by requests; if near ones are scarcer, as many as are the same share of all."""
        return max(self.num_full_used, ceil_div(self.num_near_used * self.num_blocks, max(1, self.num_near_blocks)))

    def free_for(self, num_tokens: int) -> int:
        """See `Group.free_for`. Whoever runs gets the near blocks that its own tokens need first."""
        needed = min(self.near_blocks_for(num_tokens), self.num_near_blocks)
        return self.num_full_free if needed <= self.num_near_free - self.near_promised() else 0

    def near_promised(self, num_steps: int = 0) -> int:
        """Return the near blocks that running requests lack for the tokens they have, or will have after some steps."""
        promised = 0
        for request in self.running:
            near = request.table.near
            if near is not None:
                num_tokens = min(request.num_tokens + num_steps, request.max_num_tokens)
                promised += max(0, self.near_blocks_for(num_tokens) - len(near.blocks))
        return promised

    def can_hold(self, lengths: Sequence[int]) -> bool:
        """See `Group.can_hold`."""
        near = sum(map(self.near_blocks_for, lengths))
        return sum(map(self.blocks_for, lengths)) <= self.num_blocks and near <= self.num_near_blocks

    def near_blocks_for(self, num_tokens: int) -> int:
        """Return the near blocks that a request of so many tokens has at once while it decodes."""
        return near_blocks(num_tokens, self.window, self.block_size)

    def reach(self, request: Request) -> int:
        """See `Group.reach`."""
        near = request.table.near
        return ((0 if near is None else near.num_places) + self.num_near_free) * self.block_size

    def missing_blocks(self, request: Request, num_tokens: int) -> int:
        """See `Group.missing_blocks`. Of near ones only those of its next token count: the others come as it goes."""
        near = request.table.near
        missing = max(0, self.blocks_for(num_tokens) - request.num_places)
        if near is None:
            return missing
        next_token = min(num_tokens, request.num_scheduled_tokens + 1)
        return max(missing, self.blocks_for(next_token) - near.num_places)

    def check(self, num_layers: int) -> None:
        """See `Group.check`."""
        Group.check(self, num_layers)
        for request in self.running:
            near = request.table.near
            if not request.is_moving:
                assert near is not None
                assert near.num_places >= self.blocks_for(request.num_scheduled_tokens)
                assert near.num_behind * self.block_size <= max(0, request.num_computed_tokens + 1 - self.window)
