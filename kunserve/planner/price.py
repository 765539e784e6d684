"""What a merge or a split costs and saves, in seconds that requests wait in all: it is for those who win by it.

A request that finds no blocks waits, and so does one whose KV moves, and a chain is a little slower than its devices
apart. A merge is worth it where it saves more seconds than it costs, and so is a split. How much a shortage of blocks
goes on to grow nobody knows, nor how long a calm lasts. It is taken to go on as it has lately, and for as long as it
has lasted: whoever looks at something at a random moment has on average as much of it before them as behind them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

USUAL_S = 20.0  # of a burst: BurstGPT's, as KunServe (EuroSys 2026, section 5) shows them; until one has lasted longer
# Share of its time for which a device of a chain waits for the others, for each stage beyond the first, until this
# server has had chains: 1.2 % in all in chains of two and 3.0 to 4.3 % in chains of four, simulated with four A800.
BUBBLE = 0.012
LEAST_CHAIN_S = 10.0  # of devices in chains: what was assumed counts as much as so many seconds
MOST_CHAIN_S = 120.0  # what was longer ago counts less and less


@dataclass(frozen=True, slots=True)
class Shortage:
    """Blocks that are asked for beyond those there are."""

    blocks: float
    growth_per_s: float  # of blocks: negative while what waits is getting less
    request_blocks: float  # of one request
    lasted_s: float = 0.0

    @property
    def rest_s(self) -> float:
        """Return the seconds that the shortage is expected to go on: as long as it has lasted,
        at least USUAL_S, but no longer than falling demand needs to end it.
        """
        rest_s = max(self.lasted_s, USUAL_S)
        if self.growth_per_s < 0:
            rest_s = min(rest_s, max(0.0, self.blocks) / -self.growth_per_s)
        return rest_s

    def saved_s(self, added_blocks: float) -> float:
        """Return the seconds that requests wait less, all together, if there are so many blocks more."""
        return (self._waited(self.blocks) - self._waited(self.blocks - added_blocks)) / self.request_blocks

    def _waited(self, blocks: float) -> float:
        """Return the block-seconds of a shortage that is `blocks` now: its area above zero until the rest is over."""
        slope, rest_s = self.growth_per_s, self.rest_s
        end = blocks + slope * rest_s
        if blocks >= 0 and end >= 0:
            return (blocks + end) / 2 * rest_s
        positive = max(blocks, end, 0.0)  # it crosses zero, or is below all the time
        return positive * positive / (2 * abs(slope)) if positive else 0.0


class Change(NamedTuple):
    """What a merge, or the split that undoes it, does to those who run in its groups."""

    num_requests: int
    boundary_s: float  # until the step that runs has ended
    exchange_s: float  # until all KV has moved; a request waits half of that on average
    added_stages: float  # that a request passes while they are merged, on average
    bubble: float = BUBBLE  # as `Bubbles.share`

    def cost_s(self, chained_s: float) -> float:
        """Return the seconds that its requests lose, all together, if it is a chain for so long."""
        return self.num_requests * self._paused_s + self._slowed_s(chained_s)

    def pays_back_in(self, split_s: float) -> bool:
        """Return whether a split costs its requests no more than they gain by it in so long."""
        return self.num_requests * self._paused_s <= self._slowed_s(split_s)

    @property
    def _paused_s(self) -> float:
        return self.boundary_s + self.exchange_s / 2

    def _slowed_s(self, chained_s: float) -> float:
        return self.num_requests * self.bubble * self.added_stages * chained_s


@dataclass(slots=True)
class Bubbles:
    """How much of its time a device of a chain waits for the others, for each stage beyond the first."""

    chain_s: float = LEAST_CHAIN_S  # of devices in chains, times the stages beyond the first
    waited_s: float = LEAST_CHAIN_S * BUBBLE

    @property
    def share(self) -> float:
        """Return the share of time: what was seen, or assumed while little was; never less than that.

        What handing on costs counts as work here, and the longer way of a single stream is not seen at all: a chain
        that seemed to lose nothing would never pay back a split.
        """
        return max(BUBBLE, self.waited_s / self.chain_s)

    def learn(self, num_stages: int, device_s: float, waited_s: float) -> None:
        """Note for how many seconds the devices of a chain had enough to do, all together, and how long they waited."""
        self.chain_s += (num_stages - 1) * device_s
        self.waited_s += waited_s
        if self.chain_s > MOST_CHAIN_S:
            self.waited_s *= MOST_CHAIN_S / self.chain_s
            self.chain_s = MOST_CHAIN_S


@dataclass(slots=True)
class Trend:
    """How fast a quantity has changed lately. Times are the caller's."""

    window_s: float = 4.0
    every_s: float = 0.25
    _samples: deque[tuple[float, float]] = field(default_factory=deque)

    def is_due(self, now_s: float) -> bool:
        """Tell whether it is time for a sample."""
        return not self._samples or now_s >= self._samples[-1][0] + self.every_s

    def sample(self, now_s: float, value: float) -> None:
        """Note the quantity's value now, and forget samples from before the window."""
        self._samples.append((now_s, value))
        while self._samples[0][0] < now_s - self.window_s:
            self._samples.popleft()

    @property
    def per_s(self) -> float:
        """Return the quantity's change per second, by least squares; 0 until there are two samples."""
        if len(self._samples) < 2:
            return 0.0
        count = len(self._samples)
        mean_s = sum(at for at, _ in self._samples) / count
        mean = sum(value for _, value in self._samples) / count
        spread = sum((at - mean_s) ** 2 for at, _ in self._samples)
        return sum((at - mean_s) * (value - mean) for at, value in self._samples) / spread
