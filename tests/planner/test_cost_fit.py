from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from cost_models import COST

from kunserve.planner.cost import CostModel, TokenSpan, Work
from kunserve.planner.cost_fit import Measurement, fit, relative_errors


def measured(cost: CostModel, num_steps: int, noise: float = 0.0) -> list[Measurement]:
    """Steps of every kind, as long as `cost` says, give or take `noise`."""
    rng, steps = random.Random(3), []
    for _ in range(num_steps):
        layers, is_last = rng.randrange(2, 30), rng.random() < 0.5
        spans = [TokenSpan(rng.randrange(1500), 1, rng.randrange(2)) for _ in range(rng.choice((0, 1, 3, 10, 40)))]
        spans += [TokenSpan(rng.choice((0, 700)), rng.randrange(8, 400)) for _ in range(rng.choice((0, 1, 2)))]
        work = Work.of(spans or [TokenSpan(5, 1, 1)])
        seconds = cost.work_time(layers, work, True, is_last) * rng.lognormvariate(0, noise)
        steps.append(Measurement(layers, work, True, is_last, seconds))
    return steps


@pytest.mark.parametrize("overlap", [1.0, 2.0, 8.0])
def test_known_constants_are_found(overlap: float) -> None:
    cost = replace(COST, load_s=16 * COST.token_s, head_load_s=8 * COST.head_row_s, sample_s=0.0, overlap=overlap)
    found = fit(measured(cost, 120), (1.0, overlap, 3.0))
    assert found.overlap == overlap
    for name, value in cost.to_dict().items():
        assert getattr(found, name) == pytest.approx(value, rel=0.02, abs=2e-6), name


def test_noise_is_averaged_out() -> None:
    cost = replace(COST, overlap=2.0)
    found = fit(measured(cost, 120, noise=0.05), (1.0, 2.0))
    errors = relative_errors(found, measured(cost, 60))
    assert np.median(errors) < 0.03 and np.max(errors) < 0.15
    assert min(found.to_dict().values()) >= 0


def test_the_sum_does_not_fit_a_roofline() -> None:
    steps = measured(replace(COST, load_s=32 * COST.token_s, overlap=8.0), 120)
    sums, overlapped = (relative_errors(fit(steps, overlaps), steps) for overlaps in ((1.0,), (8.0,)))
    assert np.quantile(sums, 0.9) > 5 * np.quantile(overlapped, 0.9)
