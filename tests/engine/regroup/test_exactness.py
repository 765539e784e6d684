"""Nobody notices: whatever regroups at whatever step, tokens, text and logprobs are those of an undisturbed server."""

from __future__ import annotations

import asyncio
import os
import random
from functools import partial
from pathlib import Path

import pytest
from seeds import seeds
from transition_harness import (
    Answer,
    again,
    answer_while,
    checked_engine,
    make_requests,
    regroup_forever,
    regroup_in_order,
    with_stop_strings,
)

from kunserve.engine.request import Request
from kunserve.sampling import FinishReason

SEEDS = seeds(50 if os.environ.get("KUNSERVE_ALL_FAULTS") else 16)  # all by `make test-faults`
ROOMY, TIGHT = 1280, 128  # blocks of all devices together; all requests at once hold about 250


@pytest.fixture(scope="module")
def undisturbed(six_layers: Path) -> tuple[list[Request], list[Answer]]:
    """64 requests, and what one device answers that has room for all of them."""

    async def ask() -> tuple[list[Request], list[Answer]]:
        async with checked_engine(six_layers, "cpu:1", ROOMY, async_scheduling=False) as checked:
            requests = make_requests(64, longest_prompt=20, most_tokens=9)
            requests = with_stop_strings(requests, await checked.answer_all(requests))
            answers = await checked.answer_all(requests)
            await checked.until_no_step_runs()
            checked.assert_idle()
        return again(requests), answers

    return asyncio.run(ask())


def test_the_requests_are_mixed(undisturbed: tuple[list[Request], list[Answer]]) -> None:
    requests, answers = undisturbed
    stopped = [a for r, a in zip(requests, answers, strict=True) if a.finish and a.finish[1] in r.params.stop]
    assert len(stopped) >= 15
    assert sum(1 for r in requests if not r.params.temperature) >= 15
    assert sum(len(a.logprobs) for a in answers) >= 50
    assert {a.finish[0] for a in answers if a.finish} == {FinishReason.STOP, FinishReason.LENGTH}


@pytest.mark.drawn
@pytest.mark.parametrize("num_blocks", [ROOMY, TIGHT])
@pytest.mark.parametrize("devices", ["cpu:2", "cpu:4"])
async def test_regrouping_changes_no_answer(
    devices: str, num_blocks: int, six_layers: Path, undisturbed: tuple[list[Request], list[Answer]]
) -> None:
    requests, expected = undisturbed
    async with checked_engine(six_layers, devices, num_blocks // int(devices[-1])) as checked:
        for seed in SEEDS[num_blocks == TIGHT :: 2]:
            regroup = partial(regroup_in_order if seed % 4 > 1 else regroup_forever, checked, random.Random(seed))
            answers = await answer_while(checked, again(requests), regroup)
            for answer, its in zip(answers, expected, strict=True):
                answer.assert_same(its)
            await checked.undo_drops()
        # Otherwise nothing was shown. How often each of them happens depends on how threads run.
        for kind, outcome, mode in (
            ("drop", "done", "by_request"),
            ("restore", "done", "by_request"),
            ("restore", "cancelled", None),
        ):
            assert checked.num_outcomes(kind, outcome, mode) > 0
        # While most of the memory is KV, a chain of four holds less than two of two, and is refused.
        assert set(checked.steps) >= ({1, 2, 4} if devices == "cpu:4" and num_blocks == TIGHT else {1, 2})
