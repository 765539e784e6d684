"""Who is admitted next: by priority, then shared between owners, then in order of arrival."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import pytest
from seeds import seeds

from kunserve.engine.request import Request
from kunserve.engine.schedule.waiting import MAX_COUNTERS, OUTPUT_WEIGHT, WaitingQueue
from kunserve.sampling import SamplingParams


def make_request(name: str, owner: str = "", num_tokens: int = 10, priority: int = 0) -> Request:
    return Request(name, [1] * num_tokens, SamplingParams(max_tokens=9), priority=priority, owner=owner)


def names(requests: Iterable[Request]) -> list[str]:
    return [request.request_id for request in requests]


def pop_all(queue: WaitingQueue) -> list[str]:
    return [queue.popleft().request_id for _ in range(len(queue))]


def flood(queue: WaitingQueue, owner: str, num_reqs: int, num_tokens: int = 10) -> None:
    queue.extend(make_request(f"{owner}{i}", owner, num_tokens) for i in range(num_reqs))


def test_one_owner_is_first_come_first_served() -> None:
    queue = WaitingQueue()
    queue.extend(make_request(name, num_tokens=n) for name, n in (("a", 900), ("b", 1), ("c", 50)))
    assert (queue.head, len(queue), queue.num_tokens) == (next(iter(queue)), 3, 951)
    assert names(queue) == pop_all(queue) == ["a", "b", "c"]
    assert queue.head is None and not queue and queue.num_tokens == 0
    with pytest.raises(IndexError):
        queue.popleft()


def test_who_was_preempted_goes_before_the_rest_of_its_priority() -> None:
    queue = WaitingQueue()
    first, second = make_request("first", "a"), make_request("second", "b")
    queue.extend([make_request("x", "c"), make_request("urgent", "c", priority=-1)])
    queue.appendleft(second)  # the last admitted is preempted first
    queue.appendleft(first)
    assert names(queue) == pop_all(queue) == ["urgent", "first", "second", "x"]


def test_lower_priorities_go_first() -> None:
    queue = WaitingQueue()
    order = [3, -2, 0, 3, -2, 7]
    queue.extend(make_request(f"{i}", priority=priority) for i, priority in enumerate(order))
    assert names(queue) == pop_all(queue) == ["1", "4", "2", "0", "3", "5"]
    queue.append(make_request("later", priority=5))
    queue.append(make_request("sooner", priority=-5))
    assert queue.head is not None and queue.head.request_id == "sooner"


def test_a_flood_does_not_starve_another() -> None:
    queue = WaitingQueue()
    flood(queue, "flood", 1000)
    for _ in range(100):
        queue.popleft()
    flood(queue, "other", 10)
    served = Counter(name.rstrip("0123456789") for name in names(queue)[:20])
    assert served["other"] >= 9 and names(queue) == pop_all(queue)


def test_owners_share_by_tokens() -> None:
    queue = WaitingQueue()
    flood(queue, "long", 100, num_tokens=90)
    flood(queue, "short", 100, num_tokens=10)
    served = Counter(queue.popleft().owner for _ in range(50))
    assert served == {"long": 5, "short": 45}


def test_generated_tokens_count_twice() -> None:
    queue = WaitingQueue()
    flood(queue, "chatty", 9)
    flood(queue, "terse", 9)
    queue.generated("chatty", 40 // OUTPUT_WEIGHT)
    assert [queue.popleft().owner for _ in range(6)] == ["terse"] * 4 + ["chatty", "terse"]


def test_an_owner_saves_nothing_up_while_it_is_away() -> None:
    queue = WaitingQueue()
    flood(queue, "a", 200)
    flood(queue, "b", 1)
    for _ in range(100):
        queue.popleft()
    flood(queue, "b", 50)
    assert abs(Counter(queue.popleft().owner for _ in range(40))["b"] - 20) <= 1


def test_recomputing_a_prompt_is_not_charged() -> None:
    queue = WaitingQueue()
    flood(queue, "a", 2)
    flood(queue, "b", 2)
    victim = queue.popleft()
    victim.num_preemptions = 1
    queue.appendleft(victim)
    assert pop_all(queue) == ["a0", "b0", "a1", "b1"]


def test_what_owners_were_served_is_forgotten_in_time() -> None:
    queue = WaitingQueue()
    flood(queue, "stays", 5)
    for i in range(4 * MAX_COUNTERS):
        queue.append(make_request("once", f"user {i}"))
        queue.remove(make_request("once", f"user {i}"))  # another request of that name: nothing happens
        while (head := queue.head) is not None and head.owner != f"user {i}":
            queue.popleft()
            queue.append(make_request(f"again {i}", "stays"))
        queue.popleft()
    assert len(queue.counters) <= 3 * MAX_COUNTERS


@pytest.mark.parametrize("seed", seeds(8))
def test_any_operations_keep_order_and_accounts(seed: int) -> None:
    rng = random.Random(seed)
    queue = WaitingQueue()
    waiting: list[Request] = []  # in order of arrival; the preempted first
    for i in range(3000):
        match rng.choice(("append", "append", "preempt", "pop", "remove", "generate")):
            case "append":
                owner = f"o{rng.randrange(4)}"
                request = make_request(f"r{i}", owner, rng.randrange(1, 40), rng.randrange(-1, 2))
                queue.append(request)
                waiting.append(request)
            case "preempt":
                request = make_request(f"r{i}", f"o{rng.randrange(4)}", priority=rng.randrange(-1, 2))
                request.num_preemptions = 1
                queue.appendleft(request)
                waiting.insert(0, request)
            case "pop" if waiting:
                expected = next(iter(queue))
                least = min(request.priority for request in waiting)
                level = [request for request in waiting if request.priority == least]
                before = dict(queue.counters)
                assert queue.head is expected
                taken = queue.popleft()
                assert taken is expected and taken.priority == least
                if level[0].num_preemptions:
                    assert taken is level[0]
                else:
                    assert taken is next(request for request in level if request.owner == taken.owner)
                    assert before[taken.owner] == min(before[request.owner] for request in level)
                waiting.remove(taken)
            case "remove" if waiting:
                request = rng.choice(waiting)
                assert request in queue
                queue.remove(request)
                queue.remove(request)
                assert request not in queue
                waiting.remove(request)
            case "generate":
                queue.generated(f"o{rng.randrange(4)}", rng.randrange(9))
        assert len(queue) == len(waiting) and queue.num_tokens == sum(r.num_tokens for r in waiting)
        own = [r for r in waiting if r.owner == "o1"]
        assert queue.waiting_of("o1").num_reqs == len(own)
        assert queue.waiting_of("o1").num_tokens == sum(r.num_tokens for r in own)
    order = list(queue)
    assert {id(r) for r in order} == {id(r) for r in waiting} and len(order) == len(waiting)
    assert [queue.popleft() for _ in order] == order
