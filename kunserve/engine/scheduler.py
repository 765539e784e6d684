"""The scheduler: which tokens go next. Pure: it changes requests, groups and pools, and knows no clock, task or tensor.

No prefill or decode phase: each request's scheduled tokens catch up with its tokens, within a budget per step. Tokens
that finish a request's input (one for a decoding request) go first, so that no prompt delays a running stream by
more than its share of one step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kunserve.engine.group import Group
from kunserve.engine.microbatch import Microbatch, Span
from kunserve.engine.policy import Policy
from kunserve.engine.request import Request
from kunserve.planner.microbatch import decode_share


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one step and one group."""

    max_num_batched_tokens: int
    max_num_seqs: int  # running requests of a group


class Scheduler:
    """The global waiting queue, and the rule that turns it and a group's running requests into microbatches."""

    def __init__(self, limits: Limits, policy: Policy) -> None:
        self.limits = limits
        self.policy = policy
        self.waiting: deque[Request] = deque()
        self.num_preemptions = 0

    def schedule(self, group: Group, groups: Sequence[Group], epoch: int) -> Microbatch | None:
        """Next microbatch of `group`, its blocks allocated; None if nothing can go. `groups` share the queue."""
        spans: list[Span] = []
        budget = self.limits.max_num_batched_tokens
        preemptions_before = self.num_preemptions
        decoding = sum(1 for r in group.running if r.num_output_tokens and not r.is_moving)
        share = decode_share(decoding, len(group.stages))
        for request in self._by_urgency(group):
            if budget == 0 or request.group_id != group.group_id:  # preempted meanwhile
                continue
            pending = request.num_tokens - request.num_scheduled_tokens
            if request.num_output_tokens and pending == 1:
                if share == 0:
                    continue
                share -= 1
            num_tokens = min(pending, budget)
            if self._make_room(group, request, request.num_scheduled_tokens + num_tokens):
                spans.append(self._span(request, num_tokens))
                budget -= num_tokens
        if self.num_preemptions == preemptions_before:
            while budget and (admitted := self._admit_head(group, groups)) is not None:
                num_tokens = min(admitted.num_tokens, budget)
                spans.append(self._span(admitted, num_tokens))
                budget -= num_tokens
        if not spans:
            return None
        group.num_in_flight += 1
        return Microbatch(group.group_id, epoch, tuple(spans))

    def commit(self, group: Group, batch: Microbatch) -> None:
        """The microbatch has passed the chain: its tokens' KV is there. New tokens are appended by the caller."""
        group.num_in_flight -= 1
        for span in batch.spans:
            span.request.num_in_flight -= 1
            span.request.num_computed_tokens = span.end

    def preempt(self, group: Group, request: Request) -> None:
        """Take all blocks of `request` and put it at the head of the queue; its tokens stay, their KV is recomputed."""
        group.release(request)
        request.num_computed_tokens = request.num_scheduled_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)

    @staticmethod
    def _by_urgency(group: Group) -> list[Request]:
        """Requests with tokens to schedule: those one token from their next output first, in order of admission."""
        ready = [r for r in group.running if r.num_tokens > r.num_scheduled_tokens and not r.is_moving]
        return sorted(ready, key=lambda r: r.num_tokens - r.num_scheduled_tokens > 1)

    @staticmethod
    def _span(request: Request, num_tokens: int) -> Span:
        start = request.num_scheduled_tokens
        request.num_scheduled_tokens = end = start + num_tokens
        request.num_in_flight += 1
        return Span(request, start, end, samples=end == request.num_tokens)

    def _make_room(self, group: Group, request: Request, num_tokens: int) -> bool:
        """Allocate, preempting whom the policy names; False if `request` has to wait or was itself preempted."""
        while not group.allocate(request, num_tokens):
            victim = self.policy.victim(group, request)
            if victim is None:
                return False
            self.preempt(group, victim)
            if victim is request:
                return False
        return True

    def _admit_head(self, group: Group, groups: Sequence[Group]) -> Request | None:
        """Bind the head of the queue to `group`, with blocks for its whole input; None if it should not now."""
        if not self.waiting or not group.is_admitting or len(group.running) >= self.limits.max_num_seqs:
            return None
        head = self.waiting[0]
        if not self.policy.may_admit(group, head):
            return None
        # Whoever is least loaded takes it, even a step later: balanced groups finish earlier than hasty ones.
        others = (
            g for g in groups if g is not group and not g.is_paused and g.is_admitting and _load(g) < _load(group)
        )
        if any(self.policy.may_admit(other, head) for other in others):
            return None
        self.waiting.popleft()
        head.group_id = group.group_id
        group.running.append(head)
        is_allocated = group.allocate(head, head.num_tokens)
        assert is_allocated, "admitted what does not fit"
        return head


def _load(group: Group) -> float:
    """How full a group is: its requests per device, then its blocks."""
    return len(group.running) / len(group.stages) + group.num_used / (group.num_blocks + 1)
