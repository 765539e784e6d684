"""Experts in Triton: in its interpreter against the reference, and compiled for a GPU that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys
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


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kunserve.compute.cuda import experts, kernels

def build(function, types, constants):
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    source = ASTSource(function, signature, constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert built.asm["cubin"], function
    print(function.__name__)

for dtype in ("fp32", "bf16"):
    p, i, f = "*" + dtype, "*i32", "fp32"
    build(experts.expert_linear,
          dict(x=p, weight=p, bias=p, out=p, places=i, block_experts=i, num_places="i32", N="i32", K="i32"),
          dict(SHARED=2, HAS_BIAS=True, PRECISION="ieee" if dtype == "fp32" else "tf32", ROWS=16, COLUMNS=64, INNER=64))
    build(kernels._rms_norm, dict(x=p, weight=p, out=p, eps=f, offset=f, H="i32"), dict(OFFSET=True, BLOCK=1024))
    for kind in range(3):
        build(kernels._act_and_mul, dict(gate_up=p, out=p, width="i32", limit=f, alpha=f), dict(KIND=kind, BLOCK=1024))
    build(kernels._rotate_and_append,
          dict(qkv=p, rope=p, kv=p, positions=i, slots=i, q_norm=p, k_norm=p, eps=f, offset=f, width="i32",
               block_size="i32"),
          dict(HEADS=4, KV_HEADS=2, HALF=24, BLOCK=32, REST=16, REST_BLOCK=16, NORMED=True, OFFSET=True))
"""


def test_kernels_compile_for_sm_90() -> None:
    """In a process of its own: here Triton's functions are those of its interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split().count("expert_linear") == 2
