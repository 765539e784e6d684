"""The mix of two kinds of KV: which share layers with a window have, and when another one holds more of what is asked.

A share is that of `NearKv`, in thousandths. The more near layers have, the less is left to full ones, on every device:
so the shares with which everybody keeps what they hold are a range, and the best of it is where both kinds hold the
same part of what is asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

from kunserve.planner.layouts import blocks_of, stage_layout
from kunserve.planner.snapshot import ModelShape, Snapshot, StageView, launched_stages

SHARES = range(1, 1001)
LEAST_MIX_GAIN = 1.1  # of what is held of what is asked: for less, all groups need not stop


class OfKinds(NamedTuple):
    """Blocks of each kind."""

    full: int
    near: int


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of both kinds, by group."""

    held: Mapping[int, OfKinds]  # what those who run hold, and will before anything can be done about it
    demand: Mapping[int, OfKinds]  # of all requests, those that wait among them, as long as they are expected to get
    longest: int  # full blocks of the longest request that is accepted


# What matters of the stages of a group, by which groups are alike: budget in chunks, and layers.
_Chain = tuple[tuple[int, int, int], ...]


def plan_share(snapshot: Snapshot, asked: Asked) -> int | None:
    """Return the share that layers with a window should have; None if that of now is as good, or has to stay.

    All requests that run keep what they hold, and the longest request fits wherever it could with some share, in groups
    as they are and as restores make them; if no share allows that yet, wherever it fits now. Where the present share
    does not allow it, another one is returned however little it gains.
    """
    near = snapshot.model.near
    assert near is not None
    capacity = _capacities(snapshot.model)
    demand, least = _needs(snapshot, asked, SHARES[0])
    if not _possible(capacity, least):  # others hold too much near KV: it can wait for them
        demand, least = _needs(snapshot, asked, near.share)
    possible = _possible(capacity, least)

    def served(share: int, kind: int) -> float:
        """Return the part of the blocks asked of a kind that is held, in the group that holds the smallest part."""
        return min(capacity(chain, share)[kind] / max(1, needed[kind]) for chain, needed in demand.items())

    def worse(share: int) -> float:
        return min(served(share, 0), served(share, 1))

    even = bisect_left(possible, True, key=lambda share: served(share, 1) >= served(share, 0))
    candidates = [s for s in possible[max(0, even - 1) : even + 1] if _holds(capacity, least, s) == (True, True)]
    if not candidates or not demand:
        return None
    best, now = max(candidates, key=worse), worse(near.share)
    has_to_move = _holds(capacity, least, near.share) != (True, True)
    is_better = worse(best) >= LEAST_MIX_GAIN * now or now < 1 <= worse(best)
    return best if has_to_move or is_better else None


def most_share(
    shape: ModelShape, budgets: Mapping[int, int], groups: Iterable[Iterable[StageView]], longest: int
) -> int:
    """Return the greatest share with which a request of `longest` full blocks fits in all of some groups; 1 if none."""
    capacity, chains = _capacities(shape), {_chain(budgets, stages) for stages in groups}

    def is_too_much(share: int) -> bool:
        return any(capacity(chain, share).full < longest for chain in chains)

    return SHARES[max(0, bisect_left(SHARES, True, key=is_too_much) - 1)]


def _possible(capacity: _Capacity, least: Mapping[_Chain, OfKinds]) -> Sequence[int]:
    """Return the range of shares with which all groups hold what they have to, of both kinds."""
    first = bisect_left(SHARES, True, key=lambda share: _holds(capacity, least, share)[1])
    return SHARES[first : bisect_left(SHARES, True, key=lambda share: not _holds(capacity, least, share)[0])]


def _holds(capacity: _Capacity, least: Mapping[_Chain, OfKinds], share: int) -> tuple[bool, bool]:
    """Tell for each kind of KV whether all groups hold, with `share`, what they have to."""
    held = [(capacity(chain, share), needed) for chain, needed in least.items()]
    return all(has.full >= needed.full for has, needed in held), all(has.near >= needed.near for has, needed in held)


def _needs(snapshot: Snapshot, asked: Asked, share: int) -> tuple[dict[_Chain, OfKinds], dict[_Chain, OfKinds]]:
    """Return the blocks that are asked of groups, and those they have to hold: of groups that are alike, the most.

    A group has to hold what runs in it, and the longest request if that fits with `share`; so do groups that a restore
    brings back.
    """
    budgets, capacity = snapshot.budgets(), _capacities(snapshot.model)
    demand, least = dict[_Chain, OfKinds](), dict[_Chain, OfKinds]()

    def hold(stages: Iterable[StageView], held: OfKinds) -> _Chain:
        chain = _chain(budgets, stages)
        full = max(held.full, min(asked.longest, capacity(chain, share).full))
        least[chain] = _most(least.get(chain), OfKinds(full, held.near))
        return chain

    for group in snapshot.groups:
        chain = hold(group.stages, asked.held[group.group_id])
        demand[chain] = _most(demand.get(chain), asked.demand[group.group_id])
        for stages in launched_stages(snapshot.model, budgets, group):
            hold(stages, OfKinds(0, 0))
    return demand, least


def _most(a: OfKinds | None, b: OfKinds) -> OfKinds:
    return b if a is None else OfKinds(max(a.full, b.full), max(a.near, b.near))


def _chain(budgets: Mapping[int, int], stages: Iterable[StageView]) -> _Chain:
    return tuple((budgets[stage.device], stage.first_layer, stage.last_layer) for stage in stages)


class _Capacity(Protocol):
    def __call__(self, chain: _Chain, share: int) -> OfKinds:
        """Return the blocks of each kind that a group with these stages holds if layers with a window have `share`."""


def _capacities(shape: ModelShape) -> _Capacity:
    """Return a function of chain and share that computes the blocks such a group holds once, and remembers them."""

    @cache
    def capacity(chain: _Chain, share: int) -> OfKinds:
        mixed = shape.with_share(share)
        each = [blocks_of(mixed, stage_layout(mixed, budget, StageView(0, *layers))) for budget, *layers in chain]
        return OfKinds(*map(min, zip(*each, strict=True)))

    return capacity
