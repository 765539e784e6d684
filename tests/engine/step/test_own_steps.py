"""What a server keeps of its own steps, and what it learns of them."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from cost_models import COST
from groups import LAYERS, make_group, make_request
from structlog.testing import capture_logs

from kunserve.engine.batch import NOBODY, Decoding, Microbatch, Span
from kunserve.engine.group import Group
from kunserve.engine.step import own_steps
from kunserve.engine.step.own_steps import LEAST_NEW, MOST_KINDS, OF_A_KIND, OwnSteps
from kunserve.planner.cost import TokenSpan, Work
from kunserve.planner.cost_fit import Measurement
from kunserve.planner.microbatch import Lookahead
from kunserve.sim.clock import simulate


def microbatch(num_decoding: int, *prompts: int, length: int = 100) -> Microbatch:
    """Requests that decode, then new prompts of so many tokens."""
    requests = [make_request(f"r{i}", length, 9) for i in range(num_decoding)]
    decoding = Decoding(requests, [length] * num_decoding) if requests else NOBODY
    spans = (Span(make_request(f"p{i}", n, 9), 0, n, True) for i, n in enumerate(prompts))
    return Microbatch(0, 0, tuple(spans), decoding)


def run(steps: OwnSteps, group: Group, batch: Microbatch, times: int = 1, seconds: float = 1.0) -> int:
    """Let a microbatch pass so often; returns how often it was measured."""
    num_measured = 0
    for _ in range(times):
        if (stage_s := steps.place(group, batch)) is not None:
            assert stage_s == [0.0] * len(group.stages)
            steps.keep(group, batch, [seconds] * len(stage_s))
            num_measured += 1
    return num_measured


async def kept(steps: OwnSteps, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Measurement, ...]]:
    """Return what a fit would look at."""
    seen: list[tuple[Measurement, ...]] = []
    monkeypatch.setattr(own_steps, "adapt", lambda cost, microbatches: seen.extend(microbatches))
    await steps.fit()
    return seen


def new_steps(shares_head: bool = False, **more: Any) -> OwnSteps:
    return OwnSteps(Lookahead(COST, LAYERS, 64), shares_head=shares_head, **more)


async def test_a_long_decode_pushes_no_prompt_out_and_is_measured_ever_more_seldom(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps, group = new_steps(), make_group()
    for length in (5, 20, 60):
        run(steps, group, microbatch(3, length), OF_A_KIND)
    num_measured = run(steps, group, microbatch(4), 3000)
    assert OF_A_KIND < num_measured < 0.05 * 3000
    work = Counter(step.work.num_tokens for (step,) in await kept(steps, monkeypatch))
    assert work == dict.fromkeys((8, 23, 63, 4), OF_A_KIND)


async def test_what_is_kept_is_of_all_times(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, group = new_steps(), make_group()
    for i in range(1000):
        run(steps, group, microbatch(4), seconds=1.0 + i)
    seconds = sorted(step.seconds for (step,) in await kept(steps, monkeypatch))
    assert seconds[0] < 500 < seconds[-1] and len(set(seconds)) == OF_A_KIND
    # After a fit, new ones take their places again, soon.
    assert run(steps, group, microbatch(4), 8 * OF_A_KIND, seconds=0.5) > OF_A_KIND
    assert sum(step.seconds == 0.5 for (step,) in await kept(steps, monkeypatch)) > OF_A_KIND / 2


async def test_memory_is_bounded_and_what_came_longest_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, group = new_steps(), make_group()
    for num_decoding in range(8):
        for i in range(10):
            run(steps, group, microbatch(2**num_decoding, 2**i), OF_A_KIND + 3)
            run(steps, group, microbatch(1), 1)  # comes again and again
    assert len(steps) <= MOST_KINDS * OF_A_KIND
    sizes = {(step.work.num_spans, step.work.num_tokens) for (step,) in await kept(steps, monkeypatch)}
    assert len(sizes) == MOST_KINDS and {(1, 1), (129, 128 + 512)} <= sizes and (2, 2) not in sizes


@pytest.mark.parametrize("shares_head", [False, True])
async def test_each_stage_is_measured_with_its_part_of_the_head(
    shares_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, group, batch = new_steps(shares_head), make_group(num_stages=4), microbatch(3, 10, 20)
    assert steps.place(group, batch) == [0.0] * 4
    steps.keep(group, batch, [0.1, 0.2, 0.3, 0.4])
    [stages] = await kept(steps, monkeypatch)
    assert [stage.seconds for stage in stages] == [0.1, 0.2, 0.3, 0.4]
    assert {stage.num_layers for stage in stages} == {LAYERS // 4}
    assert [stage.is_first for stage in stages] == [True, False, False, False]
    assert [stage.head_share for stage in stages] == ([0.5, 0.0, 0.0, 0.5] if shares_head else [0.0, 0.0, 0.0, 1.0])
    whole = Work.of([TokenSpan(99, 1, 1)] * 3 + [TokenSpan(0, 10, 1), TokenSpan(0, 20, 1)])
    assert all(stage.work == whole for stage in stages)


async def test_an_executor_that_does_not_say_how_long_teaches_nothing() -> None:
    steps, group = new_steps(fit_s=0.0), make_group()
    for _ in range(2 * LEAST_NEW):
        assert not steps.keep(group, microbatch(2), [0.0])
    assert len(steps) == 0


def test_a_fit_comes_after_a_while_and_enough_new_steps() -> None:
    async def main() -> None:
        steps, group = new_steps(fit_s=30.0), make_group()

        def pass_one(i: int) -> bool:
            batch = microbatch(1, 2 ** (i % 10))
            return steps.place(group, batch) is not None and steps.keep(group, batch, [0.1])

        assert not any(map(pass_one, range(LEAST_NEW)))
        await asyncio.sleep(29)
        assert not pass_one(0)
        await asyncio.sleep(1)
        assert pass_one(1)

    simulate(main())


async def test_constants_that_are_clearly_better_are_taken_and_said() -> None:
    right = replace(COST, overlap=4.0)
    wrong = replace(right, load_s=5 * COST.load_s, token_s=0.3 * COST.token_s)
    lookahead, group = Lookahead(wrong, LAYERS, 2048, "derived: a guess"), make_group()
    steps, least_before = OwnSteps(lookahead, shares_head=False), lookahead.least_tokens
    for num_decoding in (0, 1, 5, 20, 60):
        for prompts in ((), (30,), (200, 90), (500,)):
            if not (num_decoding or prompts):
                continue
            batch = microbatch(num_decoding, *prompts, length=300)
            work = Work.of(TokenSpan(s.start, s.end - s.start, int(s.samples)) for s in batch.spans)
            run(steps, group, batch, 6, right.work_time(LAYERS, work, True, True))
    with capture_logs() as logs:
        await steps.fit()
    [line] = logs
    assert line["log_level"] == "info" and line["error"] < 0.1 * line["error_before"] and line["held_out"] > 20
    assert lookahead.cost.load_s == pytest.approx(COST.load_s, rel=0.2)
    assert lookahead.source == "own steps, at first derived: a guess"
    assert lookahead.least_tokens < least_before


async def test_an_error_in_a_fit_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(cost: object, microbatches: object) -> None:
        raise ArithmeticError("no solution")

    lookahead = Lookahead(COST, LAYERS, 64)
    steps = OwnSteps(lookahead, shares_head=False)
    monkeypatch.setattr(own_steps, "adapt", fail)
    with capture_logs() as logs:
        await steps.fit()
    assert [line["log_level"] for line in logs] == ["error"]
    assert lookahead.cost is COST and math.isfinite(steps._next_fit_s)
