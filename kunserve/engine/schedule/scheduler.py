"""The scheduler: which tokens go next. It decides, the fleet allocates; neither knows a clock, a task or a tensor.

No prefill or decode phase: each request's scheduled tokens catch up with its tokens, within a budget per step. Tokens
that finish a request's input (one for a decoding request) go first, so that no prompt delays a running stream by
more than its share of one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from weakref import WeakKeyDictionary, WeakSet

from kunserve.engine.batch import Microbatch
from kunserve.engine.blocks.block_table import BlockTable
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.request import Request
from kunserve.engine.schedule.budget import Budget, TimeBudget, TokenBudget
from kunserve.engine.schedule.draft import Draft
from kunserve.engine.schedule.policy import Policy
from kunserve.engine.schedule.ready import Alike, Pending, Steady, alike, is_short, ready
from kunserve.engine.schedule.swap_queue import SwapMove, SwapQueue
from kunserve.engine.schedule.waiting import Waiting, WaitingQueue
from kunserve.planner.cost import TokenSpan
from kunserve.planner.microbatch import Lookahead

TYPICAL_OUTPUT = 128  # tokens that a request is expected to generate, if it may: between those of published chat traces


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one microbatch, and with them of a group."""

    max_num_batched_tokens: int
    max_num_seqs: int
    num_ahead: int = 0  # microbatches of a group in flight, beyond one for each stage

    def max_running(self, group: Group) -> int:
        """Return how many requests may run in `group`: a microbatch full for each stage, so that no merge costs one."""
        return self.max_num_seqs * len(group.stages)


class Scheduler:
    """The global waiting queue, and the rule that turns it and a group's running requests into microbatches.

    `num_host_blocks`: room in host memory for the KV of requests that make way; 0: it is recomputed.
    `lookahead`: chains get microbatches of equal predicted time; without it, of equally many tokens.
    """

    def __init__(
        self,
        fleet: Fleet,
        limits: SchedulerLimits,
        policy: Policy,
        num_host_blocks: int = 0,
        lookahead: Lookahead | None = None,
    ) -> None:
        self.fleet = fleet
        self.limits = limits
        self.policy = policy
        self.lookahead = lookahead
        self.waiting = WaitingQueue()
        self.swapped = SwapQueue(fleet, num_host_blocks)
        self.preempted_by: dict[str, int] = {}  # request id -> group id, while it waits because of that
        self._have_waited = WeakSet[Group]()  # in whose last microbatch others waited for those that go first
        self._steady = WeakKeyDictionary[Group, Steady | None]()  # who went together in the last microbatch
        self.num_preemptions = 0
        self._preempted: list[tuple[Request, int]] = []  # since `take_preempted`
        self.num_migrations = 0

    @property
    def num_waiting(self) -> int:
        """Return how many requests are bound to no group."""
        return len(self.waiting) + len(self.swapped.ready)

    @property
    def num_waiting_tokens(self) -> int:
        """Return the tokens of all requests that are bound to no group."""
        return self.waiting.num_tokens + sum(request.num_tokens for request in self.swapped.ready)

    def queued(self) -> Iterator[Request]:
        """Yield all requests that are bound to no group, in no order of theirs."""
        return chain(self.swapped.ready, self.waiting)

    def waiting_of(self, owner: str | None) -> Waiting:
        """Return how much is queued, of all or of one owner."""
        if owner is not None:
            return self.waiting.waiting_of(owner)
        return Waiting(self.num_waiting, self.num_waiting_tokens)

    def schedule(self, group: Group, groups: Sequence[Group], epoch: int) -> Microbatch | None:
        """Make the next microbatch of `group`, its blocks allocated; None if none can go. `groups` share the queue."""
        draft, num_leaving, evictions_before = Draft(), self.swapped.num_leaving(group), self._num_evictions
        for victim in self.policy.make_way(group, num_leaving):
            self._evict(group, victim)
        may_admit = not num_leaving and self._num_evictions == evictions_before
        evictions_before = self._num_evictions
        if (budget := self._go_on(group, draft)) is None:
            budget = self._budget(group)
            may_admit &= self._take_turns(group, groups, draft, budget, may_admit=may_admit)
        if may_admit and self._num_evictions == evictions_before:
            while self._bring_back_head(group, groups):
                pass
            self._admit(group, groups, draft, budget)
        if not len(draft):
            return None
        (self._have_waited.add if draft.has_first else self._have_waited.discard)(group)
        group.in_flight.append(batch := draft.microbatch(group, epoch))
        self._steady[group] = Steady.after(batch, group, self._steady.get(group))
        return batch

    def _go_on(self, group: Group, draft: Draft) -> Budget | None:
        """Let those who run join together, as nearly always all can; returns the room left.

        None, and nobody has joined, if some come before others, or one could lack room or a block.
        """
        head, limits = self.waiting.head, self.limits
        steady, may_run_ahead = self._steady.get(group), limits.num_ahead > 0
        if steady is not None and steady.goes_on(group, may_run_ahead=may_run_ahead):
            now: Alike | None = Alike(steady.requests, bool(group.in_flight), [])
        else:
            now = alike(group, may_run_ahead=may_run_ahead)
        if now is None or (head is not None and head.goes_first):
            return None
        decoding, is_ahead, others = now
        if len(decoding) > min(limits.max_num_seqs, limits.max_num_batched_tokens):
            return None
        if is_short(group, [*decoding, *(r for r, _ in others)] if others else decoding):
            return None
        self.fleet.allocate_next(decoding, group)
        draft.go_on(decoding, is_ahead=is_ahead)
        budget = TokenBudget(limits.max_num_batched_tokens - len(decoding), group)
        self._fill(group, others, draft, budget)
        return budget

    def _take_turns(
        self, group: Group, groups: Sequence[Group], draft: Draft, budget: Budget, *, may_admit: bool
    ) -> bool:
        """Let those who run join one by one: who goes first before all others, in every other microbatch.

        Returns whether there are blocks enough for whoever is new.
        """
        evictions_before = self._num_evictions
        can_run, has_blocks = ready(group, may_run_ahead=self.limits.num_ahead > 0)
        may_admit &= has_blocks
        head, is_their_turn = self.waiting.head, group not in self._have_waited  # no stream misses two microbatches
        first = [pair for pair in can_run if pair[0].goes_first]
        others = [pair for pair in can_run if pair not in first] if first else can_run
        if is_their_turn:
            self._fill(group, first, draft, budget)
            if head is not None and head.goes_first and may_admit and self._num_evictions == evictions_before:
                self._admit(group, groups, draft, budget, only_first=True)
        draft.has_first = len(draft) > 0
        self._fill(group, others if is_their_turn else others + first, draft, budget)
        return has_blocks

    @property
    def head(self) -> Request | None:
        """Return the request that is to join a group next: of one priority, who is on the host before who waits."""
        waiting, on_host = self.waiting.head, self.swapped.head
        return on_host if waiting is None or (on_host and on_host.priority <= waiting.priority) else waiting

    def can_admit(self, group: Group) -> bool:
        """Tell whether `group` has room for whoever is next; perhaps another should take it."""
        return self.head is not None and self._has_room(group, self.head)

    def commit(self, group: Group, batch: Microbatch) -> list[Request]:
        """Count a microbatch that has passed the chain: its tokens' KV is there. The caller appends new tokens.

        Returns the requests that have ended meanwhile.
        """
        group.in_flight.remove(batch)
        ended = list[Request]()
        for request, end in zip(batch.decoding.requests, batch.decoding.ends, strict=True):
            request.num_in_flight -= 1
            request.num_sampling -= 1
            request.num_computed_tokens = end
            if request.finish_reason is not None:
                ended.append(request)
        for request, _, end, samples, _ in batch.others:
            request.num_in_flight -= 1
            request.num_sampling -= samples
            request.num_computed_tokens = end
            if samples:
                request.is_hurried = False
            if request.finish_reason is not None:
                ended.append(request)
        if len(self.waiting):  # else there is nobody to share with, and no counter is kept
            for span in batch.spans:
                if span.samples:
                    self.waiting.generated(span.request.owner, 1)
        return ended

    def preempt(self, group: Group, request: Request, *, is_hurried: bool = False) -> None:
        """Take all blocks of `request` and put it at the head of the queue; its tokens stay, their KV is recomputed.

        `is_hurried`: its KV is gone with a device. If its stream has begun, it comes before those that run.
        """
        request.is_hurried |= is_hurried and request.num_output_tokens > 0
        self.fleet.release(request)
        self.requeue(group, request)

    def requeue(self, group: Group, request: Request) -> None:
        """Let a request that has lost its KV in a group wait again, to be recomputed."""
        self._preempted.append((request, request.num_computed_tokens))
        request.note("preempted", group=group.group_id, lost_tokens=request.num_computed_tokens)
        request.num_computed_tokens = request.num_scheduled_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.preempted_by[request.request_id] = group.group_id
        if self.policy.is_requeued_last and not request.is_hurried:
            self.waiting.append(request)
        else:
            self.waiting.appendleft(request)

    def take_preempted(self) -> list[tuple[Request, int]]:
        """Return who was preempted since the last call, and how many of its tokens have to be computed again."""
        taken, self._preempted = self._preempted, []
        return taken

    def remove(self, request: Request) -> None:
        """Forget a request that is bound to no group. Nothing happens if it does not wait."""
        self.waiting.remove(request)
        self.swapped.remove(request)
        self.preempted_by.pop(request.request_id, None)

    def end_swap(self, move: SwapMove, *, is_lost: bool = False) -> None:
        """End a copy to the host or back that is over, or has failed: then the request is recomputed."""
        request, group = move.request, move.group
        is_kept = move.is_out and not is_lost and request.finish_reason is None
        if is_kept or request.finish_reason is not None:
            self.fleet.release(request)
        self.swapped.end(move, is_kept=is_kept)
        if is_lost and request.finish_reason is None:
            self.preempt(group, request)

    def hand_over(self, request: Request, destination: Group, table: BlockTable) -> None:
        """Bind an evictable request to another group, where its KV is in `table` by now."""
        self.fleet.hand_over(request, destination, table)
        self.num_migrations += 1

    @property
    def _num_evictions(self) -> int:
        return self.num_preemptions + self.swapped.num_swaps

    def _evict(self, group: Group, request: Request) -> None:
        """Evict a request for lack of blocks: to the host if the policy wants it and there is room, else to the queue.

        There it is hurried no more: else it might come first again and again.
        """
        if not (self.policy.goes_to_host(group, request) and self.swapped.begin_out(group, request)):
            request.is_hurried = False
            self.preempt(group, request)

    def _budget(self, group: Group) -> Budget:
        """Return the room of the group's next microbatch."""
        if self.lookahead is None or len(group.stages) == 1:
            return TokenBudget(self.limits.max_num_batched_tokens, group)
        return TimeBudget(self.lookahead, group, self.waiting, self.limits.max_running(group))

    def _make_room(self, group: Group, request: Request, num_tokens: int) -> bool:
        """Allocate blocks, evicting whom the policy names; False if `request` has to wait or was itself evicted."""
        while not self.fleet.allocate(request, group, num_tokens):
            if self.swapped.num_leaving(group):  # blocks come free without anybody else's having to leave
                return False
            victim = self.policy.victim(group, request)
            if victim is None:
                return False
            self._evict(group, victim)
            if victim is request:
                return False
        return True

    def _bring_back_head(self, group: Group, groups: Sequence[Group]) -> bool:
        """Begin to copy the first of the swapped back to `group`; False if it should not now."""
        head = self.head
        if head is None or head is not self.swapped.head or not self._takes(group, groups, head):
            return False
        self.swapped.begin_in(group)
        return True

    def _fill(self, group: Group, can_run: Sequence[Pending], draft: Draft, budget: Budget) -> None:
        """Let running requests join a microbatch of `group`, in this order."""
        for request, num_pending in can_run:
            if len(draft) == self.limits.max_num_seqs or draft.is_closed:
                return
            if request.group_id != group.group_id or request.is_moving:  # evicted meanwhile
                continue
            if request.suspect_until and not draft.may_join(request):
                continue
            if not (num_tokens := budget.fits(request, num_pending)):
                continue
            if group.is_mixed and not (num_tokens := self._within_reach(group, request, num_tokens)):
                continue
            table, end = request.table, request.num_scheduled_tokens + num_tokens  # nearly always in a block it has
            has_blocks = end <= (table.near or table).num_places * group.block_size
            if has_blocks or self._make_room(group, request, end):
                self._join(request, num_tokens, draft, budget)

    @staticmethod
    def _join(request: Request, num_tokens: int, draft: Draft, budget: Budget) -> None:
        budget.take(request, num_tokens)
        draft.add(request, num_tokens)

    @staticmethod
    def _within_reach(group: Group, request: Request, num_tokens: int) -> int:
        """Return how many of its next tokens a request can have near blocks for; one at least if it cannot wait.

        It waits for what it has in flight: its window moves on then.
        """
        most = group.reach(request) - request.num_scheduled_tokens
        return min(num_tokens, max(most, 0 if request.num_in_flight else 1))

    def _admit(
        self, group: Group, groups: Sequence[Group], draft: Draft, budget: Budget, *, only_first: bool = False
    ) -> None:
        """Let requests that wait join a microbatch of `group`, in the order of the queue, as long as there is room.

        `only_first`: those who go first, up to the first that does not.
        """
        while len(draft) < self.limits.max_num_seqs and not budget.is_full and not draft.is_closed:
            if not self._may_admit_head(group, groups, draft):
                return
            if only_first and self.waiting.head is not None and not self.waiting.head.goes_first:
                return
            head = self.waiting.popleft()
            self.preempted_by.pop(head.request_id, None)
            self.fleet.admit(head, group, finds_prefix=True)
            num_tokens = budget.fits(head, head.num_tokens - head.num_scheduled_tokens)
            if group.is_mixed:
                num_tokens = self._within_reach(group, head, num_tokens)
            if num_tokens and self.fleet.allocate(head, group, head.num_scheduled_tokens + num_tokens):
                self._join(head, num_tokens, draft, budget)

    def _may_admit_head(self, group: Group, groups: Sequence[Group], draft: Draft) -> bool:
        """Tell whether the head of the queue should join `group`, beside these. Whoever is on the host may go first."""
        head = self.waiting.head
        if head is None or head is not self.head or not self._takes(group, groups, head):
            return False
        return not self.fleet.is_prefix_coming(head, group) and draft.may_join(head)

    def _takes(self, group: Group, groups: Sequence[Group], head: Request) -> bool:
        """Tell whether `group` has room for `head`, and no other that has room is better for it.

        The least loaded takes it, even a step later: balanced groups finish earlier than hasty ones. A group that has
        its first blocks already takes it even if it is more loaded, by as much as computing them costs; it may be busy
        now, and the head waits for the end of its step.
        """
        if not self._has_room(group, head):
            return False
        lengths = self.fleet.prefix_lengths(head) if self.policy.seeks_prefixes else {}

        def cost(g: Group) -> float:
            num_cached = lengths.get(g.group_id, 0) * g.block_size
            return self.policy.load(g) - (self._worth(head, num_cached) if num_cached else 0.0)

        own, holders = cost(group), map(self.fleet.group, lengths)
        others = (g for g in chain(groups, holders) if g is not group and not g.is_paused)
        return not any(
            cost(other) < own and self._has_room(other, head) and not self.fleet.is_prefix_coming(head, other)
            for other in others
        )

    def _worth(self, head: Request, num_tokens: int) -> float:
        """Return what not computing the first tokens of a request is worth, in the unit of `Policy.load`.

        Each request that runs costs a new one a row in each step that they share, and the new one costs it as much.
        They share half of its steps: the other one has been running for a while.
        """
        num_rows = max(1, min(TYPICAL_OUTPUT, head.params.max_tokens))
        if self.lookahead is None:
            return num_tokens / num_rows
        row_s = self.lookahead.added_time(TokenSpan(head.num_tokens, 1, 1))
        return self.lookahead.added_time(TokenSpan(0, num_tokens)) / (num_rows * row_s)

    def _has_room(self, group: Group, head: Request) -> bool:
        if not group.is_admitting or len(group.running) >= self.limits.max_running(group):
            return False
        if (group.is_suspect or head.avoids == group.group_id) and self._should_go_elsewhere(group, head):
            return False
        if self.policy.may_admit(group, head):
            return True
        if (num_shared := self.fleet.shared_blocks(head, group)) and self.policy.may_admit(group, head, num_shared):
            return True
        # Nobody waits for memory that only cached blocks on their way hold.
        return self.fleet.give_up_followers(group) and self.policy.may_admit(group, head)

    def _should_go_elsewhere(self, group: Group, head: Request) -> bool:
        """Tell whether a request had better go to a group in which no step has failed.

        To one that has room now, so that nobody waits because of one failure; if step after step fails here, to any
        that can ever hold it.
        """
        num_blocks = group.blocks_for(min(head.max_num_tokens, head.num_tokens + TYPICAL_OUTPUT))
        others = (g for g in self.fleet.groups if not g.is_suspect and g.group_id != head.avoids and g is not group)
        return any((group.is_suspect and g.num_blocks >= num_blocks) or self._has_room(g, head) for g in others)
