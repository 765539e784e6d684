"""Whatever comes in whatever order, for thousands of steps: arrivals, clients that leave, regroupings, failures."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from seeds import seeds
from transition_harness import (
    Answer,
    Checked,
    Failures,
    again,
    checked_engine,
    make_requests,
    regroup_forever,
)

from kunserve.engine.request import Request
from kunserve.errors import DeviceError
from kunserve.sampling import FinishReason

MOST_SEEDS = 24  # a busy machine needs more of them
NUM_STEPS = 2000  # at least
NUM_REQUESTS = 200  # of each seed


async def ask_at_random(checked: Checked, requests: Sequence[Request], rng: random.Random) -> list[Answer]:
    """Bursts and pauses, so that memory is short now and plenty then; one in six clients leaves at any moment."""
    answers = []
    for request in requests:
        answers.append(asyncio.create_task(_ask(checked, request, rng.randrange(12) if rng.random() < 0.16 else None)))
        if rng.random() < 0.1:
            least = rng.randrange(20)
            while checked.engine.num_running > least:
                await checked.commits(1)
    return await asyncio.gather(*answers)


async def _ask(checked: Checked, request: Request, leaves_after: int | None) -> Answer:
    answering = asyncio.create_task(checked.answer(request))
    for _ in range(leaves_after or 0):
        waiting = asyncio.create_task(checked.commits(1))
        await asyncio.wait([answering, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
    if leaves_after is not None:
        await asyncio.sleep(0)  # it has been submitted
        checked.engine.abort(request.request_id)
    return await answering


async def regroup_with_failures(checked: Checked, rng: random.Random) -> None:
    """As `regroup_forever`, and a transition that fails is only an experience."""
    while True:
        with suppress(DeviceError, OSError):
            await regroup_forever(checked, rng)


def is_shown(checked: Checked, failures: Failures, num_left: int) -> bool:
    """Whether enough happened. How often each thing does depends on how threads run."""
    return (
        num_left >= 50
        and len(failures.failed) >= 25
        and checked.steps.total() >= NUM_STEPS
        and len(checked.steps) >= 3
        and checked.num_outcomes("drop", "done", "by_request") >= 15
        and checked.num_outcomes("restore", "done", "by_request") >= 15
    )


@pytest.mark.long
@pytest.mark.drawn
async def test_everything_at_random(six_layers: Path) -> None:
    num_left = 0
    async with checked_engine(six_layers, "cpu:4", 96, max_num_seqs=6, max_num_batched_tokens=24) as checked:
        failures = Failures(checked.engine)
        for seed in seeds(MOST_SEEDS):
            if is_shown(checked, failures, num_left):
                break
            requests = make_requests(NUM_REQUESTS, seed)
            async with checked_engine(six_layers, "cpu:1", 4000, async_scheduling=False) as undisturbed:
                expected = await undisturbed.answer_all(again(requests))
            failures.begin(0.01, random.Random(seed))
            asking = asyncio.create_task(ask_at_random(checked, again(requests), random.Random(seed)))
            regrouping = asyncio.create_task(regroup_with_failures(checked, random.Random(seed)))
            answers = await asking
            regrouping.cancel()
            with suppress(asyncio.CancelledError):
                await regrouping
            failures.begin(0.0, random.Random(seed))
            for answer, its in zip(answers, expected, strict=True):
                if answer.finish == (FinishReason.ABORT, None):  # exactly one final output, and a true beginning
                    num_left += 1
                    assert answer.token_ids == its.token_ids[: len(answer.token_ids)]
                else:
                    answer.assert_same(its)
            await checked.undo_drops()
        assert is_shown(checked, failures, num_left)
