"""Who can have tokens in a group's next microbatch: nearly always many who decode, all alike, and few prompts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kunserve.engine.batch import Microbatch
from kunserve.engine.group import Group
from kunserve.engine.request import Request
from kunserve.engine.schedule.budget import is_schedulable

Pending = tuple[Request, int]  # and how many tokens it could have


class Alike(NamedTuple):
    """Requests that go on by one token each, all in the same way, and others: with a grammar, or more to compute."""

    decoding: list[Request]
    is_ahead: bool  # the microbatch in flight samples that token
    others: list[Pending]


def alike(group: Group, *, may_run_ahead: bool) -> Alike | None:
    """Return the requests that are ready, if those with one token are alike: none begins, is suspected or goes first.

    None else, and for all but groups of one device and one kind of KV, where all of them go together. One pass, as it
    is done in each step.
    """
    if len(group.stages) > 1 or group.is_mixed or group.num_in_flight > 1:
        return None
    may_run_ahead = may_run_ahead and bool(group.in_flight)
    known, ahead, judged, more = list[Request](), list[Request](), list[Pending](), list[Pending]()
    for r in group.running:
        if r.is_moving or r.finish_reason is not None or r.has_failed:  # not schedulable
            continue
        if r.suspect_until or r.is_hurried:
            return None
        num_known, num_scheduled = len(r.token_ids), r.num_scheduled_tokens
        if num_scheduled < num_known:
            num_pending = num_known + r.num_sampling - num_scheduled
            if num_pending > 1:
                more.append((r, num_pending))
            elif num_scheduled < len(r.prompt_token_ids):
                return None
            elif r.constraint is not None:
                judged.append((r, 1))
            else:
                known.append(r)
        elif may_run_ahead and r.num_sampling == 1 and num_known + 1 < r.max_num_tokens:
            if r.constraint is not None:
                judged.append((r, 1))
            else:
                ahead.append(r)
    return None if known and ahead else Alike(known or ahead, bool(ahead), judged + more)


@dataclass(slots=True)
class Steady:
    """Requests that decoded together in a group's last microbatch: all that run there, and nothing else was in it.

    Nearly always they go on as they did, and that is seen faster than who is ready is found.
    """

    requests: list[Request]
    ends: Sequence[int]  # how many tokens of each are scheduled
    num_left: int  # so many tokens more, and the first of them has come to its last

    @classmethod
    def after(cls, batch: Microbatch, group: Group, before: Steady | None) -> Steady | None:
        """Return the requests that may go on as in a group's last microbatch; None if not all were alike in it."""
        requests, ends, _ = batch.decoding
        if batch.others or requests != group.running:
            return None
        if before is not None and requests is before.requests:
            before.ends, before.num_left = ends, before.num_left - 1
            return before
        return cls(requests, ends, min(r.max_num_tokens - end for r, end in zip(requests, ends, strict=True)))

    def goes_on(self, group: Group, *, may_run_ahead: bool) -> bool:
        """Tell whether `alike` would find all of them ready, in the same order, and nobody else."""
        if self.num_left <= 1 or self.requests != group.running or group.num_in_flight > may_run_ahead:
            return False
        if group.in_flight and group.in_flight[0].decoding.requests is not self.requests:
            return False
        for r in self.requests:
            if r.is_moving or r.finish_reason is not None or r.has_failed or r.suspect_until or r.is_hurried:
                return False
        return [r.num_scheduled_tokens for r in self.requests] == self.ends


def ready(group: Group, *, may_run_ahead: bool) -> tuple[list[Pending], bool]:
    """Return requests with tokens to schedule, and how many: those with one token first, in order of admission.

    Also whether there are blocks for their next tokens. Else nobody runs ahead, as whoever has to make way must not be
    in flight, and nobody new comes in.
    """
    ahead = _can_run_ahead(group.in_flight[0]) if may_run_ahead and group.in_flight else set()
    one: list[Pending] = []
    more: list[Pending] = []
    for r in group.running:
        if (r.num_scheduled_tokens < len(r.token_ids) or r in ahead) and is_schedulable(r):
            num_pending = len(r.token_ids) + r.num_sampling - r.num_scheduled_tokens
            (more if num_pending > 1 else one).append((r, num_pending))
    both = one + more
    has_blocks = not is_short(group, [r for r, _ in both])
    return both if has_blocks else [pair for pair in both if pair[0] not in ahead], has_blocks


def is_short(group: Group, requests: list[Request]) -> bool:
    """Return whether a group has too few blocks for the next tokens of some of its requests."""
    # One block at most is missing to each, so that nobody need count them while more are free.
    return len(requests) > group.num_free and group.num_free < sum(
        group.missing_blocks(r, r.num_scheduled_tokens + 1) for r in requests
    )


def _can_run_ahead(oldest: Microbatch) -> set[Request]:
    """Return who may be scheduled a token ahead: the oldest microbatch samples their next one, and not their last.

    Only by the oldest: whatever waits for a younger one would hold up those between.
    """
    return {
        r
        for r, _, _, samples, _ in oldest.spans
        if samples and r.num_sampling == 1 and len(r.token_ids) + 1 < r.max_num_tokens
    }
