from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from cost_models import COST

from kunserve.planner.cost import CostModel, TokenSpan, Work
from kunserve.planner.cost_fit import HELD_OUT, Measurement, adapt, fit, relative_errors


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


def own(
    cost: CostModel, num_microbatches: int, *, with_prompts: bool = True, noise: float = 0.0
) -> list[list[Measurement]]:
    """Microbatches of one device, and then of a chain of two, as long as `cost` says, give or take `noise`."""
    rng, microbatches = random.Random(5), []
    for i in range(num_microbatches):
        spans = [TokenSpan(rng.randrange(1500), 1, 1) for _ in range(rng.choice((1, 3, 10, 40)))]
        if with_prompts:
            spans += [TokenSpan(rng.choice((0, 700)), rng.randrange(8, 400), 1) for _ in range(rng.choice((0, 1, 2)))]
        work = Work.of(spans)
        stages = [(30, True, True)] if i < num_microbatches // 2 else [(18, True, False), (12, False, True)]
        steps = []
        for layers, is_first, is_last in stages:
            seconds = cost.work_time(layers, work, is_first, is_last) * rng.lognormvariate(0, noise)
            steps.append(Measurement(layers, work, is_first, is_last, seconds))
        microbatches.append(steps)
    return microbatches


WRONG = [
    {"token_s": 3e-4},
    {"token_s": 3e-5, "load_s": 5e-3},
    {"pair_s": 5e-8, "head_row_s": 3e-3},
    {"head_load_s": 2e-2, "stage_s": 0.0},
]


@pytest.mark.parametrize("overlap", [1.0, 4.0])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: "-".join(wrong))
def test_wrong_constants_are_corrected_by_own_steps(wrong: dict[str, float], overlap: float) -> None:
    right = replace(COST, overlap=overlap)
    adapted = adapt(replace(right, **wrong), own(right, 200))
    assert adapted is not None and adapted.error < 0.02 and adapted.error < adapted.error_before / 3
    for name in set(wrong) - {"stage_s"}:  # of next to nothing: others can take its place
        assert getattr(adapted.cost, name) == pytest.approx(getattr(right, name), rel=0.1), name
    everything = [step for stages in own(right, 60) for step in stages]
    assert np.max(relative_errors(adapted.cost, everything)) < 0.1


def test_own_steps_that_scatter_correct_constants() -> None:
    adapted = adapt(replace(COST, token_s=4 * COST.token_s), own(COST, 200, noise=0.2))
    assert adapted is not None and adapted.cost.token_s == pytest.approx(COST.token_s, rel=0.15)


def test_what_own_steps_do_not_depend_on_stays() -> None:
    """Nobody has sent a long prompt: nothing is known of pairs, and of tokens only together with all else."""
    wrong = replace(COST, load_s=4 * COST.load_s, pair_s=0.3 * COST.pair_s, embed_token_s=9 * COST.embed_token_s)
    adapted = adapt(wrong, own(COST, 200, with_prompts=False))
    assert adapted is not None and adapted.error < 0.02
    assert adapted.cost.load_s == pytest.approx(COST.load_s, rel=0.15)
    assert adapted.cost.pair_s == pytest.approx(wrong.pair_s, rel=0.05)
    assert adapted.cost.embed_token_s == pytest.approx(wrong.embed_token_s, rel=0.05)
    assert adapted.cost.overlap == wrong.overlap


def test_constants_that_are_right_stay_however_steps_scatter() -> None:
    assert adapt(COST, own(COST, 200, noise=0.2)) is None


def test_constants_that_predict_what_is_held_out_worse_are_refused() -> None:
    """Steps that are held out are as `COST` says, the others four times as long."""
    steps = own(COST, 90)
    slow = [
        stages if i % HELD_OUT == 0 else [s._replace(seconds=4 * s.seconds) for s in stages]
        for i, stages in enumerate(steps)
    ]
    assert adapt(COST, slow) is None
    assert adapt(replace(COST, load_s=1.0), slow) is not None  # better than that it is


def test_too_few_steps_say_nothing() -> None:
    assert adapt(replace(COST, load_s=1.0), []) is None
    assert adapt(replace(COST, load_s=1.0), own(COST, 1)) is None
