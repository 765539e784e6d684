"""Lookahead: how much of a chain's backlog goes into its next microbatch, so that no stage waits for another.

KunServe, section 4.3. A chain is only as fast as its microbatches are equal in time. Equal in tokens is not enough: a
token costs more the more there are before it, and the last of a request needs the head. So all that is known to come
is looked at and cut into parts of equal predicted time. The paper halves the backlog recursively until a part is as
small as is efficient. Here the size of a part is found in the same way, but only the next one is cut: the rest is
looked at again when its turn has come, because requests have come and gone by then.

Decoding requests are dealt out evenly to as many microbatches as the chain has stages, so that each gets a token per
round and every microbatch has the same share of the head's work. Prompts fill up what is missing to a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import NamedTuple

from kunserve.planner.cost import CostModel, TokenSpan, Work

LONG_BACKLOG = 8  # parts of a backlog for each stage: more are a long one
# Where less of a chain's blocks is free, a long backlog has more parts, in proportion: at most so many times as many.
# From simulated loads (scripts/map.py); without a limit the first tokens of a burst wait for too many rounds.
SCARCE, MOST_PARTS = 0.1, 8.0
EFFICIENCY = 0.995  # of the smallest efficient microbatch, against a very large one


class BatchTarget(NamedTuple):
    """What the next microbatch of a chain may carry; seconds of all stages together."""

    decode_s: float  # no more decoding requests once they add so much
    total_s: float  # with the prompts


@dataclass
class Lookahead:
    """Predicts microbatches of at most `max_num_tokens` on a model of `num_layers` layers, and cuts backlogs.

    Who needs a prediction asks it and keeps no constants: those of `cost` may become others at any time (`learn`).
    """

    cost: CostModel
    num_layers: int
    max_num_tokens: int
    source: str = "given"  # where the constants are from

    def learn(self, cost: CostModel, source: str) -> None:
        """Predict with other constants from now on."""
        self.cost, self.source = cost, source
        self.__dict__.pop("least_tokens", None)

    def time(self, work: Work) -> float:
        """Predict the seconds of a microbatch in all stages together."""
        return self.cost.work_time(self.num_layers, work, is_first=True, head_share=1.0)

    def added_time(self, span: TokenSpan | Work) -> float:
        """Predict the seconds that one or more spans add in all stages together."""
        return self.cost.added_time(self.num_layers, span)

    @cached_property
    def least_tokens(self) -> int:
        """Return the tokens of the smallest efficient microbatch: reading the weights hides behind multiplying."""
        low, high = 1, self.max_num_tokens
        most_s = self._token_s(1 << 20) / EFFICIENCY
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._token_s(middle) <= most_s else (middle + 1, high)
        return low

    def target(
        self, decoding: Work, prompts: Sequence[TokenSpan], num_stages: int, free_share: float = 1.0
    ) -> BatchTarget:
        """Return what the next microbatch may take of all that could go now: decoding requests, pieces of prompts.

        Prompts are cut, so to speak, in equal parts no longer than the smallest efficient size; there are at least as
        many parts as stages, unless they would be smaller than half of that. Of a backlog of more than `LONG_BACKLOG`
        parts for each stage the parts are longer, as far as a microbatch can carry it: else what waits would also
        wait for a round of decoding after each short part. They are less so where little of the chain's blocks is free
        (`free_share` of them): who decodes in shorter rounds gives blocks back sooner, and for these others wait.
        """
        efficient, most = TokenSpan(0, self.least_tokens), TokenSpan(0, self.max_num_tokens)
        prompts_s = sum(map(self.added_time, prompts))
        long_backlog = LONG_BACKLOG * num_stages * max(1.0, SCARCE / max(free_share, SCARCE / MOST_PARTS))
        part_s = max(self.added_time(efficient), min(self.added_time(most), prompts_s / long_backlog))
        num_parts = max(num_stages, ceil(prompts_s / part_s))
        decode, prompt = decoding.part(num_stages), Work.of(prompts).part(num_parts)
        least = Work.of([efficient]).part(2)
        decode_s = self.added_time(decoding) / num_stages
        return BatchTarget(decode_s, max(self.time(decode.join(prompt)), self.time(decode.join(least))))

    def cut(self, work: Work, prefix: int, num_tokens: int, total_s: float) -> int:
        """Return how many of a prompt's next tokens, after `prefix` others, fit beside `work` in `total_s`."""
        low, high = 0, num_tokens
        while low < high:
            middle = (low + high + 1) // 2
            span = TokenSpan(prefix, middle, int(middle == num_tokens))
            low, high = (middle, high) if self.time(work.plus(span)) <= total_s else (low, middle - 1)
        return low

    def _token_s(self, num_tokens: int) -> float:
        """Return the seconds per token of a span without attention."""
        return self.time(Work(num_tokens=num_tokens, num_spans=1)) / num_tokens
