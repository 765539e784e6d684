"""The swap queue: requests whose KV is in host memory, or on its way there or back. engine/regroup/swap.py copies.

A request that moves is suspended: it holds its blocks on the device and in the host's space, and is not scheduled.
Once its KV is on the host it belongs to no group: any that has room may take it back.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass

from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.request import Request


@dataclass(frozen=True, slots=True, eq=False)
class SwapMove:
    """One request's KV between its group's devices and the host: its first `num_blocks` blocks, of all layers.

    Without those behind the window: where KV is of two kinds, of the near ones.
    """

    request: Request
    group: Group
    num_blocks: int
    is_out: bool  # to the host; else back
    num_behind: int  # of the first blocks, or of the first near ones


class SwapQueue:
    """Requests on the host, those on their way, and how much of a bounded space they take.

    Those on the host are in the order in which they go back: of their priority, then of their arrival.
    """

    def __init__(self, fleet: Fleet, num_blocks: int) -> None:
        self._fleet = fleet
        self.num_blocks = num_blocks  # room in host memory; a block there holds all layers
        self.ready: deque[Request] = deque()  # on the host: any group may take them back
        self.num_swaps = 0  # how often a request began to leave
        self._held: dict[str, int] = {}  # request id -> blocks of host space
        self._leaving = defaultdict[int, dict[str, int]](dict)  # group id -> request id -> blocks that come free
        self.moving: dict[str, SwapMove] = {}  # by request id
        self._begun: list[SwapMove] = []

    @property
    def head(self) -> Request | None:
        """Return the request on the host that goes back next."""
        return self.ready[0] if self.ready else None

    @property
    def num_free(self) -> int:
        """Return how many blocks of host space nobody holds."""
        return self.num_blocks - sum(self._held.values())

    def num_leaving(self, group: Group) -> int:
        """Return the blocks of a group that come free when their copies to the host are done."""
        return sum(self._leaving[group.group_id].values())

    def begin_out(self, group: Group, request: Request) -> bool:
        """Send an evictable request to the host; False, and no change, if it has no KV or the space is full."""
        move = self._move(request, group, is_out=True)
        num_held = move.num_blocks - (move.num_behind if request.table.near is None else 0)
        if not 0 < num_held <= self.num_free:
            return False
        self._held[request.request_id] = num_held
        self._leaving[group.group_id][request.request_id] = request.num_own_blocks
        self.num_swaps += 1
        self._begin(move)
        return True

    def begin_in(self, group: Group) -> None:
        """Bring the first of the ready requests back to `group`, which has blocks for its whole input."""
        request = self.ready.popleft()
        self._fleet.admit(request, group)
        self._begin(self._move(request, group, is_out=False))

    def take_begun(self) -> list[SwapMove]:
        """Return the moves that began since the last call, in order: the caller copies them, and ends each."""
        begun, self._begun = self._begun, []
        return begun

    def end(self, move: SwapMove, *, is_kept: bool) -> None:
        """End a copy that is over. `is_kept`: the host has the KV now, and the request has left its group."""
        del self.moving[move.request.request_id]
        if move.is_out:
            del self._leaving[move.group.group_id][move.request.request_id]
        self._fleet.resume(move.request)
        if not is_kept:
            del self._held[move.request.request_id]
            return
        later = (i for i, other in enumerate(self.ready) if _turn(other) > _turn(move.request))
        self.ready.insert(next(later, len(self.ready)), move.request)

    def remove(self, request: Request) -> None:
        """Forget a request that is on the host. Nothing happens if it is not."""
        if request in self.ready:
            self.ready.remove(request)
            del self._held[request.request_id]

    def check(self) -> None:
        """Assert that space is held by exactly those that are on the host or moving, within its bound."""
        assert self._held.keys() == {r.request_id for r in self.ready} | self.moving.keys()
        assert self.num_free >= 0
        assert all(r.group_id is None and not r.is_moving and not r.block_tables for r in self.ready)
        assert all(m.request.is_moving and m.request in m.group.running for m in self.moving.values())

    def _move(self, request: Request, group: Group, *, is_out: bool) -> SwapMove:
        num_tokens = request.num_computed_tokens
        return SwapMove(request, group, group.blocks_for(num_tokens), is_out, self._fleet.num_behind(num_tokens))

    def _begin(self, move: SwapMove) -> None:
        self._fleet.suspend(move.request)
        self.moving[move.request.request_id] = move
        self._begun.append(move)


def _turn(request: Request) -> tuple[int, float]:
    return request.priority, request.arrival_s
