"""Constants of a cost model from measured steps: least squares on relative errors, with numpy alone. Pure.

`fit` finds all of them from steps that were made to vary in everything (scripts/bench/fit_cost_model.py). For given
knees (tokens, or sampled rows, whose multiplying takes as long as reading the weights) and a given overlap, time is
linear in the constants: non-negative least squares finds them. Knees and overlap are searched on grids.

`adapt` corrects constants by what a server's own steps took (engine/step/own_steps.py). Those vary in what requests
happen to ask, so each constant is drawn towards what it was (ridge regression), and keeps it where no step depends on
it. Time is linear in all constants but those that overlap; it is made so around the last estimate (Gauss-Newton). As it
is homogeneous in the constants, its derivatives times these are the time itself (Euler).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kunserve.planner.cost import CostModel, Work

Array = NDArray[np.float64]

OVERLAPS = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0)
KNEES = tuple(float(2 ** (i / 2)) for i in range(-2, 17))  # 0.5 to 256 tokens
ROUNDS = 3  # over knee of the layers, knee of the head

# Of `adapt`. Steps are taken to differ by a fifth from what is predicted, and constants by as much again as they are:
# the ridge is the ratio of these variances. A constant of 0 is drawn to it with a tenth of a step's time for a unit.
# Steps of a served model, kept and fitted again, were predicted as well with a quarter or five times of the ridge.
RIDGE, ZERO_SHARE = 0.2**2, 0.1
NEWTON_ROUNDS = 5
HELD_OUT = 3  # one of so many microbatches
CLEARLY = 0.9  # the error with new constants is at most so many times that with the old ones, or these stay
CONSTANTS = (  # all but `overlap`, and `sample_s`, which nothing tells from `head_row_s`
    *("pair_s", "key_s", "token_s", "load_s", "chunk_s"),
    *("embed_token_s", "head_row_s", "head_load_s", "stage_s"),
)


class Measurement(NamedTuple):
    """A stage of a microbatch that was run, and the seconds it took."""

    num_layers: int
    work: Work
    is_first: bool
    head_share: float  # of the head that is computed, as `CostModel.work_time` has it
    seconds: float


def fit(steps: Sequence[Measurement], overlaps: Sequence[float] = OVERLAPS) -> CostModel:
    """Find the constants with the least squared relative error on `steps`, which must vary in all they depend on."""
    assert steps
    seconds = np.array([s.seconds for s in steps])
    best: tuple[float, CostModel] | None = None
    for overlap in overlaps:
        knee = head_knee = 16.0
        for _, is_head in product(range(ROUNDS), (False, True)):
            tried = []
            for value in KNEES:
                knees = (knee, value) if is_head else (value, head_knee)
                constants, error = _solve(_columns(steps, *knees, overlap) / seconds[:, None], np.ones(len(steps)))
                tried.append((error, knees, constants))
            error, (knee, head_knee), constants = min(tried, key=lambda entry: entry[0])
            if best is None or error < best[0] * (1 - 1e-9):
                best = error, _model(constants, knee, head_knee, overlap)
    assert best is not None
    return best[1]


class Adapted(NamedTuple):
    """Constants that predict a server's own steps better, and the mean relative error on steps that are held out."""

    cost: CostModel
    error_before: float
    error: float
    num_held_out: int


def adapt(model: CostModel, microbatches: Sequence[Sequence[Measurement]]) -> Adapted | None:
    """Correct constants by measured stages of microbatches; None if that does not clearly predict others better."""
    held_out = list(chain.from_iterable(microbatches[::HELD_OUT]))
    steps = [step for i, stages in enumerate(microbatches) if i % HELD_OUT for step in stages]
    if not (held_out and steps):
        return None
    adapted = _adapt(model, steps)
    before, after = (float(np.mean(relative_errors(cost, held_out))) for cost in (model, adapted))
    return Adapted(adapted, before, after, len(held_out)) if after <= CLEARLY * before else None


def _adapt(model: CostModel, steps: Sequence[Measurement]) -> CostModel:
    seconds = np.array([step.seconds for step in steps])
    sampling_s = np.array([model.sample_s * step.work.num_samples * step.head_share for step in steps])
    old = np.array([getattr(model, name) for name in CONSTANTS])
    shares, now = _derivatives(model, steps) / seconds[:, None], model
    scale = np.where(old > 0, old, ZERO_SHARE / np.maximum(shares.mean(axis=0), 1e-300))
    ridge = RIDGE**0.5 * np.eye(len(old))
    target = np.concatenate([1 - sampling_s / seconds, RIDGE**0.5 * old / scale])
    for _ in range(NEWTON_ROUNDS):
        factors, _ = _solve(np.concatenate([shares * scale, ridge]), target)
        now = replace(now, **dict(zip(CONSTANTS, map(float, factors * scale), strict=True)))
        shares = _derivatives(now, steps) / seconds[:, None]
    return now


def _derivatives(model: CostModel, steps: Sequence[Measurement]) -> Array:
    """Return how each step's time changes with each constant: (steps, constants), in the order of `CONSTANTS`."""
    layers, pairs, keys, tokens, chunks, samples = np.array([(s.num_layers, *s.work) for s in steps], np.float64).T
    is_first, head = np.array([(s.is_first, s.head_share) for s in steps], np.float64).T
    load, token = _shared(model.load_s, model.token_s * tokens, model.overlap)
    head_load, head_row = _shared(model.head_load_s, model.head_row_s * samples, model.overlap)
    columns = (
        *(layers * pairs, layers * keys, layers * tokens * token, layers * load, layers * chunks, is_first * tokens),
        *(head * samples * head_row, head * (samples > 0) * head_load, np.ones(len(steps))),
    )
    return np.stack(columns, axis=1)


def _shared(load: float, compute: Array, overlap: float) -> tuple[Array, Array]:
    """Return how the time of both changes with that of loading, and with that of multiplying."""
    both = np.maximum(_joined(compute, load, overlap), 1e-300)
    return np.power(load / both, overlap - 1), np.power(compute / both, overlap - 1)


def relative_errors(model: CostModel, steps: Sequence[Measurement]) -> Array:
    """Return |predicted - measured| / measured of each step."""
    predicted = np.array([model.work_time(s.num_layers, s.work, s.is_first, s.head_share) for s in steps])
    measured = np.array([s.seconds for s in steps])
    errors: Array = np.abs(predicted - measured) / measured
    return errors


def _columns(steps: Sequence[Measurement], knee: float, head_knee: float, overlap: float) -> Array:
    """Return what each constant is multiplied with: (steps, constants), in the order of `_model`."""
    layers, pairs, keys, tokens, chunks, samples = np.array([(s.num_layers, *s.work) for s in steps], np.float64).T
    is_first, head_share = np.array([(s.is_first, s.head_share) for s in steps], np.float64).T
    head = np.where(samples > 0, head_share * _joined(samples, head_knee, overlap), 0.0)
    columns = (
        *(layers * pairs, layers * keys, layers * _joined(tokens, knee, overlap), layers * chunks),
        *(is_first * tokens, head, np.ones(len(steps))),
    )
    return np.stack(columns, axis=1)


def _joined(amount: Array, knee: float, overlap: float) -> Array:
    joined: Array = np.power(np.power(amount, overlap) + knee**overlap, 1.0 / overlap)
    return joined


def _model(constants: Array, knee: float, head_knee: float, overlap: float) -> CostModel:
    pair_s, key_s, token_s, chunk_s, embed_token_s, head_row_s, stage_s = map(float, constants)
    return CostModel(
        pair_s=pair_s,
        key_s=key_s,
        token_s=token_s,
        chunk_s=chunk_s,
        load_s=token_s * knee,
        embed_token_s=embed_token_s,
        head_row_s=head_row_s,
        head_load_s=head_row_s * head_knee,
        stage_s=stage_s,
        overlap=overlap,
    )


def _solve(columns: Array, target: Array) -> tuple[Array, float]:
    """Return the x >= 0 with the least |columns @ x - target|^2, and that: Lawson and Hanson's active set, 1974."""
    scale = np.maximum(np.linalg.norm(columns, axis=0), 1e-300)
    scaled = columns / scale
    num = scaled.shape[1]
    x, is_used = np.zeros(num), np.zeros(num, np.bool_)
    for _ in range(10 * num):
        gradient = np.where(is_used, -np.inf, scaled.T @ (target - scaled @ x))
        entering = int(np.argmax(gradient))
        if gradient[entering] <= 1e-10 * len(columns):
            break
        is_used[entering] = True
        while True:
            solution = np.zeros(num)
            solution[is_used] = np.linalg.lstsq(scaled[:, is_used], target, rcond=None)[0]
            is_negative = is_used & (solution <= 0)
            if not is_negative.any():
                break
            step = np.min(x[is_negative] / np.maximum(x[is_negative] - solution[is_negative], 1e-300))
            x = x + step * (solution - x)
            is_used &= x > 1e-15
        x = solution
    return x / scale, float(np.sum((scaled @ x - target) ** 2))
