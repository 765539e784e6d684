"""Synthetic workloads have the published means, and bursts where they should be."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.random import default_rng

from kunserve.sim.workload import WORKLOADS, Arrivals, Burst, Lengths, synthesize


@pytest.mark.parametrize(
    ("name", "prompt", "output", "longest"),
    [("burstgpt", 642, 262, 8192), ("sharegpt", 1660, 373, 4096), ("longbench", 5900, 499, 16384)],
)
def test_lengths_have_the_published_means(name: str, prompt: float, output: float, longest: int) -> None:
    prompts = WORKLOADS[name].prompt.draw(40_000, default_rng(0))
    outputs = WORKLOADS[name].output.draw(40_000, default_rng(1))
    assert prompts.mean() == pytest.approx(prompt, rel=0.03)
    assert outputs.mean() == pytest.approx(output, rel=0.03)
    assert prompts.min() >= 1 and prompts.max() <= longest


def test_lengths_are_cut() -> None:
    assert Lengths(90, 3.0, 100).draw(1000, default_rng(0)).max() == 100


def test_a_burst_raises_the_rate_and_keeps_the_average() -> None:
    arrivals = Arrivals((Burst(100, 100, 3.0),))
    times = np.array(arrivals.draw(20.0, 400.0, default_rng(0)))
    assert len(times) == pytest.approx(8000, rel=0.05)
    inside = ((times >= 100) & (times < 200)).sum()
    assert inside / (len(times) - inside) == pytest.approx(3 * 100 / 300, rel=0.1)


def test_bursts_begin_at_second_45_and_come_twice_in_640() -> None:
    bursts = Arrivals.burstgpt(640, default_rng(3)).bursts
    assert len(bursts) == 2 and bursts[0].start_s == 45 and 320 < bursts[1].start_s < 640
    assert len(Arrivals.burstgpt(128, default_rng(3)).bursts) == 1


def test_rows_follow_from_the_seed_and_lengths_may_come_from_a_file() -> None:
    arrivals = Arrivals.burstgpt(60, default_rng(0))
    workload = WORKLOADS["burstgpt"]
    rows = synthesize(workload, arrivals, 5.0, 60.0, seed=1)
    assert (
        rows == synthesize(workload, arrivals, 5.0, 60.0, seed=1) != synthesize(workload, arrivals, 5.0, 60.0, seed=2)
    )
    given = synthesize(workload, arrivals, 5.0, 60.0, seed=1, lengths=[(7, 8)])
    assert {(row.num_prompt_tokens, row.num_output_tokens) for row in given} == {(7, 8)}
    assert [row.at_s for row in given] == [row.at_s for row in rows]
