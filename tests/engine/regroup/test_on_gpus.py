"""Transitions, and what survives, on GPUs whose work waits in streams: answers are those of one CPU device."""

from __future__ import annotations

import asyncio
import os
import random
from functools import partial
from pathlib import Path

import pytest
from fake_gpus import Gpus
from fake_timeline import TIMELINE
from on_gpus import CONFIGURATIONS, in_place_of_cpus
from transition_harness import Answer, again, answer_while, checked_engine, make_requests, regroup_in_order

from kunserve.faults import parse_faults

REQUESTS = make_requests(8, seed=4, longest_prompt=20, most_tokens=16)
NUM_BLOCKS = 320


@pytest.fixture(scope="module")
def expected(six_layers: Path) -> list[Answer]:
    """What an undisturbed CPU device answers."""

    async def ask() -> list[Answer]:
        async with checked_engine(six_layers, "cpu:1", NUM_BLOCKS) as checked:
            return await checked.answer_all(again(REQUESTS))

    return asyncio.run(ask())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("seed", range(int(os.environ.get("KUNSERVE_FAKE_GPU_ORDERS", "1"))))
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
async def test_regrouping_and_a_loss_change_no_answer(
    configuration: str, seed: int, gpus: Gpus, six_layers: Path, expected: list[Answer]
) -> None:
    """Drops, restores, some of them cancelled, while requests run; then one of the devices is lost in a step."""
    TIMELINE.begin(seed)
    with in_place_of_cpus(gpus, configuration):
        await regroup_and_lose(six_layers, expected, random.Random(seed + 1))


@pytest.mark.usefixtures("kernels")
async def test_a_gpu_that_fails_at_all_work_is_lost_and_its_chain_is_not(
    gpus: Gpus, six_layers: Path, expected: list[Answer]
) -> None:
    """Nobody's answer changes: the error says on which GPU, which then fails at the simplest, too."""
    with in_place_of_cpus(gpus, "through the host"):
        faults = parse_faults("1:raise-always@0.05s")
        async with checked_engine(six_layers, "cpu:2", NUM_BLOCKS, faults=faults) as checked:
            await checked.control.drop()
            await checked.settled()
            for answer, its in zip(await checked.answer_all(again(REQUESTS)), expected, strict=True):
                answer.assert_same(its)
            await checked.rebuilt()
            assert [device["state"] for device in checked.engine.state()["devices"]] == ["ok", "lost"]


async def regroup_and_lose(folder: Path, expected: list[Answer], rng: random.Random) -> None:
    async with checked_engine(folder, "cpu:2", NUM_BLOCKS) as checked:
        assert checked.machine.device_name == "GPU 0 that is not there"
        answers = await answer_while(checked, again(REQUESTS), partial(regroup_in_order, checked, rng))
        for answer, its in zip(answers, expected, strict=True):
            answer.assert_same(its)
        assert checked.num_outcomes("drop", "done") > 0 and checked.steps.keys() == {1, 2}
        await checked.undo_drops()
        answering = asyncio.ensure_future(checked.answer_all(again(REQUESTS)))
        await checked.commits(4)
        checked.engine.device_health.lose(1, "the test says so")
        for answer, its in zip(await answering, expected, strict=True):
            answer.assert_same(its)
        await checked.rebuilt()
        assert [[stage.device for stage in group.stages] for group in checked.engine.groups] == [[0]]
