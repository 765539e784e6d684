"""The head at both ends of a chain: who does what changes nothing of what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from kunserve.compute.cpu_ops import cpu_ops_or_reference
from kunserve.compute.decoder import Decoder
from kunserve.compute.sampler import SamplingRow, sample
from kunserve.engine.blocks.block_pool import BlockPool
from kunserve.engine.group import Stage
from kunserve.engine.step.microbatch import StepInputs
from kunserve.engine.step.shared_head import GRAIN, HeadBalance, SharedHead
from kunserve.model.quant.linear import Linear
from kunserve.sampling import SamplingParams

V, H, R = 1000, 96, 7
STAGE = Stage(1, 1, 2, BlockPool(1))


class Head:
    """What a decoder has of a head; its layers leave hidden states as they are."""

    vocab_size = V

    def __init__(self, matrix: Tensor) -> None:
        self._ops, self._head = cpu_ops_or_reference(torch.float32)[0], Linear.of(matrix)

    def forward(self, first: int, last: int, x: Tensor, batch: Any, rows: Tensor, *, with_head: bool = True) -> Tensor:
        return x[rows]

    def logits(self, x: Tensor) -> Tensor:
        return self.scaled(self._ops.linear(x, self._head))

    def multiply_head(self, x: Tensor, first: int, last: int, logits: Tensor) -> None:
        self._ops.linear_into(x, self._head.part(first, last), logits[:, first:last])

    def scaled(self, logits: Tensor) -> Tensor:
        return logits / 2


def failing(*_: Any, **__: Any) -> None:
    raise RuntimeError("this device fails")


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    return cast(Decoder, Head(torch.randn(V, H)))


def inputs_of_rows() -> tuple[StepInputs, Tensor]:
    """Return a microbatch of rows of many kinds, and their hidden states."""
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"repetition_penalty": 1.3},
    ]
    params = [SamplingParams(4, num_logprobs=2 * (i % 2), **cast(Any, kinds[i % 4])) for i in range(R)]
    rows = tuple(SamplingRow(params[i], i, (1, 2, 3), (4, 5), ()) for i in range(R))
    none = torch.zeros(1, dtype=torch.int32)
    ids, table = torch.arange(R, dtype=torch.int32), none[None]
    return StepInputs(ids, ids, none, none, (table, table), torch.arange(R), rows, 16), torch.randn(R, H)


Order = Callable[[SharedHead, Decoder, Tensor], list[Any]]


def last_before_first(head: SharedHead, decoder: Decoder, x: Tensor) -> list[Any]:
    own = head.run_last(decoder, STAGE, 1, x)
    assert head.first_can_begin.done()
    rest = head.run_first(decoder)
    assert rest is not None
    return own + rest


def first_amid_last(head: SharedHead, decoder: Decoder, x: Tensor) -> list[Any]:
    """The first device is through with its part of the product before the last one is: it is asked again."""
    multiply, early = decoder.multiply_head, list[Any]()

    def late(x: Tensor, first: int, last: int, logits: Tensor) -> None:
        if first == 0 and last < V:
            assert head.first_can_begin.done() and not head.is_multiplied.done()
            early.append(head.run_first(decoder))
        multiply(x, first, last, logits)

    decoder.multiply_head = late  # type: ignore[method-assign]
    own = head.run_last(decoder, STAGE, 1, x)
    assert set(early) <= {None}
    rest = head.run_first(decoder)
    assert rest is not None
    return own + rest


@pytest.mark.parametrize("order", [last_before_first, first_amid_last])
@pytest.mark.parametrize("sampling_share", [0.0, 0.3, 0.9, 1.0, 1.7, 30.0])
def test_tokens_are_those_of_one_device_however_the_work_is_divided(
    order: Order, sampling_share: float, decoder: Decoder
) -> None:
    inputs, x = inputs_of_rows()
    expected = sample(decoder.logits(x), inputs.sampling)
    head = SharedHead(inputs, HeadBalance(sampling_share), V)
    tokens = order(head, decoder, x)
    assert tokens == expected
    assert inputs.sampled.result() == [token.token_id for token in expected]


def test_both_ends_have_half_of_the_work() -> None:
    assert HeadBalance().divide(V, R) == (round(V / 2 / GRAIN) * GRAIN, 0)
    for percent in range(0, 400, 7):
        share = percent / 100
        border, num_own = HeadBalance(share).divide(V, 1000)
        last = border / V + share * num_own / 1000  # products
        assert border <= V and (num_own == 0 or border == V)
        assert last == pytest.approx((1 + share) / 2, abs=0.05)


@pytest.mark.parametrize("vocab_size", [1, 40, 64, 65, 127, 128, 50_257, 50_300])
def test_nobody_gets_an_empty_part_of_any_vocabulary(vocab_size: int) -> None:
    """And none is beyond it, near where the last device multiplies alone."""
    for thousandth in range(1100):
        border, num_own = HeadBalance(thousandth / 1000).divide(vocab_size, R)
        assert 0 < border <= vocab_size and 0 <= num_own <= R


def test_a_chain_learns_how_long_sampling_takes() -> None:
    balance = HeadBalance()
    for _ in range(200):
        balance.learn(2.0, 3.0)
    assert balance.sampling_share == pytest.approx(1.5, rel=0.01)
    balance.learn(0.0, 1.0)  # a clock that has not gone on
    assert balance.sampling_share == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize("sampling_share", [0.0, 2.0])
def test_nobody_waits_for_an_end_that_failed(sampling_share: float, decoder: Decoder) -> None:
    inputs, x = inputs_of_rows()
    head = SharedHead(inputs, HeadBalance(sampling_share), V)
    decoder.multiply_head = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="fails"):
        head.run_last(decoder, STAGE, 1, x)
    assert head.is_multiplied.cancelled() and head.first_can_begin.done()
    assert not inputs.sampled.done()
    inputs, _ = inputs_of_rows()
    head = SharedHead(replace(inputs), HeadBalance(sampling_share), V)
    decoder.forward = failing  # type: ignore[method-assign,assignment]
    with pytest.raises(RuntimeError, match="fails"):
        head.run_last(decoder, STAGE, 1, x)
    assert head.first_can_begin.cancelled()
