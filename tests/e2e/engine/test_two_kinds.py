"""Where only some layers have a window their KV is freed behind it, and nothing else changes, to the bit."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
from transition_harness import patient_with_sound_devices

from e2e.engines import assert_idle, generate, generate_all, greedy, running_engine
from e2e.tiny import TinyModels, random_prompt
from e2e.two_kinds import FAMILIES, SHAPES, rebalance, share_of, watch
from kunserve.engine.engine import Engine
from kunserve.engine.kinds.mixed_group import MixedGroup
from kunserve.engine.launch.launch import Served
from kunserve.errors import ConflictError, DeviceError
from kunserve.faults import parse_faults
from kunserve.policies import OverloadPolicy

IS_WHOLE = bool(os.environ.get("KUNSERVE_ALL_MODELS"))
POLICIES = tuple(OverloadPolicy)
# One family for each policy in a usual run, each of them at least once.
CASES = [
    (family, policy)
    for i, policy in enumerate(POLICIES)
    for j, family in enumerate(FAMILIES)
    if IS_WHOLE or i % len(FAMILIES) == j
]
# Family, prefix cache, blocks of a device, and how KV follows its layers when groups merge that are as full as that.
TRANSITIONS = [
    ("gemma2", True, 128, "by_request"),
    ("gemma2", False, 48, "by_layer"),
    ("gemma3", True, 48, "by_layer"),
    ("gpt-oss", False, 128, "by_request"),
    ("qwen2-window", True, 128, "by_request"),
]
NUM_TOKENS = 150
SHARED = random_prompt(130, seed=9)
PROMPTS = [random_prompt(n, seed=n) for n in (5, 40, 70, 130)] + [[*SHARED, 7 + i] for i in range(3)]
LENGTHS = [NUM_TOKENS - 15 * i for i in range(len(PROMPTS))]
# Where one layer of four sees all, a chain whose stages have one and three holds more than two groups with these alone.
DROP_SHARES = {"qwen2-window": (330, 300, 340, 450)}
# Chunks of four blocks: that of windows is told apart from that of all tokens.
KINDS: dict[str, Any] = {"windowed_kv_share": 0.3, "chunk_bytes": 64 << 10, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def expected(tiny_models: TinyModels) -> dict[str, list[list[int]]]:
    """What is generated where KV is of one kind, and everything is kept."""

    async def generated(family: str) -> list[list[int]]:
        folder = tiny_models.folder(family, **SHAPES[family])
        async with running_engine(
            folder, num_blocks_override=256, enable_prefix_caching=False, windowed_kv_share=1.0
        ) as served:
            assert served.engine.fleet.num_kinds == 1
            return await generate_all(served.engine, PROMPTS, greedy(NUM_TOKENS))

    return {family: asyncio.run(generated(family)) for family in FAMILIES}


@pytest.mark.parametrize(("family", "policy"), CASES)
@pytest.mark.parametrize("has_cache", [True, False], ids=["cached", "uncached"])
async def test_nothing_changes(
    family: str, policy: OverloadPolicy, has_cache: bool, tiny_models: TinyModels, expected: dict[str, list[list[int]]]
) -> None:
    """With memory for hardly more than two of the seven prompts, so that they are preempted, swapped, moved."""
    settings: dict[str, Any] = {"num_blocks_override": 20, "overload_policy": policy, "max_model_len": 320}
    folder = tiny_models.folder(family, **SHAPES[family])
    async with running_engine(folder, "cpu:2", enable_prefix_caching=has_cache, **KINDS, **settings) as served:
        assert served.engine.fleet.num_kinds == 2
        watcher = asyncio.create_task(watch(served.engine))
        for _ in range(2):  # the second time with what the first has left in the cache
            assert await generate_all(served.engine, PROMPTS, greedy(NUM_TOKENS)) == expected[family]
        assert not watcher.done(), watcher.exception()
        watcher.cancel()
        await assert_idle(served.engine)


def used_share(engine: Engine) -> float:
    """Blocks in use over all that there are."""
    return sum(group.num_used for group in engine.groups) / sum(group.num_blocks for group in engine.groups)


@pytest.mark.parametrize(("family", "has_cache", "num_blocks", "mode"), TRANSITIONS)
async def test_across_a_drop_and_a_restore(
    family: str,
    has_cache: bool,
    num_blocks: int,
    mode: str,
    tiny_models: TinyModels,
    expected: dict[str, list[list[int]]],
) -> None:
    """A restore comes as soon as what the chain holds fits without it: requests end one after the other."""
    folder = tiny_models.folder(family, **SHAPES[family])
    settings: dict[str, Any] = {"is_pinned": True, "num_blocks_override": num_blocks, "max_model_len": 320}
    async with running_engine(folder, "cpu:2", enable_prefix_caching=has_cache, **KINDS, **settings) as served:
        engine, control = served.engine, served.control
        answers = asyncio.gather(
            *(generate(engine, prompt, greedy(n)) for prompt, n in zip(PROMPTS * 2, LENGTHS * 2, strict=True))
        )
        num_commits = 0  # by 60 most have let go of something; by layer means: there is no room for one after the other
        while num_commits < 60 or (mode == "by_layer" and used_share(engine) < 0.75):
            await engine.signals.next_commit()
            num_commits += 1
        await engine.drop(is_forced=True)
        await asyncio.wait(control.tasks)
        engine.check()
        assert control.reconfigure.transitions.remembered[-1].exchange_mode == mode
        while len(engine.groups) == 1:
            await engine.signals.next_commit()
            with contextlib.suppress(ConflictError):
                await engine.restore()
        assert engine.num_running
        await asyncio.wait(control.tasks)
        engine.check()
        assert await answers == [tokens[:n] for tokens, n in zip(expected[family], LENGTHS, strict=True)] * 2
        await assert_idle(engine)


async def test_more_long_requests_run_at_once(tiny_models: TinyModels) -> None:
    """Ten streams in the memory of five: nobody makes way, where with one kind of KV somebody has to."""
    folder, preempted = tiny_models.folder("gemma3", **SHAPES["gemma3"]), list[int]()
    for kinds in (KINDS, KINDS | {"windowed_kv_share": 1.0}):
        async with running_engine(folder, num_blocks_override=88, max_model_len=320, **kinds) as served:
            prompts = [random_prompt(10, seed=i) for i in range(10)]
            await generate_all(served.engine, prompts, greedy(240))
            preempted.append(served.engine.scheduler.num_preemptions + served.engine.scheduler.swapped.num_swaps)
            await assert_idle(served.engine)
    assert preempted[0] == 0 < preempted[1]


@pytest.fixture
def patience() -> Iterator[None]:
    """Wait for devices that this machine has no time for: none of them is ill."""
    with patient_with_sound_devices(lambda _: False):
        yield


def count_moved(served: Served) -> Counter[int]:
    """How many blocks are copied to where their kind keeps its memory, from now on; by device."""
    transfers, num_moved = served.control.reconfigure.exchange.transfers, Counter[int]()
    within = transfers.within

    async def counted(device: int, layers: Iterable[int], moved: Mapping[int, int]) -> None:
        num_moved[device] += len(moved)
        await within(device, layers, moved)

    transfers.within = counted  # type: ignore[method-assign]
    return num_moved


async def begin_beyond(engine: Engine) -> asyncio.Task[list[list[int]]]:
    """Begin to generate after all prompts, behind the blocks of others; returns when those have ended."""
    fillers = asyncio.create_task(generate_all(engine, [random_prompt(200, seed=i) for i in range(10)], greedy(40)))
    answers = asyncio.create_task(generate_all(engine, PROMPTS, greedy(NUM_TOKENS)))
    await fillers
    return answers


async def next_commit_or(answers: asyncio.Task[list[list[int]]], engine: Engine) -> None:
    """Wait for the next microbatch to come back, or for the answers: after these there is none."""
    commit = asyncio.ensure_future(engine.signals.next_commit())
    await asyncio.wait([commit, answers], return_when=asyncio.FIRST_COMPLETED)
    commit.cancel()


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("has_cache", [True, False], ids=["cached", "uncached"])
async def test_memory_goes_from_kind_to_kind(
    family: str, has_cache: bool, tiny_models: TinyModels, expected: dict[str, list[list[int]]]
) -> None:
    """Again and again, both ways, while requests run: nobody makes way, and no token is another."""
    folder = tiny_models.folder(family, **SHAPES[family])
    settings: dict[str, Any] = {"num_blocks_override": 80, "max_model_len": 320, "enable_prefix_caching": has_cache}
    async with running_engine(folder, "cpu:2", is_pinned=True, **KINDS, **settings) as served:
        engine, num_moved, num_tries, was_turned = served.engine, count_moved(served), 0, False
        # Now and then all blocks are where they may stay, or a busy machine does all steps meanwhile.
        while not (num_moved.total() and was_turned) and num_tries < 4:
            answers, seen, num_tries = await begin_beyond(engine), list[tuple[float, ...]](), num_tries + 1
            num_preemptions = engine.scheduler.num_preemptions
            for number, share in enumerate((1000, 350, 700, 300) * 3):
                if answers.done():
                    break
                before = engine.fleet.epoch, share_of(engine)
                outcome = await rebalance(served, share)
                if number >= 3 and outcome == "cancelled":  # they have grown: there was too little room
                    assert (engine.fleet.epoch, share_of(engine)) == before
                else:
                    assert outcome == "done" and engine.fleet.epoch == before[0] + 1
                seen.append(share_of(engine))
                for _ in range(8):
                    await next_commit_or(answers, engine)
            if len(seen) > 2:
                assert seen[1] < seen[2] < seen[0] == (1.0, 1.0)
                was_turned = True
            assert await answers == expected[family]
            assert engine.scheduler.num_preemptions == num_preemptions
        assert was_turned and num_moved.total() > 0
        assert await generate_all(engine, PROMPTS, greedy(NUM_TOKENS)) == expected[family]
        await assert_idle(engine)


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("family", FAMILIES)
async def test_rebalances_before_between_and_after_a_drop_and_a_restore(
    family: str, tiny_models: TinyModels, expected: dict[str, list[list[int]]]
) -> None:
    folder = tiny_models.folder(family, **SHAPES[family])
    settings: dict[str, Any] = {"is_pinned": True, "num_blocks_override": 160, "max_model_len": 320}
    async with running_engine(folder, "cpu:2", **KINDS, **settings) as served:
        engine, control = served.engine, served.control
        answers = asyncio.create_task(generate_all(engine, PROMPTS, greedy(NUM_TOKENS)))
        changes = (engine.drop, engine.restore) * 2
        for share, change in zip(DROP_SHARES.get(family, (600, 300, 900, 450)), changes, strict=True):
            for _ in range(20):
                await engine.signals.next_commit()
            assert await rebalance(served, share) == "done"
            await change()
            assert engine.num_running
            await asyncio.wait(control.tasks)
            engine.check()
        assert await rebalance(served, 250) == "done"
        assert await answers == expected[family]
        assert engine.scheduler.num_preemptions == 0
        await assert_idle(engine)


@pytest.mark.usefixtures("patience")
async def test_a_kind_in_use_is_not_taken_away(tiny_models: TinyModels, expected: dict[str, list[list[int]]]) -> None:
    """Full blocks do not fit in what would be left of them: nothing changes."""
    folder = tiny_models.folder("gemma3", **SHAPES["gemma3"])
    async with running_engine(folder, "cpu:1", is_pinned=True, num_blocks_override=60, **KINDS) as served:
        engine, before = served.engine, share_of(served.engine)
        [group] = engine.groups
        assert isinstance(group, MixedGroup)
        answers = asyncio.create_task(generate_all(engine, PROMPTS, greedy(NUM_TOKENS)))
        while group.num_full_used <= 60:
            await engine.signals.next_commit()
        assert await rebalance(served, 1000) == "cancelled"
        assert share_of(engine) == before
        assert await answers == expected["gemma3"]
        await assert_idle(engine)


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("fault", ["1:raise@rebalance.remap", "1:copy-fails@rebalance.shrink"])
async def test_a_rebalance_that_fails_changes_nothing(
    fault: str, tiny_models: TinyModels, expected: dict[str, list[list[int]]]
) -> None:
    folder = tiny_models.folder("gemma3", **SHAPES["gemma3"])
    settings: dict[str, Any] = {"is_pinned": True, "num_blocks_override": 80, "faults": parse_faults(fault)}
    async with running_engine(folder, "cpu:2", enable_prefix_caching=False, **KINDS, **settings) as served:
        engine, before = served.engine, share_of(served.engine)
        answers = await begin_beyond(engine)
        with pytest.raises((DeviceError, RuntimeError)):
            await served.control.reconfigure.rebalance(1000)
        engine.check()
        assert share_of(engine) == before
        assert served.control.reconfigure.transitions.remembered[0].outcome == "rolled back"
        assert await answers == expected["gemma3"]
        await assert_idle(engine)


@pytest.mark.usefixtures("patience")
async def test_the_share_follows_what_is_asked(tiny_models: TinyModels, expected: dict[str, list[list[int]]]) -> None:
    """Eight streams that outgrow their windows, in the memory of five; then many that do not; then the former again."""
    folder, settings = tiny_models.folder("gemma3", **SHAPES["gemma3"]), KINDS | {"windowed_kv_share": None}
    long, short = [random_prompt(10, seed=i) for i in range(8)], [random_prompt(20, seed=i) for i in range(40)]
    async with running_engine(folder, num_blocks_override=88, max_model_len=320, **settings) as served:
        engine = served.engine
        assert share_of(engine) == (1.0,)
        for _ in range(2):
            await generate_all(engine, long, greedy(240))
            share = share_of(engine)
            assert share < (0.7,)
            while share_of(engine) == share:  # it does not turn at once
                await generate_all(engine, short, greedy(12))
            assert share_of(engine) > share
        assert engine.scheduler.num_preemptions + engine.scheduler.swapped.num_swaps == 0
        assert {t.kind for t in served.control.reconfigure.transitions.remembered} == {"rebalance"}
        assert await generate_all(engine, PROMPTS, greedy(NUM_TOKENS)) == expected["gemma3"]
        await assert_idle(engine)


@pytest.mark.usefixtures("patience")
async def test_memory_moves_before_weights_are_dropped(
    tiny_models: TinyModels, expected: dict[str, list[list[int]]]
) -> None:
    folder, settings = tiny_models.folder("gemma3", **SHAPES["gemma3"]), KINDS | {"windowed_kv_share": None}
    async with running_engine(folder, "cpu:2", num_blocks_override=40, max_model_len=320, **settings) as served:
        assert await generate_all(served.engine, PROMPTS * 2, greedy(NUM_TOKENS)) == expected["gemma3"] * 2
        assert served.control.reconfigure.transitions.remembered[0].kind == "rebalance"
        assert max(share_of(served.engine)) < 1
        await assert_idle(served.engine)


@pytest.mark.usefixtures("patience")
async def test_after_a_loss_memory_moves_for_the_longest_request(tiny_models: TinyModels) -> None:
    """What is left of a chain holds it with a lower share alone: it is served, and the share follows."""
    folder, settings = tiny_models.folder("gemma2", **SHAPES["gemma2"]), KINDS | {"windowed_kv_share": None}
    sizes: dict[str, Any] = {"num_blocks_override": 40, "max_model_len": 960, "pipeline_parallel_size": 2}
    prompt = random_prompt(880, seed=3)
    async with running_engine(folder, "cpu:2", **sizes, **settings) as served:
        engine = served.engine
        assert share_of(engine) == (1.0,)
        expected = await generate(engine, prompt, greedy(20))
        engine.device_health.lose(1, "the test says so")
        while len(engine.groups[0].stages) == 2:
            await engine.signals.next_commit()
        [group] = engine.groups
        assert group.num_blocks < group.blocks_for(900)
        assert await generate(engine, prompt, greedy(20)) == expected
        assert [t.kind for t in served.control.reconfigure.transitions.remembered] == ["lose", "rebalance"]
        assert group.num_blocks >= group.blocks_for(900) and share_of(engine) < (1.0,)
        await assert_idle(engine)
