"""Asynchronous sampling gives the tokens that `sample` gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from seeds import seeds

from kunserve.compute import sampler
from kunserve.compute.cuda import sampling as cuda_sampling
from kunserve.compute.cuda.sampling import PendingTokens, TokenBuffers, is_plain, sampled
from kunserve.compute.cuda.sampling import launch_sample as launch_with
from kunserve.compute.sampler import SampledToken, SamplingRow, sample, uniform
from kunserve.sampling import SamplingParams


def row(seed: int, num_output: int = 2, **params: Any) -> SamplingRow:
    settings = SamplingParams(max_tokens=9, **params)
    return SamplingRow(settings, seed, (1, 2), tuple(range(num_output)), (0,))


def launch_sample(values: torch.Tensor, rows: list[SamplingRow]) -> PendingTokens:
    return launch_with(values, rows, TokenBuffers(FakeCuda(), len(rows)))


PLAIN = [
    row(1, temperature=0.0),
    row(2, temperature=1.0),
    row(3, temperature=0.3, min_p=0.1),
    row(4, temperature=2.0, num_output=5),
    row(5, temperature=0.0, top_k=3),
]


def logits(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 97, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("seed", seeds(20))
def test_plain_rows(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_sampling, "SLICE_ELEMENTS", 200)  # two rows at a time
    values = logits(len(PLAIN), seed)
    pending = launch_sample(values, PLAIN)
    assert pending.known is None
    assert pending.tokens() == sample(values, PLAIN)
    assert pending.on_device.tolist() == [token.token_id for token in pending.tokens()]


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 3},
        {"top_p": 0.5},
        {"presence_penalty": 1.0},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.3},
        {"logit_bias": ((3, 50.0),)},
        {"min_tokens": 4},
        {"num_logprobs": 2},
        {"allowed_token_ids": (4, 9)},
    ],
)
def test_rows_that_ask_for_more(params: dict[str, Any]) -> None:
    assert is_plain(PLAIN) and not is_plain([*PLAIN, row(6, **params)])


def test_rows_that_score_a_prompt_token() -> None:
    assert not is_plain([PLAIN[0], row(6)._replace(given=17)])


def test_tokens_that_the_host_knows() -> None:
    pending = sampled([SampledToken(7), SampledToken(3)], torch.device("cpu"))
    assert pending.tokens() == [SampledToken(7), SampledToken(3)] and pending.on_device.tolist() == [7, 3]


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_rows_without_a_finite_logit_are_found_on_the_device(value: float) -> None:
    values = logits(len(PLAIN), 0)
    values[1, 5] = values[4, 0] = value
    pending = launch_sample(values, PLAIN)
    assert pending.known is None  # nobody waited
    assert pending.on_device.tolist() == [token.token_id for token in pending.tokens()]  # ids: the next step reads them
    for i, token in enumerate(pending.tokens()):
        if i in (1, 4):
            assert token.token_id == 0 and "largest logit is not finite" in str(token.error)
        else:
            assert [token] == sample(values[i : i + 1], PLAIN[i : i + 1])


def test_an_exception_of_one_row_is_that_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    values = logits(len(PLAIN), 1)
    expected = sample(values, PLAIN)

    def broken(seed: int, position: int) -> float:
        return 1 // 0 if seed == PLAIN[2].seed else uniform(seed, position)

    monkeypatch.setattr(cuda_sampling, "uniform", broken)
    monkeypatch.setattr(sampler, "uniform", broken)
    found = launch_sample(values, PLAIN)
    assert isinstance(found.tokens()[2].error, ZeroDivisionError) and int(found.on_device[2]) == 0
    assert [*found.tokens()[:2], *found.tokens()[3:]] == [*expected[:2], *expected[3:]]


def test_a_buffer_is_used_again_when_its_tokens_are_gone_and_not_before() -> None:
    driver, values = FakeCuda(), logits(len(PLAIN), 3)
    buffers = TokenBuffers(driver, len(PLAIN))
    first, second = (launch_with(values, PLAIN, buffers) for _ in range(2))
    places = {pending.on_host.data_ptr() for pending in (first, second)}
    assert len(places) == 2 and driver.calls["pinned"] == 2
    expected = sample(values, PLAIN)
    assert first.tokens() == second.tokens() == expected
    for _ in range(5):
        del first
        first = launch_with(values, PLAIN, buffers)
        assert first.on_host.data_ptr() in places and first.tokens() == expected
    assert driver.calls["pinned"] == 2


def test_nothing_to_sample() -> None:
    assert launch_sample(torch.zeros(0, 97), []).tokens() == []
