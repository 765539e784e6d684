"""A group: one complete copy of the parameters as a chain of stages, and the requests bound to it.

Also cached blocks on their way to one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from kunserve.averages import smooth
from kunserve.engine.blocks.block_pool import BlockPool
from kunserve.engine.blocks.block_table import Block, BlockTable
from kunserve.engine.occupancy import Occupancy
from kunserve.engine.request import Request
from kunserve.planner.snapshot import Lineage, StageView
from kunserve.sizes import ceil_div

if TYPE_CHECKING:
    from kunserve.engine.batch import Microbatch


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers `[first_layer, last_layer)` on one device; the pools are the device's.

    It has one of near blocks, too, where KV is of two kinds, even if none of these layers is of one of them.
    """

    device: int
    first_layer: int
    last_layer: int
    pool: BlockPool
    near_pool: BlockPool | None = None

    @property
    def view(self) -> StageView:
        """Return the stage as the planner sees it."""
        return StageView(self.device, self.first_layer, self.last_layer)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Group:
    """A chain and its requests. Every stage holds the same number of blocks of a request, from its own pool.

    Where KV is of two kinds it is a MixedGroup (kinds/mixed_group.py).

    The fleet (engine/fleet.py) binds requests and gives them blocks; the scheduler keeps what is in flight.
    """

    is_mixed: ClassVar[bool] = False  # KV is of two kinds

    group_id: int
    stages: tuple[Stage, ...]
    block_size: int
    running: list[Request] = field(default_factory=list)  # in order of admission
    idle: OrderedDict[Block, None] = field(default_factory=OrderedDict)  # cached blocks; the first is the oldest
    in_flight: list[Microbatch] = field(default_factory=list)  # in the order in which they were scheduled
    returned_s: list[float] = field(default_factory=list)  # when the last microbatches came back, one for each stage
    step_s: float | None = None  # how long a microbatch is computed, on average; None: none has come back
    lineage: Lineage | None = None  # how it was launched or merged
    num_pauses: int = 0  # that hold it now: see `Fleet.pause`
    is_admitting: bool = True  # False: KV on its way here needs the blocks first
    is_suspect: bool = False  # a device fails or does not answer: no new requests while there are other groups
    is_lost: bool = False  # a device is gone
    on_first_commit: Callable[[], None] | None = None  # called when its first microbatch came back
    occupancy: Occupancy = field(init=False)  # of the stages, kept by `Executor.execute`

    def __post_init__(self) -> None:
        self.occupancy = Occupancy(len(self.stages))

    @property
    def is_paused(self) -> bool:
        """Return whether nothing new is scheduled: somebody waits for a step boundary, or a device is gone."""
        return self.num_pauses > 0 or self.is_lost

    @property
    def num_in_flight(self) -> int:
        """Return how many microbatches were scheduled and have not come back."""
        return len(self.in_flight)

    @property
    def num_blocks(self) -> int:
        """Return the number of blocks that requests can hold at once: the least of the stages."""
        return min(stage.pool.limit for stage in self.stages)

    @property
    def num_free(self) -> int:
        """Return the number of blocks that a request could get now: free ones, and cached ones that nobody holds."""
        return min(stage.pool.num_free for stage in self.stages) + len(self.idle)

    @property
    def num_used(self) -> int:
        """Return the number of blocks in use by requests on the fullest stage."""
        return max(stage.pool.num_used for stage in self.stages) - len(self.idle)

    def free_for(self, num_tokens: int) -> int:
        """Return the blocks that a new request of so many tokens could get now; 0 if something else is lacking."""
        return self.num_free

    def can_hold(self, lengths: Sequence[int]) -> bool:
        """Return whether requests of so many tokens each fit all at once."""
        return sum(map(self.blocks_for, lengths)) <= self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks that hold `num_tokens` tokens of one request."""
        return ceil_div(num_tokens, self.block_size)

    def reach(self, request: Request) -> int:
        """Return up to which token a request could be computed now, if nobody makes way; asked if it `is_mixed`."""
        return (request.num_places + self.num_free) * self.block_size

    def missing_blocks(self, request: Request, num_tokens: int) -> int:
        """Return the blocks that `request` has to get on every stage before it can hold `num_tokens`."""
        return max(0, self.blocks_for(num_tokens) - request.num_places)

    def returned(self, launched_s: float, now_s: float) -> float:
        """Note that a microbatch comes back now; returns how long it was computed, not while it waited for others."""
        before = self.returned_s
        begun_s = max(launched_s, before[0]) if len(before) == len(self.stages) else launched_s
        before.append(now_s)
        del before[: -len(self.stages)]
        self.step_s = smooth(self.step_s, now_s - begun_s)
        return now_s - begun_s

    def check(self, num_layers: int) -> None:
        """Assert invariant 1, and that the requests' blocks and counters are consistent."""
        bounds = [(stage.first_layer, stage.last_layer) for stage in self.stages]
        assert bounds[0][0] == 0 and bounds[-1][1] == num_layers
        assert all(a[1] == b[0] for a, b in pairwise(bounds)) and all(a < b for a, b in bounds)
        for request in self.running:
            assert request.group_id == self.group_id
            assert request.finish_reason is None or request.num_in_flight or request.is_moving  # released after that
            assert request.num_computed_tokens <= request.num_scheduled_tokens
            # Whoever ran ahead of a token that a failed step did not bring starts over once nothing carries it.
            assert request.has_failed or request.num_scheduled_tokens <= request.num_expected_tokens
            assert 0 <= request.num_sampling <= request.num_in_flight
            if request.is_moving:
                continue
            assert list(request.table.ids) == [stage.device for stage in self.stages]
            assert request.num_places >= self.blocks_for(request.num_scheduled_tokens)


class Follower(NamedTuple):
    """A cached block on its way: where it was, and what is in it."""

    block: Block
    key: bytes
    parent: bytes | None
    left: tuple[StageView, ...]  # stages that it was on


@dataclass(frozen=True, slots=True, eq=False)
class Convoy:
    """Cached blocks that go together: from the same stages to the same group, the hottest first."""

    group: Group
    followers: tuple[Follower, ...]
    table: BlockTable  # the same blocks

    @property
    def left(self) -> tuple[StageView, ...]:
        """Return the stages that all of them were on."""
        return self.followers[0].left
