"""Constants of a cost model from measured steps: least squares on relative errors, with numpy alone. Pure.

For given knees (tokens, or sampled rows, whose multiplying takes as long as reading the weights) and a given overlap,
time is linear in the constants: non-negative least squares finds them. Knees and overlap are searched on grids.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kunserve.planner.cost import CostModel, Work

Array = NDArray[np.float64]

OVERLAPS = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0)
KNEES = tuple(float(2 ** (i / 2)) for i in range(-2, 17))  # 0.5 to 256 tokens
ROUNDS = 3  # over knee of the layers, knee of the head


class Measurement(NamedTuple):
    """A stage of a microbatch that was run, and the seconds it took. The head is computed if `is_last`."""

    num_layers: int
    work: Work
    is_first: bool
    is_last: bool
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
                constants, error = _solve(_columns(steps, *knees, overlap) / seconds[:, None])
                tried.append((error, knees, constants))
            error, (knee, head_knee), constants = min(tried, key=lambda entry: entry[0])
            if best is None or error < best[0] * (1 - 1e-9):
                best = error, _model(constants, knee, head_knee, overlap)
    assert best is not None
    return best[1]


def relative_errors(model: CostModel, steps: Sequence[Measurement]) -> Array:
    """Return |predicted - measured| / measured of each step."""
    predicted = np.array([model.work_time(s.num_layers, s.work, s.is_first, s.is_last) for s in steps])
    measured = np.array([s.seconds for s in steps])
    errors: Array = np.abs(predicted - measured) / measured
    return errors


def _columns(steps: Sequence[Measurement], knee: float, head_knee: float, overlap: float) -> Array:
    """Return what each constant is multiplied with: (steps, constants), in the order of `_model`."""
    layers, pairs, keys, tokens, chunks, samples = np.array([(s.num_layers, *s.work) for s in steps], np.float64).T
    is_first, is_last = np.array([(s.is_first, s.is_last) for s in steps], np.float64).T
    samples = samples * is_last
    head = np.where(samples > 0, _joined(samples, head_knee, overlap), 0.0)
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


def _solve(columns: Array) -> tuple[Array, float]:
    """Return the x >= 0 with the least |columns @ x - 1|^2, and that: the active set of Lawson and Hanson, 1974."""
    scale = np.maximum(np.linalg.norm(columns, axis=0), 1e-300)
    scaled, target = columns / scale, np.ones(len(columns))
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
