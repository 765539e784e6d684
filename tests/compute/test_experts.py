"""Mixtures of experts on CPU against the torch reference in float64; and bitwise batch invariance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from op_layers import REFERENCE, assert_near, randn
from random_parts import random_part

from kunserve.compute.cpu_ops import CpuOps
from kunserve.compute.ops import ExpertWeights
from kunserve.model.quant.linear import Linear


def random_experts(
    dtype: torch.dtype, num: int, chosen: int, H: int, inner: int, has_bias: bool, **more: Any
) -> ExpertWeights:
    """Experts with large routers: near ties would be told apart by rounding."""
    biases = [
        randn(*shape, seed=9 + len(shape)).to(dtype) if has_bias else None
        for shape in ((num,), (num, 2 * inner), (num, H))
    ]
    return ExpertWeights(
        Linear.of(randn(num, H, seed=1).to(dtype)), biases[0],
        randn(num, 2 * inner, H, seed=2).to(dtype), biases[1], randn(num, H, inner, seed=3).to(dtype), biases[2],
        num_per_token=chosen, **more,
    )  # fmt: skip


MIXTURES: list[dict[str, Any]] = [
    {"num": 8, "chosen": 2, "H": 24, "inner": 40, "has_bias": False, "normalize": True},
    {"num": 16, "chosen": 4, "H": 33, "inner": 16, "has_bias": False, "normalize": False},
    {"num": 4, "chosen": 4, "H": 16, "inner": 24, "has_bias": True, "normalize": True}
    | {"activation": "clamped_swiglu", "limit": 7.0},
    {"num": 1, "chosen": 1, "H": 8, "inner": 8, "has_bias": False, "normalize": False},
]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_experts_match_float64(ops: CpuOps, mixture: dict[str, Any]) -> None:
    x = randn(37, mixture["H"])
    actual = ops.moe(x, random_experts(torch.float32, **mixture))
    expected = REFERENCE.moe(x.double(), random_experts(torch.float64, **mixture))
    assert_near(actual, expected, ulps=64)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_experts_are_batch_invariant(ops: CpuOps, mixture: dict[str, Any]) -> None:
    x, experts = randn(60, mixture["H"]), random_experts(torch.float32, **mixture)
    whole = ops.moe(x, experts)
    for M in (1, 2, 3, 7, 30):
        for first in (0, 1, 60 - M):
            assert torch.equal(ops.moe(x[first : first + M], experts), whole[first : first + M])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ops.moe(x[order], experts), whole[order])


@pytest.mark.parametrize("name", ["MXFP4", "Q4_1", "F8_32"])
def test_experts_in_blocks_are_those_of_the_dequantized_ones_bitwise(ops: CpuOps, name: str) -> None:
    num, H, inner = 8, 64, 96
    gate_up, down = random_part(name, num * 2 * inner, H), random_part(name, num * H, inner, seed=5)
    plain = random_experts(
        torch.float32, num, 2, H, inner, True, normalize=True, activation="clamped_swiglu", limit=7.0
    )
    numbers = replace(plain, gate_up=gate_up.dense().view(num, -1, H), down=down.dense().view(num, H, -1))
    blocks = replace(
        plain,
        gate_up=gate_up.data.view(num, 2 * inner, -1),
        down=down.data.view(num, H, -1),
        gate_up_blocks=gate_up.blocks,
        down_blocks=down.blocks,
    )
    x = randn(60, H)
    whole = ops.moe(x, numbers)
    assert whole.isfinite().all() and whole.std() > 0
    for M in (1, 2, 3, 7, 60):
        for first in {0, 1, 60 - M} if M < 60 else {0}:
            assert torch.equal(ops.moe(x[first : first + M], blocks), whole[first : first + M])
    assert_near(whole, REFERENCE.moe(x.double(), _doubled(blocks)), ulps=64)


def _doubled(experts: ExpertWeights) -> ExpertWeights:
    """The same in float64: what is in blocks is widened where it is used."""
    biases = {name: getattr(experts, name).double() for name in ("router_bias", "gate_up_bias", "down_bias")}
    return replace(experts, router=Linear.of(experts.router.dense(torch.float64)), **biases)


def test_gates_of_rows_match_float64_wherever_a_row_stands(ops: CpuOps) -> None:
    x, gate = randn(21, 19), 30 * randn(21, 1, seed=1)
    actual, expected = ops.gated(x, gate), REFERENCE.gated(x.double(), gate.double())
    assert ((actual - expected).abs() <= 6 * 2.0**-23 * expected.abs() + 1e-30).all()
    assert torch.equal(torch.cat([ops.gated(x[i : i + 1], gate[i : i + 1]) for i in range(21)]), actual)


def test_of_equal_experts_the_first_are_chosen(ops: CpuOps) -> None:
    experts = random_experts(torch.float32, 4, 2, 8, 8, False, normalize=True)
    experts = replace(experts, router=Linear.of(torch.zeros(4, 8)))
    x = randn(3, 8)
    halves = [
        replace(
            experts,
            num_per_token=1,
            normalize=True,
            router=Linear.of(torch.zeros(1, 8)),
            gate_up=experts.gate_up[i : i + 1],
            down=experts.down[i : i + 1],
        )
        for i in (0, 1)
    ]
    expected = sum((0.5 * ops.moe(x, half) for half in halves), torch.zeros(3, 8))
    torch.testing.assert_close(ops.moe(x, experts), expected)
