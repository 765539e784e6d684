"""The prefix cache changes no answer, whatever happens meanwhile; and requests that begin alike find their prefix."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from seeds import seeds
from tiny_models import VOCAB_SIZE
from transition_harness import (
    BLOCK_SIZE,
    Answer,
    Checked,
    Failures,
    answer_while,
    checked_engine,
    regroup_forever,
    regroup_in_order,
)

from kunserve.engine.request import Request
from kunserve.errors import DeviceError
from kunserve.sampling import SamplingParams

NUM_PREFIXES, NUM_REQUESTS = 4, 120


def make_family(seed: int, number: int = NUM_REQUESTS) -> list[Request]:
    """Requests of which most begin alike, some as long as full blocks, greedy and seeded, some with logprobs."""
    rng = random.Random(seed)
    prefixes = [rng.choices(range(3, VOCAB_SIZE), k=rng.choice([8, 16, 17, 31])) for _ in range(NUM_PREFIXES)]
    requests = []
    for i in range(number):
        prompt = list(rng.choice(prefixes))[: rng.choice([None, 8, 12])]
        prompt += rng.choices(range(3, VOCAB_SIZE), k=rng.choice([0, 1, BLOCK_SIZE, 2 * BLOCK_SIZE, 13]))
        params = SamplingParams(
            max_tokens=rng.randrange(1, 14),
            temperature=rng.choice([0.0, 0.9]),
            seed=i,
            repetition_penalty=rng.choice([1.0, 1.1]),
            ignore_eos=True,
            num_logprobs=rng.choice([None, 2]),
            num_prompt_logprobs=rng.choice([None, None, None, 1]),
        )
        requests.append(Request(f"r{i}", prompt, params))
    return requests


def copies(requests: list[Request]) -> list[Request]:
    return [Request(r.request_id, list(r.prompt_token_ids), r.params, cache_salt=r.cache_salt) for r in requests]


def cached_tokens(requests: list[Request]) -> int:
    return sum(request.num_cached_tokens for request in requests)


@asynccontextmanager
async def engine_of(folder: Path, devices: str, num_blocks: int, **settings: Any) -> AsyncIterator[Checked]:
    async with checked_engine(folder, devices, num_blocks, **settings) as checked:
        yield checked


async def answers_without_cache(folder: Path, requests: list[Request]) -> list[Answer]:
    async with engine_of(folder, "cpu:1", 4096, enable_prefix_caching=False) as checked:
        answers = await checked.answer_all(requests)
    assert not cached_tokens(requests)
    return answers


async def by_waves(checked: Checked, requests: list[Request], rng: random.Random) -> list[Answer]:
    """Answers to all: a few at a time, so that many find what others have left."""
    answers: list[Answer] = []
    while len(answers) < len(requests):
        wave = requests[len(answers) : len(answers) + rng.randrange(1, 24)]
        answers += await checked.answer_all(wave)
    return answers


async def nothing(checked: Checked, rng: random.Random) -> None:
    """Let them run undisturbed."""


_known: dict[int, list[Answer]] = {}  # what the family of a seed is answered, once it was


async def answers_to_family(folder: Path, seed: int) -> list[Answer]:
    if seed not in _known:
        _known[seed] = await answers_without_cache(folder, make_family(seed))
    return _known[seed]


@pytest.mark.parametrize("disturb", [nothing, regroup_forever, regroup_in_order])
@pytest.mark.parametrize("num_blocks", [48, 1024])
@pytest.mark.parametrize("seed", seeds(3))
async def test_the_cache_changes_no_answer(
    seed: int, num_blocks: int, disturb: Callable[[Checked, random.Random], Awaitable[None]], six_layers: Path
) -> None:
    requests, rng = make_family(seed), random.Random(seed)
    expected = await answers_to_family(six_layers, seed)
    async with engine_of(six_layers, "cpu:4", num_blocks) as checked:
        waves = asyncio.create_task(by_waves(checked, requests, rng))
        disturbing = asyncio.ensure_future(disturb(checked, rng))
        answers = await waves
        disturbing.cancel()
        await asyncio.wait([disturbing])
        for answer, its in zip(answers, expected, strict=True):
            answer.assert_same(its)
        checked.assert_no_failure()
        assert cached_tokens(requests) > 0
        await checked.undo_drops()


async def test_everybody_at_once_shares_what_is_there_first(six_layers: Path) -> None:
    first, rest = make_family(7, 1), make_family(7, 60)
    expected = await answers_without_cache(six_layers, copies(rest))
    async with engine_of(six_layers, "cpu:2", 64, max_num_batched_tokens=32) as checked:
        await checked.answer_all(first)
        rng = random.Random(1)
        answers = await answer_while(checked, copies(rest), lambda: regroup_forever(checked, rng))
        for answer, its in zip(answers, expected, strict=True):
            answer.assert_same(its)
        await checked.undo_drops()


async def test_turns_of_a_chat_find_prompt_and_answer_of_those_before(six_layers: Path) -> None:
    async with engine_of(six_layers, "cpu:2", 256) as checked:
        history = list(range(3, 3 + 21))
        for turn in range(4):
            request = Request(f"t{turn}", list(history), SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True))
            [answer] = await checked.answer_all([request])
            known = (len(history) - 4 - 1) // BLOCK_SIZE * BLOCK_SIZE if turn else 0  # the last token has no KV
            assert request.num_cached_tokens == known
            history += [*answer.token_ids, 5, 6, 7, 8]


async def test_a_prompt_that_is_all_cached_computes_its_last_token(six_layers: Path) -> None:
    async with engine_of(six_layers, "cpu:1", 256) as checked:
        for number, cached in enumerate([0, 12, 12]):
            request = Request(f"r{number}", list(range(3, 19)), SamplingParams(max_tokens=2, temperature=0.0))
            await checked.answer_all([request])
            assert request.num_cached_tokens == cached


async def test_a_salt_keeps_prefixes_apart(six_layers: Path) -> None:
    async with engine_of(six_layers, "cpu:1", 256) as checked:
        for number, (salt, cached) in enumerate([("", 0), ("a", 0), ("b", 0), ("a", 16), ("", 16)]):
            request = Request(f"r{number}", list(range(3, 20)), SamplingParams(max_tokens=1), cache_salt=salt)
            await checked.answer_all([request])
            assert request.num_cached_tokens == cached


async def test_a_full_cache_is_no_overload(six_layers: Path) -> None:
    """Blocks that nobody uses are given back before anybody waits, is preempted, or weights are dropped."""
    async with engine_of(six_layers, "cpu:2", 24, is_pinned=False) as checked:
        rng = random.Random(3)
        for i in range(60):
            prompt = rng.choices(range(3, VOCAB_SIZE), k=40)
            await checked.answer_all([Request(f"r{i}", prompt, SamplingParams(max_tokens=8, ignore_eos=True))])
        assert all(len(group.idle) > group.num_blocks // 2 for group in checked.engine.groups)
        assert not checked.reconfigure.transitions.remembered and checked.engine.scheduler.num_preemptions == 0
        assert all(group.num_used == 0 and group.num_free == group.num_blocks for group in checked.engine.groups)


async def test_a_request_goes_where_its_prefix_is(six_layers: Path) -> None:
    async with engine_of(six_layers, "cpu:4", 256) as checked:
        prompts = [[20 * i + j for j in range(3, 20)] for i in range(4)]
        for turn in range(3):
            requests = [Request(f"{turn}.{i}", p, SamplingParams(max_tokens=4)) for i, p in enumerate(prompts)]
            await checked.answer_all(requests)
            assert [request.num_cached_tokens for request in requests] == [16 * (turn > 0)] * 4


async def test_a_request_that_was_preempted_finds_its_own_prefix(six_layers: Path) -> None:
    async with engine_of(six_layers, "cpu:1", 256) as checked:
        request = Request("r", list(range(3, 40)), SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
        answering = asyncio.create_task(checked.answer(request))
        while request.num_output_tokens < 5:
            await checked.commits(1)
        with checked.reconfigure.boundary.paused(checked.engine.groups):
            await checked.reconfigure.boundary.reached(checked.engine.groups)
            checked.engine.scheduler.preempt(checked.engine.groups[0], request)
            assert request.num_computed_tokens == 0
        await checked.commits(1)
        assert request.num_preemptions == 1 and request.num_computed_tokens >= 40
        expected = (await answers_without_cache(six_layers, copies([request])))[0]
        (await answering).assert_same(expected)


async def test_after_a_drop_that_was_rolled_back_cached_blocks_are_as_before(six_layers: Path) -> None:
    """Where no request runs, a drop could give the KV of the layers that go to others before it is known to succeed."""
    prompts = [
        Request(f"p{i}", [40 * i + j for j in range(3, 36)], SamplingParams(max_tokens=6, temperature=0.0))
        for i in range(6)
    ]
    expected = await answers_without_cache(six_layers, copies(prompts))
    outcomes = set[str]()
    async with engine_of(six_layers, "cpu:2", 64) as checked:
        failures = Failures(checked.engine)
        for fail_at in range(1, 60, 2):
            await checked.answer_all(copies(prompts))
            await checked.until_no_step_runs()
            num_idle = sum(len(group.idle) for group in checked.engine.groups)
            assert num_idle > 0
            failures.arm(fail_at)
            with suppress(DeviceError, OSError):
                await checked.control.drop()
            [transition] = await checked.settled()
            outcomes.add(transition.outcome)
            if transition.outcome == "rolled back" and "remap" in transition.seconds:
                assert sum(len(group.idle) for group in checked.engine.groups) == num_idle
            failures.arm(None)
            for answer, its in zip(await checked.answer_all(copies(prompts)), expected, strict=True):
                answer.assert_same(its)
            await checked.undo_drops()
            if not failures.failed and "done" in outcomes:
                break
    assert outcomes >= {"rolled back", "done"}


async def test_cached_blocks_live_through_drop_and_restore(six_layers: Path) -> None:
    """All devices together hold the prompts; nobody uses them while groups merge and split."""
    prompts = [
        Request(f"p{i}", [40 * i + j for j in range(3, 36)], SamplingParams(max_tokens=6, temperature=0.0))
        for i in range(6)
    ]
    expected = await answers_without_cache(six_layers, copies(prompts))
    async with engine_of(six_layers, "cpu:4", 256) as checked:
        await checked.answer_all(copies(prompts))
        for verb in ("drop", "restore", "drop", "drop", "restore", "restore"):
            await getattr(checked.control, verb)()
            await checked.settled()
            for prompt, its in zip(prompts, expected, strict=True):  # alone: beside others it may go where fewer run
                [again] = copies([prompt])
                [answer] = await checked.answer_all([again])
                answer.assert_same(its)
                assert again.num_cached_tokens == 32, verb
            await checked.until_no_step_runs()
        checked.assert_no_failure()


async def test_what_follows_gives_way_to_a_request(six_layers: Path) -> None:
    """A request that needs the memory of cached blocks on their way gets it, and is not preempted."""
    rng = random.Random(5)
    async with engine_of(six_layers, "cpu:2", 24) as checked:
        for i in range(8):
            prompt = rng.choices(range(3, VOCAB_SIZE), k=40)
            await checked.answer_all([Request(f"w{i}", prompt, SamplingParams(max_tokens=4, ignore_eos=True))])
        await checked.until_no_step_runs()
        large = [
            Request(
                f"r{i}", rng.choices(range(3, VOCAB_SIZE), k=50), SamplingParams(20, temperature=0, ignore_eos=True)
            )
            for i in range(2)
        ]
        expected = await answers_without_cache(six_layers, copies(large))
        dropping = asyncio.create_task(checked.control.drop())
        answers = await checked.answer_all(large)
        await dropping
        await checked.settled()
        for answer, its in zip(answers, expected, strict=True):
            answer.assert_same(its)
        checked.assert_no_failure()
        assert checked.engine.scheduler.num_preemptions == 0
