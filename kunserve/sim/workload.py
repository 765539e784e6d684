"""Workloads of the paper's shape: bursty arrivals, and lengths with the published means. Labelled synthetic.

The paper (KunServe, section 5) takes arrivals from BurstGPT, scaled up, and lengths from BurstGPT, ShareGPT and
LongBench. What is published of them is kept: the means of the lengths; a stay whose deviation is 1.35 times its mean;
arrivals burstier than Poisson's, whose rate doubles without a pattern, first at second 45 of a window of 128, twice in
640 s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from kunserve.sim.traces import TraceRow


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal lengths between 1 and `most` tokens with this mean; `spread`: deviation over mean, before the cut."""

    mean: float
    spread: float
    most: int

    def draw(self, count: int, rng: Generator) -> NDArray[np.int64]:
        """Draw `count` lengths."""
        sigma = math.sqrt(math.log(1 + self.spread**2))
        normal = rng.standard_normal(count)
        lengths = np.exp(self._mu(sigma) + sigma * normal)
        return np.clip(np.rint(lengths), 1, self.most).astype(np.int64)

    def _mu(self, sigma: float) -> float:
        """Find where the distribution has its mean after the cut: by bisection, over its quantiles."""
        normal = np.sqrt(2) * _erfinv(np.linspace(-1, 1, 2001)[1:-1])
        low, high = 0.0, math.log(self.most)
        for _ in range(60):
            middle = (low + high) / 2
            is_low = np.minimum(np.exp(middle + sigma * normal), self.most).mean() < self.mean
            low, high = (middle, high) if is_low else (low, middle)
        return low


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths of one of the paper's data sets."""

    prompt: Lengths
    output: Lengths


# Published: the means, ShareGPT's and LongBench's longest prompts. Spreads are assumptions but BurstGPT's output's.
WORKLOADS = {
    "burstgpt": Workload(Lengths(642, 1.2, 8192), Lengths(262, 1.35, 4096)),
    "sharegpt": Workload(Lengths(1660, 0.8, 4096), Lengths(373, 0.9, 4096)),
    "longbench": Workload(Lengths(5900, 0.6, 16384), Lengths(499, 0.5, 2048)),
}


@dataclass(frozen=True, slots=True)
class Burst:
    """Seconds in which the rate is `height` times what it is outside of bursts."""

    start_s: float
    duration_s: float
    height: float


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Bursty arrivals in BurstGPT's published shape: gaps of deviation over mean `spread`, and bursts."""

    bursts: tuple[Burst, ...]
    spread: float = 1.2

    @classmethod
    def burstgpt(cls, duration_s: float, rng: Generator, height: float = 2.0, burst_s: float = 20.0) -> Arrivals:
        """Place a burst at second 45, and one more in each further 320 s, at a random time."""
        starts = [45.0]
        period = 320.0
        while len(starts) * period + burst_s < duration_s:
            starts.append(len(starts) * period + float(rng.uniform(0.25, 0.75)) * (period - burst_s))
        return cls(tuple(Burst(start, burst_s, height) for start in starts))

    def draw(self, rate: float, duration_s: float, rng: Generator) -> list[float]:
        """Draw times in `[0, duration_s)` of `rate` arrivals per second on average, bursts included."""
        extra = sum(max(0.0, min(b.duration_s, duration_s - b.start_s)) * (b.height - 1) for b in self.bursts)
        base = rate * duration_s / (duration_s + extra)
        shape = 1 / self.spread**2
        times: list[float] = []
        at_s = 0.0
        while True:
            at_s += rng.gamma(shape, 1 / shape) / (base * self._height(at_s))
            if at_s >= duration_s:
                return times
            times.append(at_s)

    def _height(self, at_s: float) -> float:
        return max((b.height for b in self.bursts if b.start_s <= at_s < b.start_s + b.duration_s), default=1.0)


def synthesize(
    workload: Workload,
    arrivals: Arrivals,
    rate: float,
    duration_s: float,
    seed: int,
    lengths: Sequence[tuple[int, int]] = (),
) -> list[TraceRow]:
    """Draw the rows of a synthetic trace; with `lengths` (of a file), random ones of these, not the workload's."""
    times = arrivals.draw(rate, duration_s, default_rng([seed, 0]))
    if lengths:
        rng = default_rng([seed, 1])
        pairs = [lengths[i] for i in rng.integers(len(lengths), size=len(times))]
    else:
        prompts = workload.prompt.draw(len(times), default_rng([seed, 1])).tolist()
        outputs = workload.output.draw(len(times), default_rng([seed, 2])).tolist()
        pairs = list(zip(prompts, outputs, strict=True))
    return [TraceRow(at_s, *pair) for at_s, pair in zip(times, pairs, strict=True)]


def _erfinv(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Invert the error function, to three digits (Winitzki 2008): enough to place a mean."""
    a = 0.147
    log = np.log(1 - x * x)
    first = 2 / (np.pi * a) + log / 2
    return np.asarray(np.sign(x) * np.sqrt(np.sqrt(first * first - log / a) - first))
