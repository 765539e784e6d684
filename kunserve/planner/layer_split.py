"""Which layers each device of a chain holds: the need first, balance second. Used by drop, restore and at launch.

Two bounds say how many layers a stage may have: chunks of KV per layer (capacity) and time. Both are monotone, and
whether stages of bounded length can cover all layers is one pass over the chain. So the best split is found exactly,
by two bisections: the shortest time under the capacity that is needed, then the most capacity in that time. Where KV is
of two kinds, how many layers fit depends on which they are, and the pass looks at each layer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from math import floor, inf

from kunserve.planner.snapshot import DeviceView, ModelShape, StageView

ROUNDING = 1e-6  # of a layer's time: times are sums of floats
Cuts = Sequence[tuple[int, int]]  # the least and the greatest layer at which each stage but the last may end


def split_layers(
    model: ModelShape, devices: Sequence[DeviceView], need_blocks: int, cuts: Cuts | None = None
) -> tuple[StageView, ...] | None:
    """Cut the layers into one contiguous range per device, in the order of `devices`, each of one layer at least.

    Among the splits that hold `need_blocks`, one with the shortest slowest stage (then the most capacity); if none
    does, one with the most capacity (then the shortest slowest stage). None if the weights do not fit.
    """
    budgets = [device.budget_chunks for device in devices]
    chain = Chain(model, budgets, free_cuts(model, len(budgets)) if cuts is None else cuts)
    ends = chain.best(model.chunks_for(need_blocks))
    if ends is None:
        return None
    return stages_of([device.device for device in devices], ends)


def stages_of(devices: Sequence[int], ends: Sequence[int]) -> tuple[StageView, ...]:
    """Return the stages on these devices that end at these layers."""
    return tuple(map(StageView, devices, (0, *ends), ends))


def free_cuts(model: ModelShape, num_stages: int) -> Cuts:
    """Allow every cut: the devices hold all layers, or will load what they lack."""
    return [(1, model.num_layers - 1)] * (num_stages - 1)


def cuts_within(held: Sequence[tuple[int, int]]) -> Cuts:
    """Allow the cuts that give each device only layers of the range it holds: nothing has to be loaded."""
    return [(after[0], before[1]) for before, after in pairwise(held)]


def cuts_around(kept: Sequence[tuple[int, int]]) -> Cuts:
    """Allow the cuts that leave each device all layers of the range it holds: nothing has to be dropped."""
    return [(before[1], after[0]) for before, after in pairwise(kept)]


class Chain:
    """Devices in a row: budgets in chunks, and where their stages may end."""

    def __init__(self, model: ModelShape, budgets: Sequence[int], cuts: Cuts) -> None:
        last = len(budgets) - 1
        self.model = model
        self.layer_budgets = [budget - model.end_chunks(i == 0, i == last) for i, budget in enumerate(budgets)]
        self.end_times = [model.end_time(i == 0, i == last) for i in range(len(budgets))]
        self.cuts = [*cuts, (model.num_layers, model.num_layers)]
        self.is_free = all(least <= 1 and greatest >= model.num_layers - 1 for least, greatest in cuts)

    @cached_property
    def most_chunks(self) -> int | None:
        """Return the chunks of KV per layer in the split that has most; None if there is no split."""
        for_kv = sum(self.layer_budgets) - self.model.num_layers * self.model.layer_chunks
        as_one_device = self.model.chunks_within(for_kv, self.model.by_kind(range(self.model.num_layers)))
        return self._most(range(max(0, as_one_device + 1)), inf)

    def best(self, min_chunks: int) -> tuple[int, ...] | None:
        """Return the ends of the best split's stages, whose layers have `min_chunks` of KV each if that can be."""
        if self.most_chunks is None:
            return None
        # The last chunks may not make a block more.
        enough = min(min_chunks, self.model.chunks_for(self.model.blocks_in(self.most_chunks)))
        slowest = self._least_time(enough)
        chunks = self._most(range(enough, self.most_chunks + 1), slowest)
        assert chunks is not None
        return self._ends_with(chunks, slowest)

    def _most(self, choices: range, slowest: float) -> int | None:
        """Return the greatest of these chunks of KV per layer that is possible; None if none is."""
        num_possible = bisect_left(choices, True, key=lambda chunks: not self._is_possible(chunks, slowest))
        return choices[num_possible - 1] if num_possible else None

    def _least_time(self, chunks: int) -> float:
        """Return the slowest stage's time in the best balanced split with `chunks` of KV per layer; there is one."""
        layer_time, lengths = self.model.layer_time, range(1, self.model.num_layers + 1)
        times = sorted(end + length * layer_time for end in set(self.end_times) for length in lengths)
        return times[bisect_left(times, True, key=lambda time: self._is_possible(chunks, time))]

    def _ends_with(self, chunks: int, slowest: float) -> tuple[int, ...] | None:
        """Return the ends of stages within both bounds, as even as can be; None if they cannot cover all layers."""
        if self.model.near is None:
            return self._ends(self._most_layers(chunks, slowest))
        of_kind = self.model.chunks_by_kind(chunks)
        costs = (self.model.layer_chunks + of_kind[self.model.kind_of(i)] for i in range(self.model.num_layers))
        before = list(accumulate(costs, initial=0))  # chunks of all layers before one
        in_time = self._most_in_time(slowest)

        def first_start(stage: int, end: int) -> int:
            """Return the first layer that a stage ending at this layer can begin with."""
            return max(end - in_time[stage], bisect_left(before, before[end] - self.layer_budgets[stage]))

        starts, reach = [0], list[list[int]]()  # where each stage can begin
        for stage, (least, greatest) in enumerate(self.cuts):
            reach.append(starts)
            following = [starts[bisect_left(starts, first_start(stage, e)) :][:1] for e in range(least, greatest + 1)]
            starts = [end for end, found in enumerate(following, least) if found and found[0] < end]
        if not starts:
            return None
        ends = [self.model.num_layers]
        for stage in range(len(self.cuts) - 1, 0, -1):
            end, even = ends[-1], ends[-1] * stage // (stage + 1)
            possible = [start for start in reach[stage] if first_start(stage, end) <= start < end]
            ends.append(min(possible, key=lambda start: (abs(start - even), start)))
        return tuple(reversed(ends))

    def _most_in_time(self, slowest: float) -> list[int]:
        """Return the layers that each stage can have at most, if it is no slower than `slowest`."""
        if slowest == inf:
            return [self.model.num_layers] * len(self.layer_budgets)
        return [floor((slowest - end) / self.model.layer_time + ROUNDING) for end in self.end_times]

    def _most_layers(self, chunks: int, slowest: float) -> list[int]:
        """Return the most layers of each stage, with `chunks` of KV per layer and no slower than `slowest`."""
        chunks += self.model.layer_chunks
        limits = [budget // chunks for budget in self.layer_budgets]
        return limits if slowest == inf else list(map(min, limits, self._most_in_time(slowest)))

    def _is_possible(self, chunks: int, slowest: float) -> bool:
        """Tell whether stages within both bounds can cover all layers."""
        if self.model.near is not None:
            return self._ends_with(chunks, slowest) is not None
        limits, num_layers = self._most_layers(chunks, slowest), self.model.num_layers
        if min(limits) < 1 or sum(limits) < num_layers or len(limits) > num_layers:
            return False
        return self.is_free or self._ends(limits) is not None

    def _ends(self, limits: Sequence[int]) -> tuple[int, ...] | None:
        """Return the ends of stages of at most so many layers, as even as can be; None if they cannot cover all."""
        low = high = 0
        reach = []  # every layer from low to high can be the end of this stage
        for limit, (least, greatest) in zip(limits, self.cuts, strict=True):
            low, high = max(low + 1, least), min(high + limit, greatest)
            if low > high:
                return None
            reach.append((low, high))
        ends = [self.model.num_layers]
        for i in range(len(limits) - 1, 0, -1):
            low, high = max(reach[i - 1][0], ends[-1] - limits[i]), min(reach[i - 1][1], ends[-1] - 1)
            ends.append(min(max(low, ends[-1] * i // (i + 1)), high))
        return tuple(reversed(ends))
