"""The waiting queue: who is admitted next. Pure; the scheduler owns it.

Lower priorities go first (vLLM's meaning). Within one, owners (API keys or users) share by tokens, after the virtual
token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): each owner has a counter of
what it was served, the least goes first, and one that comes back starts no lower than those that stayed. With one
owner that is first come, first served. Whoever was preempted goes back before all others of its priority, as in vLLM.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kunserve.engine.request import Request

OUTPUT_WEIGHT = 2  # a generated token takes what two of a prompt do (Sheng et al., section 3)
MAX_COUNTERS = 1024  # beyond (and twice those that wait), what others were served is forgotten

_Queue = OrderedDict[str, Request]  # by request id: O(1) at both ends and in between


@dataclass(slots=True)
class _Level:
    """The requests of one priority."""

    preempted: _Queue = field(default_factory=OrderedDict)
    # May hold an empty queue; while an owner is a key here it has exactly one entry in `order`.
    by_owner: dict[str, _Queue] = field(default_factory=dict)
    order: list[tuple[int, int, str]] = field(default_factory=list)  # heap: (counter or less, arrival, owner)


@dataclass(slots=True)
class Waiting:
    """Number of requests that wait, and of their tokens."""

    num_reqs: int = 0
    num_tokens: int = 0


class WaitingQueue:
    """Requests bound to no group, in the order in which they are to be admitted. Each operation is O(log n)."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._priorities: list[int] = []  # heap of the levels' keys
        self.counters: dict[str, int] = {}  # tokens that owners were served, by the weights above
        self._floor = 0  # the counter of whoever was served last: where those that come start
        self._most_counters = MAX_COUNTERS
        self._num_appended = 0
        self._total = Waiting()
        self._by_owner: dict[str, Waiting] = {}

    def __len__(self) -> int:
        return self._total.num_reqs

    def __contains__(self, request: Request) -> bool:
        return self._queue_of(request) is not None

    def __iter__(self) -> Iterator[Request]:
        """Yield all requests in order, as far as it is known now; do not change the queue meanwhile."""
        counters = dict(self.counters)
        for priority in sorted(self._levels):
            level = self._levels[priority]
            yield from level.preempted.values()
            yield from _by_turns(level, counters)

    @property
    def head(self) -> Request | None:
        """Return the request that is next; None if nobody waits."""
        if (level := self._first_level()) is None:
            return None
        return next(iter((level.preempted or level.by_owner[self._turn(level)]).values()))

    @property
    def num_tokens(self) -> int:
        """Return how many tokens all have that wait: prompts, and what was generated before a preemption."""
        return self._total.num_tokens

    def waiting_of(self, owner: str) -> Waiting:
        """Return how much of one owner waits."""
        return self._by_owner.get(owner, Waiting())

    def append(self, request: Request) -> None:
        """Add to the tail of what its owner has in its priority."""
        level, owner = self._level(request.priority), request.owner
        if owner not in self._by_owner or owner not in self.counters:
            self.counters[owner] = max(self.counters.get(owner, 0), self._floor)
        if owner not in level.by_owner:
            level.by_owner[owner] = OrderedDict()
            self._num_appended += 1
            heapq.heappush(level.order, (self.counters[owner], self._num_appended, owner))
        level.by_owner[owner][request.request_id] = request
        self._count(request)

    def extend(self, requests: Iterable[Request]) -> None:
        """Append each request."""
        for request in requests:
            self.append(request)

    def appendleft(self, request: Request) -> None:
        """Add at the head of its priority, whoever is served there: it was before."""
        level = self._level(request.priority)
        level.preempted[request.request_id] = request
        level.preempted.move_to_end(request.request_id, last=False)
        self._count(request)

    def popleft(self) -> Request:
        """Take the head, and charge its owner for the prompt if it is its first time. IndexError if nobody waits."""
        if (level := self._first_level()) is None:
            raise IndexError("nobody waits")
        if level.preempted:
            _, request = level.preempted.popitem(last=False)
        else:
            owner = self._turn(level)
            _, request = level.by_owner[owner].popitem(last=False)
            self._floor = max(self._floor, self.counters[owner])
        self._uncount(request)
        if request.num_preemptions == 0:
            self._charge(request.owner, request.num_tokens)
        return request

    def remove(self, request: Request) -> None:
        """Forget a request. Nothing happens if it does not wait."""
        if (queue := self._queue_of(request)) is not None:
            del queue[request.request_id]
            self._uncount(request)

    def generated(self, owner: str, num_tokens: int) -> None:
        """Charge an owner for tokens that its running requests got."""
        self._charge(owner, OUTPUT_WEIGHT * num_tokens)

    # --- levels and turns ---------------------------------------------------------------------------------------

    def _level(self, priority: int) -> _Level:
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = _Level()
            heapq.heappush(self._priorities, priority)
        return level

    def _first_level(self) -> _Level | None:
        """Return the first level that is not empty; those before it are forgotten."""
        while self._priorities:
            level = self._levels[self._priorities[0]]
            if level.preempted or self._has_turn(level):
                return level
            del self._levels[heapq.heappop(self._priorities)]
        return None

    def _has_turn(self, level: _Level) -> bool:
        """Bring the owner with the least counter to the head of `order`; False if nobody waits there."""
        order = level.order
        while order:
            counter, arrival, owner = order[0]
            if not level.by_owner[owner]:
                heapq.heappop(order)
                del level.by_owner[owner]
            elif (now := self.counters[owner]) != counter:  # counters only grow, so what stands there is a bound
                heapq.heapreplace(order, (now, arrival, owner))
            else:
                return True
        return False

    def _turn(self, level: _Level) -> str:
        assert self._has_turn(level), "an empty level"
        return level.order[0][2]

    def _queue_of(self, request: Request) -> _Queue | None:
        level = self._levels.get(request.priority)
        if level is None:
            return None
        for queue in (level.preempted, level.by_owner.get(request.owner)):
            if queue is not None and queue.get(request.request_id) is request:
                return queue
        return None

    # --- accounts -----------------------------------------------------------------------------------------------

    def _count(self, request: Request) -> None:
        own = self._by_owner.setdefault(request.owner, Waiting())
        for waiting in (self._total, own):
            waiting.num_reqs += 1
            waiting.num_tokens += request.num_tokens

    def _uncount(self, request: Request) -> None:
        own = self._by_owner[request.owner]
        for waiting in (self._total, own):
            waiting.num_reqs -= 1
            waiting.num_tokens -= request.num_tokens
        if own.num_reqs == 0:
            del self._by_owner[request.owner]
        if self._total.num_reqs == 0:  # nobody competes: all start anew
            self._levels, self._priorities, self.counters, self._floor = {}, [], {}, 0

    def _charge(self, owner: str, cost: int) -> None:
        if owner not in self.counters:  # nobody competes, or it was long ago
            return
        self.counters[owner] += cost
        if len(self.counters) > self._most_counters:
            kept = {name for level in self._levels.values() for name in level.by_owner}
            self.counters = {name: counter for name, counter in self.counters.items() if name in kept}
            self._most_counters = MAX_COUNTERS + 2 * len(kept)


def _by_turns(level: _Level, counters: dict[str, int]) -> Iterator[Request]:
    """Yield requests as `popleft` would take them, if nothing is generated meanwhile. Charges `counters`."""
    turns = [(counters[owner], arrival, owner) for _, arrival, owner in level.order if level.by_owner[owner]]
    heapq.heapify(turns)
    queues = {owner: iter(level.by_owner[owner].values()) for _, _, owner in turns}
    while turns:
        _, arrival, owner = turns[0]
        if (request := next(queues[owner], None)) is None:
            heapq.heappop(turns)
            continue
        yield request
        if request.num_preemptions == 0:
            counters[owner] += request.num_tokens
        heapq.heapreplace(turns, (counters[owner], arrival, owner))
