"""Budgets of one microbatch: tokens, or in chains time. The scheduler asks them request by request. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from kunserve.engine.group import Group
from kunserve.engine.request import Request
from kunserve.planner.cost import TokenSpan, Work
from kunserve.planner.microbatch import LONG_BACKLOG, Lookahead
from kunserve.sizes import ceil_div

LEAST_CUT = 8  # tokens: a shorter piece of a prompt is not worth reading all its KV again


class Budget(Protocol):
    """What one microbatch may still carry."""

    def fits(self, request: Request, num_tokens: int) -> int:
        """Return how many of the next `num_tokens` of `request` fit; 0: it has to wait."""

    def take(self, request: Request, num_tokens: int) -> None:
        """Count `num_tokens` of `request` that go. The request's counters are still as before."""

    @property
    def is_full(self) -> bool:
        """Tell whether no token of a prompt fits any more."""


class TokenBudget:
    """A number of tokens; in a chain also of decoding rows, so that all its microbatches carry about as many."""

    def __init__(self, num_tokens: int, group: Group) -> None:
        self._num_tokens = num_tokens
        self._num_rows: int | None = None  # alone, a device has all rows in each microbatch
        if len(group.stages) > 1:
            num_decoding = sum(1 for r in group.running if _has_output(r) and is_schedulable(r))
            self._num_rows = max(1, ceil_div(num_decoding, len(group.stages)))

    def fits(self, request: Request, num_tokens: int) -> int:
        """See `Budget.fits`."""
        if self._num_rows == 0 and _decodes(request, num_tokens):
            return 0
        return num_tokens if num_tokens <= self._num_tokens else self._num_tokens

    def take(self, request: Request, num_tokens: int) -> None:
        """See `Budget.take`."""
        self._num_tokens -= num_tokens
        if self._num_rows is not None:
            self._num_rows -= _decodes(request, _num_pending(request))

    @property
    def is_full(self) -> bool:
        """See `Budget.is_full`."""
        return self._num_tokens == 0


class TimeBudget:
    """The time of a chain's next microbatch (`Lookahead.target`), and the most tokens that one may have."""

    def __init__(self, lookahead: Lookahead, group: Group, waiting: Iterable[Request], max_running: int) -> None:
        self._lookahead = lookahead
        self._work, self._decode_s, self._has_prompt = Work(), 0.0, False
        self._num_tokens = lookahead.max_num_tokens
        num_seen = LONG_BACKLOG * len(group.stages) * lookahead.max_num_tokens  # beyond, nothing depends on it
        ahead = _admissible(group, waiting, max_running, num_seen)
        decoding, prompts = list[int](), list[TokenSpan]()
        for r in group.running:  # for those who decode nothing is called: each microbatch looks at all of them
            if r.is_moving or r.finish_reason is not None or r.has_failed:  # not schedulable
                continue
            num_scheduled, num_expected = r.num_scheduled_tokens, len(r.token_ids) + r.num_sampling
            if is_decoding := num_scheduled + 1 == num_expected > len(r.prompt_token_ids):
                decoding.append(num_expected)
            if num_scheduled < num_expected - is_decoding or num_scheduled - r.num_computed_tokens > r.num_in_flight:
                prompts += _prompt_spans(r)
        prompts += [span for request in ahead for span in _prompt_spans(request)]
        free_share = group.num_free / max(1, group.num_blocks)
        self._target = lookahead.target(Work.of_rows(decoding), prompts, len(group.stages), free_share)
        self._most_decode_s = self._target.decode_s * (1 - 1e-9)

    def fits(self, request: Request, num_tokens: int) -> int:
        """See `Budget.fits`."""
        if _decodes(request, num_tokens):
            return min(1, self._num_tokens) if self._decode_s < self._most_decode_s else 0
        most = min(num_tokens, self._num_tokens)
        cut = self._lookahead.cut(self._work, request.num_scheduled_tokens, most, self._target.total_s)
        least = min(num_tokens, LEAST_CUT)
        if self._has_prompt and cut < least:
            return 0
        return max(cut, min(least, most))  # one always goes on: reading its KV alone may take longer than the part

    def take(self, request: Request, num_tokens: int) -> None:
        """See `Budget.take`."""
        start, end = request.num_scheduled_tokens, request.num_scheduled_tokens + num_tokens
        span = TokenSpan(start, num_tokens, int(end == request.num_expected_tokens))
        self._work = self._work.plus(span)
        self._num_tokens -= num_tokens
        if _decodes(request, _num_pending(request)):
            self._decode_s += self._lookahead.added_time(span)
        else:
            self._has_prompt = True

    @property
    def is_full(self) -> bool:
        """See `Budget.is_full`."""
        if not self._num_tokens or not self._work.num_spans:
            return not self._num_tokens
        return self._lookahead.time(self._work.plus(TokenSpan(0, LEAST_CUT))) > self._target.total_s


def is_schedulable(request: Request) -> bool:
    """Tell whether more of a request may run: one that has ended or failed only waits for what is in flight."""
    return not request.is_moving and request.finish_reason is None and not request.has_failed


def _decodes(request: Request, num_tokens: int) -> bool:
    return num_tokens == 1 and _has_output(request)


def _has_output(request: Request) -> bool:
    """Tell whether a request has a token to go on from, or one is being sampled."""
    return request.num_expected_tokens > request.num_prompt_tokens


def _num_pending(request: Request) -> int:
    return request.num_expected_tokens - request.num_scheduled_tokens


def _prompt_spans(request: Request) -> Iterator[TokenSpan]:
    """Yield what is in flight of a request's input and what could follow; nothing of one that decodes."""
    computed, scheduled, num_pending = request.num_computed_tokens, request.num_scheduled_tokens, _num_pending(request)
    if scheduled - computed > request.num_in_flight:
        yield TokenSpan(computed, scheduled - computed, int(num_pending <= 1))
    if num_pending > 0 and not _decodes(request, num_pending):
        yield TokenSpan(scheduled, num_pending, 1)


def _admissible(group: Group, waiting: Iterable[Request], max_running: int, num_tokens: int) -> Iterator[Request]:
    """Yield the first waiting requests that `group` has blocks for, up to `num_tokens` in all."""
    num_free, room = group.free_for(1), max_running - len(group.running)
    for request in waiting:
        num_free -= group.blocks_for(request.num_tokens)
        if num_free < 0 or room == 0 or num_tokens <= 0:
            return
        room, num_tokens = room - 1, num_tokens - request.num_tokens
        yield request
