"""The mix of two kinds of KV: which share layers with a window have, and when another one holds more of what is asked.

A share is that of `NearKv`, in thousandths. The more near layers have, the less is left to full ones, on every device:
so the shares with which everybody keeps what they hold are a range, and the best of it is where both kinds hold the
same part of what is asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

from kunserve.planner.layouts import blocks_of, stage_layout
from kunserve.planner.snapshot import ModelShape, Snapshot, StageView, launched_stages

SHARES = range(1, 1001)
LEAST_GAIN = 1.1  # of what is held of what is asked: for less, all groups need not stop


class OfKinds(NamedTuple):
    """Blocks of each kind."""

    full: int
    near: int


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of both kinds."""

    held: Mapping[int, OfKinds]  # by group: what those who run hold, and will before anything can be done about it
    demand: OfKinds  # of all requests, those that wait among them, when they have got as long as they are expected to
    longest: int  # full blocks of the longest request that is accepted


# What matters of the stages of a group, by which groups are alike: budget in chunks, and layers.
_Chain = tuple[tuple[int, int, int], ...]


def plan_share(snapshot: Snapshot, asked: Asked) -> int | None:
    """Return the share that layers with a window should have; None if that of now is as good, or has to stay.

    All who run keep what they hold, and the longest request fits wherever it does now, with every drop and without.
    """
    near = snapshot.model.near
    assert near is not None
    capacity = _capacities(snapshot.model)
    chains, least = _chains(snapshot, asked)

    def fits(share: int) -> bool:
        return has_near(share) and has_full(share)

    def has_near(share: int) -> bool:
        return all(capacity(chain, share).near >= needed.near for chain, needed in least.items())

    def has_full(share: int) -> bool:
        return all(capacity(chain, share).full >= needed.full for chain, needed in least.items())

    def served(share: int) -> tuple[float, float]:
        """Return which part of what is asked is held of each kind."""
        full, near = (sum(number * capacity(chain, share)[kind] for chain, number in chains.items()) for kind in (0, 1))
        return full / max(1, asked.demand.full), near / max(1, asked.demand.near)

    def worse(share: int) -> float:
        """Return how much of what is asked is held of the scarcer kind."""
        return min(served(share))

    first = bisect_left(SHARES, True, key=has_near)
    possible = SHARES[first : bisect_left(SHARES, True, key=lambda share: not has_full(share))]
    even = bisect_left(possible, True, key=lambda share: served(share)[1] >= served(share)[0])
    candidates = [share for share in possible[max(0, even - 1) : even + 1] if fits(share)]
    if not candidates:
        return None
    best, now = max(candidates, key=worse), worse(near.share)
    return best if worse(best) >= LEAST_GAIN * now or now < 1 <= worse(best) else None


def most_share(
    shape: ModelShape, budgets: Mapping[int, int], groups: Iterable[Iterable[StageView]], longest: int
) -> int:
    """Return the greatest share with which a request of `longest` full blocks fits in all of some groups; 1 if none."""
    capacity, chains = _capacities(shape), {_chain(budgets, stages) for stages in groups}

    def is_too_much(share: int) -> bool:
        return any(capacity(chain, share).full < longest for chain in chains)

    return SHARES[max(0, bisect_left(SHARES, True, key=is_too_much) - 1)]


def _chains(snapshot: Snapshot, asked: Asked) -> tuple[Counter[_Chain], dict[_Chain, OfKinds]]:
    """Return how many groups have which stages, and what these have to hold; so do those that a restore brings back."""
    assert snapshot.model.near is not None
    budgets, share, capacity = snapshot.budgets(), snapshot.model.near.share, _capacities(snapshot.model)
    chains, least = Counter[_Chain](), dict[_Chain, OfKinds]()

    def need(stages: Iterable[StageView], held: OfKinds) -> _Chain:
        chain = _chain(budgets, stages)
        full = max(held.full, min(asked.longest, capacity(chain, share).full))
        before = least.get(chain, OfKinds(0, 0))
        least[chain] = OfKinds(max(full, before.full), max(held.near, before.near))
        return chain

    for group in snapshot.groups:
        chains[need(group.stages, asked.held[group.group_id])] += 1
        for stages in launched_stages(snapshot.model, budgets, group):
            need(stages, OfKinds(0, 0))
    return chains, least


def _chain(budgets: Mapping[int, int], stages: Iterable[StageView]) -> _Chain:
    return tuple((budgets[stage.device], stage.first_layer, stage.last_layer) for stage in stages)


class _Capacity(Protocol):
    def __call__(self, chain: _Chain, share: int) -> OfKinds:
        """Return what a group with these stages holds."""


def _capacities(shape: ModelShape) -> _Capacity:
    """Return what tells how much groups hold, and remembers it."""

    @cache
    def capacity(chain: _Chain, share: int) -> OfKinds:
        mixed = shape.with_share(share)
        each = [blocks_of(mixed, stage_layout(mixed, budget, StageView(0, *layers))) for budget, *layers in chain]
        return OfKinds(*map(min, zip(*each, strict=True)))

    return capacity
