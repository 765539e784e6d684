"""Experts in Triton's interpreter against the reference; `test_compiled_kernels.py` compiles them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from op_layers import REFERENCE, randn

from kunserve.compute.ops import ExpertWeights
from kunserve.model.quant.linear import Linear

pytest.importorskip("triton")


def experts_of(dtype: torch.dtype, num: int, chosen: int, hidden: int, inner: int, has_bias: bool) -> ExpertWeights:
    def bias(*shape: int) -> torch.Tensor | None:
        return randn(*shape, seed=7).to(dtype) if has_bias else None

    return ExpertWeights(
        Linear.of(randn(num, hidden, seed=1).to(dtype)), bias(num),
        randn(num, 2 * inner, hidden, seed=2).to(dtype), bias(num, 2 * inner),
        randn(num, hidden, inner, seed=3).to(dtype), bias(num, hidden),
        num_per_token=chosen, normalize=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def moe() -> Callable[[torch.Tensor, ExpertWeights], torch.Tensor]:
    """The kernels in Triton's interpreter (tests/conftest.py asks for it)."""
    if torch.cuda.is_available():
        pytest.skip("gpu_check compares the compiled kernels on this machine's GPU")
    from kunserve.compute.cuda.kernels import TritonKernels

    return TritonKernels().moe


@pytest.mark.parametrize(
    ("rows", "num", "chosen", "has_bias"), [(1, 8, 2, False), (37, 8, 2, True), (5, 4, 4, False), (40, 1, 1, True)]
)
def test_grouped_products_are_the_reference(
    moe: Callable[[torch.Tensor, ExpertWeights], torch.Tensor], rows: int, num: int, chosen: int, has_bias: bool
) -> None:
    x, experts = randn(rows, 40), experts_of(torch.float32, num, chosen, 40, 72, has_bias)
    torch.testing.assert_close(moe(x, experts), REFERENCE.moe(x, experts), rtol=1e-4, atol=1e-3)


def test_all_rows_may_choose_one_expert(moe: Callable[[torch.Tensor, ExpertWeights], torch.Tensor]) -> None:
    x, experts = randn(50, 40).abs(), experts_of(torch.float32, 8, 1, 40, 24, False)
    router = torch.zeros(8, 40)
    router[5] = 1
    experts = replace(experts, router=Linear.of(router))
    torch.testing.assert_close(moe(x, experts), REFERENCE.moe(x, experts), rtol=1e-4, atol=1e-3)
