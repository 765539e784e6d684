"""A microbatch as it is scheduled: which tokens of which requests pass through a chain together. No tensors."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kunserve.engine.request import Request
from kunserve.planner.cost import TokenSpan, Work


class Span(NamedTuple):
    """Tokens `[start, end)` of one request. `samples`: they reach its last, so the last stage samples the next.

    `is_ahead`: nobody knows the last one yet; the oldest microbatch in flight samples it.
    """

    request: Request
    start: int
    end: int
    samples: bool
    is_ahead: bool = False


class Decoding(NamedTuple):
    """Requests of a microbatch that go on alike: each computes one token, its newest, and samples the next.

    No grammar judges these.

    `is_ahead`: nobody knows these tokens yet; the oldest microbatch in flight samples them.
    """

    requests: Sequence[Request] = ()
    ends: Sequence[int] = ()  # each computes its token `end - 1`
    is_ahead: bool = False


NOBODY = Decoding()


@dataclass(frozen=True, slots=True, eq=False)
class Microbatch:
    """Parts of distinct requests, scheduled together. Everything a stage needs is a snapshot: requests may change.

    Requests that decode come first. Nearly all do, step after step: what each of them needs in each step is done for
    all at once, or in a loop over nothing else.
    """

    group_id: int
    epoch: int
    others: tuple[Span, ...]
    decoding: Decoding = NOBODY
    sampled: Future[Any] = field(default_factory=Future)  # by its executor, for the microbatch that runs ahead of it

    @property
    def spans(self) -> tuple[Span, ...]:
        """Return all parts, in their order."""
        requests, ends, is_ahead = self.decoding
        alike = (Span(r, end - 1, end, True, is_ahead) for r, end in zip(requests, ends, strict=True))
        return (*alike, *self.others)

    @property
    def requests(self) -> list[Request]:
        """Return the requests that these are parts of, in their order."""
        return [*self.decoding.requests, *(span.request for span in self.others)]

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens in all spans."""
        return len(self.decoding.requests) + sum(span.end - span.start for span in self.others)


def scored_positions(span: Span) -> Sequence[int]:
    """Return the positions of a span whose logits score the prompt's next token; empty unless that is asked for."""
    request = span.request
    if request.params.num_prompt_logprobs is None:
        return ()
    return range(span.start, min(span.end, request.num_prompt_tokens - 1))


def count_prompt_tokens(batch: Microbatch) -> int:
    """Return how many prompt tokens a microbatch has computed that never were before, and count them as computed.

    Tokens that a request computes again after it started over are not new. Nor are those of one that has failed: what
    comes before them may be missing.
    """
    num_new = 0
    for request, start, end, _, _ in batch.others:  # who decodes has come past its prompt
        counted, end = request.num_counted_tokens, min(end, len(request.prompt_token_ids))
        if counted < end and not request.has_failed:
            num_new += max(0, end - max(start, counted))  # of a request begun elsewhere, all of it may be cached
            request.num_counted_tokens = end
    return num_new


def work_of(batch: Microbatch) -> Work:
    """Return the work of a microbatch, as the cost model counts it."""
    others = Work.of(TokenSpan(span.start, span.end - span.start, int(span.samples)) for span in batch.others)
    num_rows, num_keys = len(batch.decoding.ends), sum(batch.decoding.ends)
    return others.join(Work(num_keys, num_keys, num_rows, num_rows, num_rows))
