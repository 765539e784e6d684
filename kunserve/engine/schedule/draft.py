"""A microbatch as the scheduler forms it: who is in it so far, and who may join. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from kunserve.engine.batch import NOBODY, Decoding, Microbatch, Span
from kunserve.engine.group import Group
from kunserve.engine.request import Request


class Draft:
    """A microbatch in the making: requests that go on alike, and behind them spans of others."""

    __slots__ = ("_decoding", "_spans", "has_first")

    def __init__(self) -> None:
        self.has_first = False  # others have waited for those that go first
        self._decoding = NOBODY
        self._spans: list[Span] = []

    def __len__(self) -> int:
        return len(self._decoding.requests) + len(self._spans)

    def go_on(self, requests: Sequence[Request], *, is_ahead: bool) -> None:
        """Begin with requests that have blocks for one more token, and compute it: see `Decoding`."""
        ends = list[int]()
        for request in requests:
            request.num_scheduled_tokens = end = request.num_scheduled_tokens + 1
            request.num_in_flight += 1
            request.num_sampling += 1
            ends.append(end)
        self._decoding = Decoding(requests, ends, is_ahead)

    def add(self, request: Request, num_tokens: int) -> None:
        """Let the next `num_tokens` of a request join."""
        start, num_known = request.num_scheduled_tokens, len(request.token_ids)
        request.num_scheduled_tokens = end = start + num_tokens
        samples, is_ahead = end == num_known + request.num_sampling, end > num_known
        request.num_in_flight += 1
        request.num_sampling += samples
        self._spans.append(Span(request, start, end, samples, is_ahead))

    def may_join(self, request: Request) -> bool:
        """Tell whether a request may go with the others: one that is suspected only alone.

        But if it is suspected of the end of a device, it may go with those that are not: they all would lose their KV
        with the next one, in whatever microbatch they are.
        """
        if not len(self) or not request.is_suspect:
            return True
        return request.num_killed > 0 and not any(map(_is_suspected, self._spans))

    @property
    def is_closed(self) -> bool:
        """Tell whether nobody may join, because a step with the only request failed before."""
        return len(self._spans) == 1 and not self._decoding.requests and _is_suspected(self._spans[0])

    def microbatch(self, group: Group, epoch: int) -> Microbatch:
        """Return what was formed."""
        return Microbatch(group.group_id, epoch, tuple(self._spans), self._decoding)


def _is_suspected(span: Span) -> bool:
    """Tell whether a part of a microbatch is of a request that is suspected up to there."""
    return span.start < span.request.suspect_until
