"""Grammars, allowed tokens, bad words, and tokens of a prompt that are scored instead of chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from kunserve.compute import sampler
from kunserve.compute.sampler import SamplingRow, sample
from kunserve.sampling import SamplingParams, TokenMask

GREEDY = SamplingParams(max_tokens=9, temperature=0.0)
LOGITS = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0, -1.0]])


def row(params: SamplingParams = GREEDY, output: Sequence[int] = (), mask: TokenMask | None = None) -> SamplingRow:
    return SamplingRow(params, 7, (1,), output, (0,), mask)


def mask_of(*ids: int) -> TokenMask:
    words = np.array([sum(1 << i for i in ids)], np.uint32)
    return lambda: words


def chosen(row: SamplingRow) -> int:
    return sample(LOGITS, [row])[0].token_id


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_only_what_a_mask_allows_is_chosen(temperature: float) -> None:
    params = replace(GREEDY, temperature=temperature)
    seen = {sample(LOGITS, [row(params, mask=mask_of(2, 4))._replace(seed=seed)])[0].token_id for seed in range(200)}
    assert seen == ({2} if temperature == 0 else {2, 4})
    assert chosen(row(mask=lambda: None)) == 0


def test_masks_of_another_length_than_the_vocabulary() -> None:
    wide = torch.zeros(1, 40)
    wide[0, 39] = 5.0
    assert sample(wide, [row(mask=mask_of(3, 4))])[0].token_id == 3
    assert chosen(row(mask=mask_of(5, 31))) == 5


@pytest.mark.parametrize("density", [0.001, 0.3, 0.97])
def test_a_masked_row_alone_is_chosen_as_among_many(density: float) -> None:
    """Alone, only tokens with a weight are looked at."""
    generator, size = np.random.default_rng(1), 3000
    logits = torch.from_numpy(generator.normal(0, 3, (60, size))).float()

    def masked(seed: int) -> SamplingRow:
        bits = np.packbits(generator.random(size) < density, bitorder="little")
        words = np.pad(bits, (0, -len(bits) % 4)).view(np.uint32)
        params = replace(GREEDY, temperature=[1e-300, 0.2, 1.0, 5.0][seed % 4], top_p=[1.0, 0.9][seed // 4 % 2])
        return row(params, mask=lambda: words)._replace(seed=seed)

    rows = [masked(seed) for seed in range(60)]
    assert [token.token_id for token in sample(logits, rows)] == sampler.choose(logits, rows)


def test_allowed_tokens() -> None:
    params = replace(GREEDY, allowed_token_ids=(5, 3, 99))
    assert chosen(row(params)) == 3
    assert chosen(row(params, mask=mask_of(4, 5))) == 5
    assert chosen(row(params, mask=mask_of(2, 4))) == 2  # the grammar goes before


def test_bad_words() -> None:
    params = replace(GREEDY, bad_words=((0,), (2, 3, 1)))
    assert chosen(row(params)) == 1
    assert chosen(row(params, [3])) == 1
    assert chosen(row(params, [2, 3])) == 2
    assert chosen(row(params, [9, 2, 3])) == 2


def test_a_ban_never_takes_the_last_token_that_is_allowed() -> None:
    assert chosen(row(replace(GREEDY, min_tokens=5), mask=mask_of(0))) == 0
    assert chosen(row(replace(GREEDY, min_tokens=5, allowed_token_ids=(0,)))) == 0
    assert chosen(row(replace(GREEDY, bad_words=((4,),), allowed_token_ids=(4,)))) == 4
    assert chosen(row(mask=mask_of())) == 0  # never an error that would end the whole batch


def test_others_in_the_batch_do_not_notice() -> None:
    logits = LOGITS.expand(3, -1)
    ids = [token.token_id for token in sample(logits, [row(), row(mask=mask_of(5)), row()])]
    assert ids == [0, 5, 0]


def test_scored_tokens() -> None:
    params = replace(GREEDY, num_prompt_logprobs=2, num_logprobs=None)
    token = sample(LOGITS, [row(params)._replace(given=3)])[0]
    expected = LOGITS[0].double().log_softmax(-1)
    assert token.token_id == 3
    assert token.logprobs is not None and token.logprobs.rank == 4
    assert token.logprobs.logprob == pytest.approx(float(expected[3]))
    assert [entry[0] for entry in token.logprobs.top] == [0, 1]
