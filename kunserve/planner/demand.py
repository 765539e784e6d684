"""How many blocks the server needs: in use, asked for by waiting prompts, and expected growth of all requests.

O(requests) per call, so ask only when the head of the queue does not fit or a drop may be undone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from kunserve.sizes import ceil_div


class RequestView(NamedTuple):
    """What the planner knows of one request; waiting ones hold no blocks."""

    num_tokens: int  # prompt and generated
    num_output_tokens: int
    max_tokens: int  # of output
    num_blocks: int = 0  # held on each device of its group

    @property
    def most_remaining(self) -> int:
        """Return how many tokens it can still generate."""
        return max(0, self.max_tokens - self.num_output_tokens)


@dataclass(frozen=True, slots=True)
class OutputLengthEstimate:
    """Running mean of output lengths of about the last `window` requests.

    It begins with a guess that counts as much as `num_observed` requests.
    """

    mean_tokens: float = 128.0
    num_observed: int = 8
    window: int = 256

    def finished(self, num_output_tokens: int) -> OutputLengthEstimate:
        """Return the estimate after a request ended with so many output tokens (do not count aborted ones)."""
        num_observed = min(self.num_observed + 1, self.window)
        mean = self.mean_tokens + (num_output_tokens - self.mean_tokens) / num_observed
        return replace(self, mean_tokens=mean, num_observed=num_observed)


@dataclass(frozen=True, slots=True)
class Demand:
    """Blocks, by what they are for."""

    in_use: int
    prompts: int  # that waiting requests need for the tokens they have
    growth: int  # for tokens not generated yet, and for those that running requests have but did not store yet

    @property
    def blocks(self) -> int:
        """Return how many blocks the server needs for all its requests."""
        return self.in_use + self.prompts + self.growth


def near_blocks(num_tokens: int, window: int, block_size: int) -> int:
    """Return the blocks that a request of so many tokens has at once where only the last `window` are kept.

    Those of a window, one begun at either end, and one that a step computes while it is not known to have ended.
    """
    return min(ceil_div(num_tokens, block_size), (window + block_size - 2) // block_size + 2)


def measure_near(requests: Iterable[RequestView], estimate: OutputLengthEstimate, window: int, block_size: int) -> int:
    """Return the blocks that all requests need at once of a kind of which only the last `window` tokens are kept."""
    expected = round(estimate.mean_tokens)
    return sum(
        near_blocks(num_tokens + max(0, min(max_tokens, expected) - num_output), window, block_size)
        for num_tokens, num_output, max_tokens, _ in requests
    )


def measure_demand(
    running: Iterable[RequestView],
    waiting: Iterable[RequestView],
    estimate: OutputLengthEstimate,
    block_size: int,
    min_growth: int = 16,
) -> Demand:
    """Measure the demand of all requests, in blocks.

    A request that outlived the estimate is expected to go on for `min_growth` tokens.
    """
    expected = round(estimate.mean_tokens)
    in_use = prompts = growth = 0
    for num_tokens, num_output, max_tokens, held in running:
        in_use += held
        tokens = num_tokens + max(0, min(max_tokens - num_output, max(expected - num_output, min_growth)))
        growth += max(0, ceil_div(tokens, block_size) - held)
    for num_tokens, num_output, max_tokens, _ in waiting:
        needed = ceil_div(num_tokens, block_size)
        prompts += needed
        tokens = num_tokens + max(0, min(max_tokens - num_output, max(expected - num_output, min_growth)))
        growth += ceil_div(tokens, block_size) - needed
    return Demand(in_use, prompts, growth)
