from __future__ import annotations

import random

import pytest
from seeds import seeds

from kunserve.planner.demand import Demand, OutputLengthEstimate, RequestView, measure_demand

ESTIMATE = OutputLengthEstimate(mean_tokens=100.0)


def test_running_request_grows_to_the_estimate() -> None:
    running = [RequestView(num_tokens=90, num_output_tokens=30, max_tokens=500, num_blocks=6)]
    assert measure_demand(running, [], ESTIMATE, 16) == Demand(in_use=6, prompts=0, growth=4)  # 160 tokens


def test_max_tokens_bound_the_growth() -> None:
    running = [RequestView(num_tokens=90, num_output_tokens=30, max_tokens=36, num_blocks=6)]
    assert measure_demand(running, [], ESTIMATE, 16).growth == 0  # 96 tokens


def test_request_that_outlived_the_estimate_still_grows_a_little() -> None:
    running = [RequestView(num_tokens=320, num_output_tokens=300, max_tokens=500, num_blocks=20)]
    assert measure_demand(running, [], ESTIMATE, 16, min_growth=17).growth == 2


def test_waiting_prompt_and_its_growth() -> None:
    waiting = [RequestView(num_tokens=33, num_output_tokens=0, max_tokens=40)]
    demand = measure_demand([], waiting, ESTIMATE, 16)
    assert demand == Demand(in_use=0, prompts=3, growth=2)
    assert demand.blocks == 5


def test_partly_prefilled_prompt_counts_in_full() -> None:
    running = [RequestView(num_tokens=160, num_output_tokens=0, max_tokens=0, num_blocks=2)]
    assert measure_demand(running, [], ESTIMATE, 16) == Demand(in_use=2, prompts=0, growth=8)


@pytest.mark.parametrize("seed", seeds(20))
def test_sum_over_requests_of_what_each_will_hold(seed: int) -> None:
    rng = random.Random(seed)
    views = [
        RequestView(output + rng.randint(1, 99), output, output + rng.randint(0, 99), rng.randint(0, 20))
        for output in [rng.randint(0, 300) for _ in range(30)]
    ]
    waiting = [view._replace(num_blocks=0) for view in views[15:]]
    total = 0
    for view in views[:15] + waiting:
        expected = max(100 - view.num_output_tokens, 16)
        tokens = view.num_tokens + min(view.most_remaining, expected)
        total += max(view.num_blocks, (tokens + 15) // 16)
    assert measure_demand(views[:15], waiting, ESTIMATE, 16).blocks == total


def test_estimate_follows_the_traffic() -> None:
    estimate = OutputLengthEstimate(mean_tokens=100.0, window=32)
    for _ in range(300):
        estimate = estimate.finished(10)
    assert estimate.mean_tokens == pytest.approx(10, abs=0.1)
    for _ in range(300):
        estimate = estimate.finished(400)
    assert estimate.mean_tokens == pytest.approx(400, abs=1)


def test_one_request_does_not_turn_the_estimate() -> None:
    assert OutputLengthEstimate(mean_tokens=100.0).finished(1).mean_tokens == pytest.approx(89)
