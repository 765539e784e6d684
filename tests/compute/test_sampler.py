from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kunserve.compute import sampler
from kunserve.compute.sampler import (
    SampledToken,
    SamplingRow,
    draw,
    integer_weights,
    keep_most_likely,
    sample,
    uniform,
)
from kunserve.errors import EngineError
from kunserve.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=100, temperature=0.0)
DRAWN = SamplingParams(max_tokens=100)


def make_row(
    params: SamplingParams,
    seed: int = 0,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    eos: tuple[int, ...] = (0,),
) -> SamplingRow:
    return SamplingRow(params, seed, prompt, output, eos)


def ids(tokens: list[SampledToken]) -> list[int]:
    return [token.token_id for token in tokens]


def kept_by_oracle(probabilities: list[float], params: SamplingParams) -> dict[int, float]:
    """Slow and plain: sort, cut by min_p, then top_k, then top_p of what is left."""
    peak = max(probabilities)
    order = sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i))
    order = [i for i in order if probabilities[i] >= params.min_p * peak]
    if params.top_k > 0:
        order = order[: params.top_k]
    mass, kept = sum(probabilities[i] for i in order), dict[int, float]()
    for i in order:
        if params.top_p < 1.0 and sum(kept.values()) >= params.top_p * mass:
            break
        kept[i] = probabilities[i]
    return kept


def softmax_by_oracle(logits: Sequence[float], temperature: float) -> list[float]:
    peak = max(logits)
    exps = [math.exp((x - peak) / temperature) for x in logits]
    return [e / sum(exps) for e in exps]


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Weights of one row (V,) after all filters."""
    size = logits.shape[0]
    one = torch.ones(1, dtype=torch.float64)
    weights = integer_weights(logits[None].double(), one * params.temperature, one * params.min_p)
    top_k = torch.tensor([params.top_k or size])
    return keep_most_likely(weights, top_k, one * params.top_p)[0]


FILTERS = [
    DRAWN,
    replace(DRAWN, temperature=0.3),
    replace(DRAWN, temperature=2.5, top_p=0.9),
    replace(DRAWN, top_k=7),
    replace(DRAWN, top_k=5000, top_p=0.97),
    replace(DRAWN, top_p=0.0001),
    replace(DRAWN, top_p=0.5),
    replace(DRAWN, min_p=0.2),
    replace(DRAWN, temperature=1.5, min_p=0.01, top_k=40, top_p=0.8),
    replace(DRAWN, temperature=8.0, top_p=0.95),
]


@pytest.mark.parametrize("params", FILTERS)
@pytest.mark.parametrize("size", [3, 50, 6000])
def test_filters_keep_what_a_slow_oracle_keeps(params: SamplingParams, size: int) -> None:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 2
    expected = kept_by_oracle(softmax_by_oracle(logits.tolist(), params.temperature), params)
    weights = filtered(logits, params)
    found = {i: weight for i, weight in enumerate(weights.tolist()) if weight}
    assert found.keys() <= expected.keys()
    total, mass = sum(found.values()), sum(expected.values())
    for i, probability in expected.items():  # a weight below the unit is 0, and too small to be drawn
        assert found.get(i, 0) / total == pytest.approx(probability / mass, rel=1e-6, abs=1e-10)


def test_every_stage_of_the_candidate_search_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    expected = [filtered(logits, params) for params in FILTERS]
    for num_candidates in (1, 2, 70, 5000, 9999):
        monkeypatch.setattr(sampler, "NUM_CANDIDATES", num_candidates)
        for params, weights in zip(FILTERS, expected, strict=True):
            assert torch.equal(filtered(logits, params), weights)


def test_ties_at_the_border_of_a_filter_keep_the_lowest_ids() -> None:
    logits = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 2.0])
    assert filtered(logits, replace(DRAWN, top_k=3)).nonzero()[:, 0].tolist() == [1, 2, 5]
    flat = torch.zeros(1000)
    assert filtered(flat, replace(DRAWN, top_p=0.0105)).nonzero()[:, 0].tolist() == list(range(11))
    assert filtered(flat, replace(DRAWN, top_k=900)).nonzero()[:, 0].tolist() == list(range(900))


def test_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    weights = torch.tensor([0, 3, 0, 1, 4, 0])  # an enumeration of u in eighths hits each token by its weight
    eighths = torch.arange(8, dtype=torch.float64) / 8
    assert draw(weights.expand(8, 6).contiguous(), eighths).tolist() == [1, 1, 1, 3, 4, 4, 4, 4]
    almost_one = torch.tensor([1.0 - 2.0**-53], dtype=torch.float64)
    assert draw(weights[None], almost_one).tolist() == [4]
    assert draw(torch.tensor([[2**61, 1, 0]]), almost_one).tolist() in ([0], [1])  # never the weightless one


def test_drawn_frequencies_match_the_distribution() -> None:
    probabilities = [0.5, 0.25, 0.125, 0.125]
    logits = torch.tensor(probabilities).log().expand(4000, 4)
    counts = Counter(ids(sample(logits, [make_row(DRAWN, seed) for seed in range(4000)])))
    for token_id, probability in enumerate(probabilities):
        assert counts[token_id] / 4000 == pytest.approx(probability, abs=0.03)


def test_uniform_is_even_and_a_function_of_seed_and_position_only() -> None:
    values = [uniform(seed, position) for seed in range(-20, 20) for position in range(100)]
    assert all(0.0 <= value < 1.0 for value in values) and len(set(values)) == len(values)
    buckets = Counter(int(value * 10) for value in values)
    assert all(abs(buckets[i] - 400) < 80 for i in range(10))
    assert uniform(1, 23) == 0.22409889630692115  # written down: a change would break every user's seeds
    assert uniform(2**80, 0) != uniform(2**80 + 1, 0)


def random_rows(rng: random.Random, count: int, size: int) -> list[SamplingRow]:
    def params() -> SamplingParams:
        return SamplingParams(
            max_tokens=100,
            min_tokens=rng.choice([0, 0, 10]),
            temperature=rng.choice([0.0, 0.2, 1.0, 3.0]),
            top_p=rng.choice([1.0, 0.9, 0.3]),
            top_k=rng.choice([0, 1, 20, 1000]),
            min_p=rng.choice([0.0, 0.1]),
            presence_penalty=rng.choice([0.0, 0.5]),
            frequency_penalty=rng.choice([0.0, -0.5]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            logit_bias=rng.choice([(), ((3, 5.0), (7, -100.0))]),
            num_logprobs=rng.choice([None, 2]),
        )

    def tokens() -> list[int]:
        return [rng.randrange(size) for _ in range(rng.randrange(20))]

    return [make_row(params(), rng.randrange(2**32), tokens(), tokens()) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_does_not_depend_on_the_batch_around_it(dtype: torch.dtype) -> None:
    rng = random.Random(7)
    rows = random_rows(rng, 24, 3000)
    logits = (torch.randn(24, 3000, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    before = logits.clone()
    alone = [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert sample(logits, rows) == alone
    order = rng.sample(range(24), 24)
    assert sample(logits[order], [rows[i] for i in order]) == [alone[i] for i in order]
    as_on_a_gpu = sampler.choose(logits, rows)  # many rows at once
    assert as_on_a_gpu == ids(alone)
    assert torch.equal(logits, before)


def adjusted_by_oracle(logits: list[float], row: SamplingRow) -> list[float]:
    p, scores = row.params, list(logits)
    for token_id, value in p.logit_bias:
        scores[token_id] += value
    if len(row.output_token_ids) < p.min_tokens:
        for token_id in {*row.eos_token_ids, *p.stop_token_ids}:
            scores[token_id] = -math.inf
    counts = Counter(row.output_token_ids)
    for token_id in range(len(scores)):
        if token_id in counts or token_id in row.prompt_token_ids:
            is_positive = scores[token_id] > 0
            scores[token_id] *= 1 / p.repetition_penalty if is_positive else p.repetition_penalty
        scores[token_id] -= p.frequency_penalty * counts[token_id] + p.presence_penalty * (counts[token_id] > 0)
    return scores


def test_greedy_with_penalties_follows_a_naive_oracle() -> None:
    rng = random.Random(3)
    rows = [row._replace(params=replace(row.params, temperature=0.0)) for row in random_rows(rng, 300, 12)]
    logits = torch.randn(300, 12, generator=torch.Generator().manual_seed(4)) * 2
    expected = []
    for row, values in zip(rows, logits.double().tolist(), strict=True):
        scores = adjusted_by_oracle(values, row)
        expected.append(scores.index(max(scores)))
    found = ids(sample(logits, rows))
    assert found == expected
    assert found != logits.argmax(-1).tolist()  # the penalties did matter


def test_drawn_tokens_follow_the_oracle_at_the_hashed_uniform() -> None:
    rows = random_rows(random.Random(5), 300, 40)
    logits = torch.randn(300, 40, generator=torch.Generator().manual_seed(6)) * 2
    for row, values, token in zip(rows, logits.double().tolist(), sample(logits, rows), strict=True):
        if row.params.temperature == 0.0:
            continue
        probabilities = softmax_by_oracle(adjusted_by_oracle(values, row), row.params.temperature)
        kept = kept_by_oracle(probabilities, row.params)
        left = uniform(row.seed, len(row.output_token_ids)) * sum(kept.values())
        for expected in sorted(kept):
            left -= kept[expected]
            if left < 0:
                break
        assert token.token_id == expected


def test_min_tokens_bans_the_end_until_it_is_reached() -> None:
    logits = torch.tensor([[9.0, 1.0, 8.0, 2.0]])
    params = replace(GREEDY, min_tokens=2, stop_token_ids=frozenset({2, 99}), ignore_eos=True)
    assert ids(sample(logits, [make_row(params)])) == [3]
    assert ids(sample(logits, [make_row(params, output=[5])])) == [3]
    assert ids(sample(logits, [make_row(params, output=[5, 5])])) == [0]
    for seed in range(20):
        assert ids(sample(logits, [make_row(replace(params, temperature=2.0), seed)]))[0] in (1, 3)


def test_ids_outside_the_vocabulary_are_ignored() -> None:
    params = replace(GREEDY, min_tokens=1, logit_bias=((-1, 50.0), (4, 50.0)))
    assert ids(sample(torch.tensor([[1.0, 2.0, 3.0, 0.0]]), [make_row(params, eos=(7,))])) == [2]


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0], [2.0, 2.0, 2.0]])
    for params in (GREEDY, replace(GREEDY, min_tokens=1), replace(DRAWN, top_k=1)):
        rows = [make_row(params, eos=())] * 2
        assert ids(sample(logits, rows)) == [1, 0]
        assert ids(sample(logits.bfloat16(), rows)) == [1, 0]


def test_extreme_temperatures() -> None:
    logits = torch.tensor([[1.0, 30000.0, -torch.inf, 30000.5]])
    assert {ids(sample(logits, [make_row(replace(DRAWN, temperature=1e-300), seed)]))[0] for seed in range(9)} == {3}
    hot = {ids(sample(logits, [make_row(replace(DRAWN, temperature=1e9), seed)]))[0] for seed in range(60)}
    assert hot == {0, 1, 3}


def test_logprobs_are_of_the_raw_logits_in_order() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, -torch.inf]])
    params = replace(GREEDY, num_logprobs=3, logit_bias=((2, 100.0),), temperature=0.0)
    (token,) = sample(logits, [make_row(params)])
    expected = torch.log_softmax(logits[0].double(), -1).tolist()
    assert token.logprobs is not None and token.token_id == token.logprobs.token_id == 2
    assert token.logprobs.logprob == pytest.approx(expected[2])
    assert [i for i, _ in token.logprobs.top] == [1, 3, 2]
    assert [value for _, value in token.logprobs.top] == pytest.approx([expected[1], expected[3], expected[2]])


@pytest.mark.parametrize(("num_logprobs", "num_top"), [(0, 0), (1, 1), (50, 3)])
def test_number_of_logprobs(num_logprobs: int, num_top: int) -> None:
    (token,) = sample(torch.zeros(1, 3), [make_row(replace(GREEDY, num_logprobs=num_logprobs))])
    assert token.logprobs is not None
    assert token.logprobs.logprob == pytest.approx(math.log(1 / 3))
    assert [i for i, _ in token.logprobs.top] == [0, 1, 2][:num_top]


def assert_others_unharmed(logits: Tensor, rows: Sequence[SamplingRow], bad: set[int], message: str) -> None:
    """The bad rows have an error and a stand-in for a token; all others have what they have alone."""
    for i, token in enumerate(sample(logits, rows)):
        if i in bad:
            assert token.token_id == 0 and token.logprobs is None and re.search(message, str(token.error))
        else:
            assert token.error is None and [token] == sample(logits[i : i + 1], rows[i : i + 1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("params", [GREEDY, DRAWN, replace(GREEDY, min_tokens=3), replace(DRAWN, num_logprobs=2)])
def test_logits_that_are_not_numbers_are_an_error_of_their_rows(value: float, params: SamplingParams) -> None:
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    logits[1, 7] = logits[3, 2] = value
    assert_others_unharmed(logits, [make_row(params)] * 4, {1, 3}, "largest logit is not finite")


def test_a_row_without_any_possible_token_is_an_error_of_that_row() -> None:
    [token] = sample(torch.full((1, 4), -torch.inf), [make_row(DRAWN)])
    assert isinstance(token.error, EngineError)
    banned = replace(DRAWN, min_tokens=1, stop_token_ids=frozenset({1}))
    rows = [make_row(banned if i in (1, 5) else DRAWN, seed=i) for i in range(6)]
    assert_others_unharmed(torch.zeros(6, 2), rows, {1, 5}, "largest logit is not finite")
    ids_on_a_gpu = sampler.choose(torch.zeros(6, 2), rows)  # many rows at once
    assert ids_on_a_gpu == [None if i in (1, 5) else sample(torch.zeros(1, 2), [rows[i]])[0].token_id for i in range(6)]


@pytest.mark.parametrize("bad", [{0}, {3}, {6}, {2, 3}, set(range(7))])
def test_what_the_work_for_a_row_raises_is_that_rows(bad: set[int]) -> None:
    class PanicError(BaseException):
        pass

    def panic() -> None:
        raise PanicError("rust")

    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(2))
    rows = [
        row._replace(mask=panic if i in bad else None) for i, row in enumerate(random_rows(random.Random(1), 7, 50))
    ]
    assert_others_unharmed(logits, rows, bad, "rust")


def test_a_scored_row_that_is_no_number_is_an_error_of_that_row() -> None:
    logits = torch.zeros(3, 8)
    logits[1, 3] = torch.nan
    rows = [make_row(replace(GREEDY, num_prompt_logprobs=1))._replace(given=2)] * 3
    assert_others_unharmed(logits, rows, {1}, "largest logit is not finite")


def test_nothing_to_sample() -> None:
    assert sample(torch.zeros(0, 5), []) == []
