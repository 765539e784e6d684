"""How much is asked of memory: what requests share counts once, whether they run or wait."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from groups import commit, make_group
from seeds import seeds

from kunserve.engine import prefix_cache
from kunserve.engine.fleet import Fleet
from kunserve.engine.prefix_cache import most_found
from kunserve.engine.regroup.pressure import Pressure
from kunserve.engine.request import Request
from kunserve.engine.schedule.policy import make_policy
from kunserve.engine.schedule.scheduler import Scheduler, SchedulerLimits
from kunserve.planner.overload import Thresholds
from kunserve.policies import OverloadPolicy
from kunserve.sampling import SamplingParams

BLOCK_SIZE = 4


class Scene:
    """Some groups with a prefix cache, or without, and the queue before them."""

    def __init__(self, num_groups: int = 1, *, has_prefix_cache: bool = True) -> None:
        self.groups = [make_group(i, num_blocks=600, block_size=BLOCK_SIZE) for i in range(num_groups)]
        self.fleet = Fleet(self.groups, has_prefix_cache=has_prefix_cache)
        limits = SchedulerLimits(max_num_batched_tokens=4096, max_num_seqs=256)
        self.scheduler = Scheduler(self.fleet, limits, make_policy(OverloadPolicy.DROP, 0), 0)
        self.pressure = Pressure(self.fleet, self.scheduler, Thresholds(), 600, lambda _: None)
        self.num_requests = 0

    def wait(self, prompt: Sequence[int], salt: str = "", num_prompt_logprobs: int | None = None) -> Request:
        params = SamplingParams(8, temperature=0, num_prompt_logprobs=num_prompt_logprobs)
        request = Request(f"r{self.num_requests}", list(prompt), params, cache_salt=salt)
        request.max_num_tokens = len(prompt) + 8
        self.num_requests += 1
        self.scheduler.waiting.append(request)
        return request

    def step(self, group_id: int = 0) -> None:
        group = self.groups[group_id]
        batch = self.scheduler.schedule(group, [group], 0)
        if batch is not None:
            commit(self.scheduler, group, batch)
        for request in group.running:
            self.fleet.computed(request, group)

    def num_repeated(self) -> int:
        assert self.fleet.prefixes is not None
        return self.fleet.prefixes.num_repeated(self.scheduler.queued(), BLOCK_SIZE)

    def num_repeated_slowly(self) -> int:
        """Count by tokens: blocks that waiting requests could share, less those that one of them has to bring."""
        used = {
            prefix
            for group in self.groups
            for request in group.running
            for prefix in prefixes(request, request.num_computed_tokens // BLOCK_SIZE)
        }
        asked = [p for r in self.scheduler.queued() for p in prefixes(r, most_found(r, BLOCK_SIZE))]
        return len(asked) - len(set(asked) - used)


def prefixes(request: Request, num_blocks: int) -> list[tuple[str, tuple[int, ...]]]:
    """What the first blocks of a request stand for."""
    ends = range(BLOCK_SIZE, (num_blocks + 1) * BLOCK_SIZE, BLOCK_SIZE)
    return [(request.cache_salt, tuple(request.token_ids[:end])) for end in ends]


COMMON = list(range(3, 403))


def of_crowd(number: int, common: Sequence[int] = COMMON) -> list[int]:
    """A prompt that begins like all others and ends like none."""
    return [*common, *(10_000 * (number + 1) + j for j in range(9))]


def test_a_prefix_counts_once_before_those_who_have_it_run_and_afterwards() -> None:
    scene = Scene()
    scene.wait(of_crowd(0))
    scene.step()
    one = scene.pressure.demand()
    for i in range(1, 41):
        scene.wait(of_crowd(i))
    waiting = scene.pressure.demand()
    assert waiting == one + 40 * 5  # each has five blocks of its own: for nine tokens, and eight more
    scene.step()
    assert scene.scheduler.num_waiting == 0 and scene.pressure.demand() == waiting


def test_a_prefix_that_nobody_has_computed_yet_counts_for_one_of_those_who_wait() -> None:
    scene, alone = Scene(), Scene()
    for i in range(41):
        scene.wait(of_crowd(i))
    alone.wait(of_crowd(0))
    assert scene.pressure.demand() == alone.pressure.demand() + 40 * 5


def test_without_a_prefix_cache_nothing_is_shared() -> None:
    scene, alone = Scene(has_prefix_cache=False), Scene(has_prefix_cache=False)
    requests = [scene.wait(of_crowd(i)) for i in range(41)]
    alone.wait(of_crowd(0))
    assert scene.pressure.demand() == 41 * alone.pressure.demand()
    assert not any(request.block_keys for request in requests)


@pytest.mark.parametrize("seed", seeds(60))
def test_what_is_shared_is_what_a_slow_count_finds(seed: int) -> None:
    rng, scene = random.Random(seed), Scene(num_groups=2)
    roots = [[rng.randrange(2) for _ in range(60)] for _ in range(3)]

    def ask() -> None:
        prompt = rng.choice(roots)[: rng.randrange(60)] + [rng.randrange(2) for _ in range(rng.randrange(1, 20))]
        scene.wait(prompt, rng.choice(["", "", "salt"]), rng.choice([None, None, None, 1]))

    for _ in range(6):
        for _ in range(rng.randrange(1, 8)):
            ask()
        assert scene.num_repeated() == scene.num_repeated_slowly()
        if rng.random() < 0.7:
            scene.step(rng.randrange(2))
            assert scene.num_repeated() == scene.num_repeated_slowly()


def test_of_requests_that_share_nothing_one_key_each_is_made() -> None:
    scene = Scene()
    requests = [scene.wait([i] * 100) for i in range(20)]
    assert scene.num_repeated() == 0
    assert [len(request.block_keys) for request in requests] == [1] * 20


def test_a_sample_stands_for_a_long_queue_and_no_look_makes_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "MOST_LOOKED_AT", 32)
    monkeypatch.setattr(prefix_cache, "MOST_NEW_KEYS", 600)
    scene = Scene()
    requests = [scene.wait(of_crowd(i)) for i in range(1000)]
    truth = scene.num_repeated_slowly()
    num_keys, found = [0], list[int]()
    while num_keys[-1:] != num_keys[-2:-1]:
        found.append(scene.num_repeated())
        num_keys.append(sum(len(request.block_keys) for request in requests))
        assert num_keys[-1] - num_keys[-2] <= 600
    assert found == sorted(found) and 0.75 * truth < found[0] < found[-1] <= truth
    assert 0.9 * truth < found[-1]
    assert sum(bool(request.block_keys) for request in requests) == 32
