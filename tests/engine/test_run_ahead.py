"""When a device gets its next microbatch: shortly before it is done, so that nobody who comes meanwhile waits twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from cost_models import COST
from groups import commit, make_group, make_request

from kunserve.engine.batch import Microbatch
from kunserve.engine.dispatch import Dispatch
from kunserve.engine.fleet import Fleet
from kunserve.engine.run_ahead import HOST_S, LEARNING_RATE, MARGIN, RunAhead
from kunserve.engine.schedule.policy import make_policy
from kunserve.engine.schedule.scheduler import Scheduler, SchedulerLimits
from kunserve.engine.signals import Signals
from kunserve.planner.cost import CostModel, TokenSpan, Work
from kunserve.planner.microbatch import Lookahead
from kunserve.policies import OverloadPolicy
from kunserve.sim.clock import simulate

LAYERS = 60  # of the cost model: a prompt of 16 tokens takes 0.2 s
LOOKAHEAD = Lookahead(COST, LAYERS, 64)


class Steps:
    """A dispatch of one group, and the steps that it hands out; they end when a test says so."""

    def __init__(self, num_stages: int = 1, lookahead: Lookahead | None = LOOKAHEAD) -> None:
        self.group = make_group(num_stages=num_stages, num_blocks=200)
        fleet, self.signals = Fleet([self.group]), Signals()
        limits, policy = SchedulerLimits(64, 64, num_ahead=1), make_policy(OverloadPolicy.RECOMPUTE, 0)
        self.scheduler = Scheduler(fleet, limits, policy, lookahead=lookahead)
        self.dispatch = Dispatch(fleet, self.scheduler, self.signals)

    def ask(self, name: str, num_prompt: int = 16) -> None:
        self.scheduler.waiting.append(make_request(name, num_prompt, 20))
        self.signals.wake_for_queue()

    def begin(self) -> float:
        """Launch a first step; returns how long it is expected to take."""
        self.ask("a")
        assert self.launched() == [["a"]]
        return expected_s(self.group.in_flight[0])

    def launched(self) -> list[list[str]]:
        """Who is in the microbatches that can go now."""
        batches = self.dispatch.batches(self.dispatch.take_changed())
        return [[span.request.request_id for span in batch.spans] for _, batch in batches]

    def end(self) -> None:
        commit(self.scheduler, self.group, self.group.in_flight[0])
        self.dispatch.came_back(self.group)
        self.signals.wake(self.group)


def expected_s(batch: Microbatch) -> float:
    work = Work.of(TokenSpan(span.start, span.end - span.start, int(span.samples)) for span in batch.spans)
    return LOOKAHEAD.time(work)


async def woken_at(steps: Steps) -> float:
    await steps.signals.woken()
    return asyncio.get_running_loop().time()


def test_whoever_comes_while_a_step_runs_is_in_the_next() -> None:
    async def main() -> None:
        steps = Steps()
        step_s = steps.begin()
        assert MARGIN * step_s > HOST_S
        await asyncio.sleep(step_s / 2)
        steps.ask("b")
        assert steps.launched() == []
        assert await woken_at(steps) == pytest.approx((1 - MARGIN) * step_s)
        assert steps.launched() == [["a", "b"]]
        assert [span.is_ahead for span in steps.group.in_flight[1].spans] == [True, False]
        steps.ask("c")
        assert steps.launched() == []  # one is enough to go on with

    simulate(main())


def test_steps_that_take_longer_than_predicted_move_the_time() -> None:
    async def main() -> None:
        steps = Steps()
        first_s = steps.begin()
        assert await woken_at(steps) == pytest.approx((1 - MARGIN) * first_s)
        assert steps.launched() == [["a"]]
        await asyncio.sleep(3 * first_s - (1 - MARGIN) * first_s)
        steps.end()
        assert steps.launched() == []
        slowness = 1 + LEARNING_RATE * (3 - 1)
        second_s = slowness * expected_s(steps.group.in_flight[0])
        assert await woken_at(steps) == pytest.approx(3 * first_s + second_s - max(HOST_S, MARGIN * second_s))
        assert steps.launched() == [["a"]]

    simulate(main())


def rest_after(num_steps: int, error: float) -> float:
    """For what share of a step a microbatch waits behind it after so many, each this share too long or too short."""

    async def main() -> float:
        loop, due_s, steps = asyncio.get_running_loop(), list[float](), Steps()
        run_ahead, predicted_s = RunAhead(LOOKAHEAD, lambda _: due_s.append(loop.time())), steps.begin()
        for number in range(num_steps):
            run_ahead.began(steps.group)
            await asyncio.sleep(predicted_s * (1 + (-error if number % 2 else error)))
            run_ahead.ended(steps.group)
        began_s = loop.time()
        run_ahead.began(steps.group)
        await asyncio.sleep(predicted_s)
        return (began_s + predicted_s - due_s[-1]) / predicted_s

    return simulate(main())


def test_the_better_predictions_are_the_later_it_is_time() -> None:
    assert rest_after(0, 0.0) == pytest.approx(MARGIN)
    assert rest_after(40, 0.0) < 0.4 * MARGIN  # what the host needs is left
    assert rest_after(40, 0.0) < rest_after(40, 0.05) < rest_after(40, 0.4)


def test_a_step_that_ends_early_is_followed_at_once() -> None:
    async def main() -> None:
        steps = Steps()
        step_s = steps.begin()
        await asyncio.sleep(step_s / 4)
        steps.ask("b", 60)
        steps.end()
        assert steps.launched() == [["a", "b"]]
        await asyncio.sleep(step_s)  # beyond the time that the first one's next was due
        steps.ask("c")
        assert steps.launched() == []

    simulate(main())


def due_after(factor: float) -> list[float]:
    """When it is time for the next one, in three steps after some that took three times as long as predicted.

    Before these three, constants become so many times as large.
    """

    async def main() -> list[float]:
        lookahead, due_s = Lookahead(COST, LAYERS, 64), []
        steps = Steps(lookahead=lookahead)
        step_s = 3 * steps.begin()
        for number in range(11):
            began_s = asyncio.get_running_loop().time()
            due_s.append(await woken_at(steps) - began_s)
            if number == 7:
                constants = {name: value * factor for name, value in COST.to_dict().items()}
                lookahead.learn(CostModel(**constants | {"overlap": 1.0}), "own steps")
            await asyncio.sleep(began_s + step_s - asyncio.get_running_loop().time())
            steps.end()
            assert steps.launched() == [["a"]]
        return due_s[-3:]

    return simulate(main())


def test_with_other_constants_the_same_is_expected_of_a_step_as_before() -> None:
    """Whatever makes steps slower than predicted goes on, and what has been learned of it counts."""
    unchanged = pytest.approx(due_after(1.0))
    assert due_after(4.0) == unchanged and due_after(0.1) == unchanged


@pytest.mark.parametrize(
    "steps",
    [
        lambda: Steps(lookahead=None),
        lambda: Steps(num_stages=2),
        lambda: Steps(lookahead=Lookahead(COST, 2, 64)),  # steps shorter than the host needs
    ],
)
def test_without_a_prediction_in_chains_and_for_short_steps_it_is_always_time(steps: Callable[[], Steps]) -> None:
    async def main() -> None:
        made = steps()
        for name in ("a", "b"):
            made.ask(name, 4)
        made.launched()
        assert made.group.num_in_flight == len(made.group.stages) + 1

    simulate(main())
