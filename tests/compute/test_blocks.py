"""Matrices in blocks: the kernels against ggml's own dequantization, bitwise, and whatever else is in the batch."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as ggml_dequantize
from op_layers import randn
from random_parts import random_part
from torch import Tensor

from kunserve.compute.cpu_kernels import KernelsUnavailableError, load_kernels
from kunserve.compute.cpu_ops import FORMATS, CpuOps
from kunserve.compute.torch_ops import TorchOps
from kunserve.model.quant.blocks import BLOCKS, GGML_BLOCKS, OUR_BLOCKS
from kunserve.model.quant.linear import Linear, StoredRows


@pytest.fixture(scope="module", params=[(), ("-march=haswell",)], ids=["this CPU", "AVX2"])
def ops(request: pytest.FixtureRequest) -> CpuOps:
    try:
        return CpuOps(load_kernels(request.param))
    except KernelsUnavailableError as error:
        pytest.skip(str(error))


def ggml(part: StoredRows) -> Tensor:
    assert part.blocks is not None
    if part.blocks.name in OUR_BLOCKS:
        return part.dense()
    return torch.from_numpy(ggml_dequantize(part.data.numpy(), gguf.GGMLQuantizationType[part.blocks.name]))


def test_the_kernels_know_all_formats() -> None:
    assert set(FORMATS) == set(BLOCKS)
    for blocks in GGML_BLOCKS.values():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[blocks.name]] in (
            (blocks.num_values, blocks.num_bytes),
            (1, blocks.num_bytes // blocks.num_values),
        )


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_what_ggml_says(ops: CpuOps, name: str) -> None:
    part = random_part(name, 70, 512)
    ids = torch.tensor([69, 0, 3, 3], dtype=torch.int32)
    expected = ggml(part)
    assert expected.isfinite().all() and expected.std() > 0
    assert torch.equal(ops.embed(ids, Linear((part,))), expected[ids.long()])
    assert torch.equal(TorchOps().embed(ids, Linear((part,))), expected[ids.long()])
    assert torch.equal(part.dense(), expected) and (part.num_rows, part.num_columns) == (70, 512)
    with pytest.raises(IndexError):
        ops.embed(ids + 1, Linear((part,)))
    with pytest.raises(IndexError):
        ops.embed(ids - 1, Linear((part,)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("N", "K"), [(1, 256), (7, 768), (70, 1536), (13, 4864), (10, 2304)])
def test_a_product_is_that_of_the_dequantized_matrix_bitwise(ops: CpuOps, name: str, N: int, K: int) -> None:
    part = random_part(name, N, K)
    x, bias, residual = randn(70, K), randn(N, seed=2), randn(70, N, seed=3)
    blocks, plain = Linear((part,)), Linear.of(ggml(part))
    for M in (1, 2, 3, 4, 5, 6, 7, 8, 13, 70):
        for b, r in [(None, None), (bias, residual)]:
            rows = slice(70 - M, 70)
            operand = None if r is None else r[rows]
            assert torch.equal(ops.linear(x[rows], blocks, b, operand), ops.linear(x[rows], plain, b, operand))
    whole = ops.linear(x, blocks, bias, residual)
    for first in (0, 17, 69):
        assert torch.equal(ops.linear(x[first:][:1], blocks, bias, residual[first:][:1]), whole[first:][:1])
    reference = TorchOps().linear(x.double(), blocks, bias.double(), residual.double())
    magnitude = x.abs().double() @ ggml(part).abs().double().T + 1
    assert ((whole - reference).abs() / magnitude).max() < 2.0**-23 * max(2, K / 64)


def test_every_power_of_two_of_mxfp4_is_exact(ops: CpuOps) -> None:
    """Those of 0 and 1 have subnormal halves; 255, which is no number, is refused where files are read."""
    part = random_part("MXFP4", 254, 32)
    part.data[:, 0] = torch.arange(254)
    whole = ops.embed(torch.arange(254, dtype=torch.int32), Linear((part,)))
    nibbles = torch.cat([part.data[:, 1:] & 15, part.data[:, 1:] >> 4], dim=-1).long()
    of_code = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    expected = of_code[nibbles] * 2.0 ** (torch.arange(254, dtype=torch.float64)[:, None] - 127)
    assert torch.equal(whole, expected.float())  # the largest are infinite
    with np.errstate(over="ignore"):
        assert torch.equal(whole, ggml(part))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "MXFP4"])
def test_rows_of_a_few_groups(ops: CpuOps, name: str) -> None:
    part = random_part(name, 9, 32 * 3)
    x = randn(5, 96)
    for M in (1, 2, 5):
        assert torch.equal(ops.linear(x[:M], Linear((part,))), ops.linear(x[:M], Linear.of(ggml(part))))


def test_parts_of_different_formats_are_one_matrix(ops: CpuOps) -> None:
    parts = (random_part("Q4_K", 6, 512), random_part("Q6_K", 3, 512, seed=1), StoredRows(randn(4, 512)))
    x, bias, residual = randn(9, 512), randn(13, seed=2), randn(9, 13, seed=3)
    plain = Linear.of(torch.cat([ggml(parts[0]), ggml(parts[1]), parts[2].data]))
    for M in (1, 9):
        whole = ops.linear(x[:M], plain, bias, residual[:M])
        assert torch.equal(ops.linear(x[:M], Linear(parts), bias, residual[:M]), whole)
        torch.testing.assert_close(
            TorchOps().linear(x[:M], Linear(parts), bias, residual[:M]), whole, rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("name", [None, *FORMATS])
def test_a_product_of_some_rows_of_a_matrix_is_that_part_of_the_whole(ops: CpuOps, name: str | None) -> None:
    """Both ends of a chain multiply with a part of the head: tokens must not depend on where it is divided."""
    parts = (StoredRows(randn(90, 512)), StoredRows(randn(70, 512)))
    if name is not None:
        parts = (random_part(name, 90, 512), random_part(name, 70, 512))
    matrix = Linear(parts)
    for num_rows in (1, 3, 9, 40):
        x = randn(num_rows, 512)
        whole, y = ops.linear(x, matrix), torch.zeros(num_rows, 160)
        for border in (1, 13, 64, 90, 128, 159):
            y.zero_()
            ops.linear_into(x, matrix.part(0, border), y[:, :border])
            assert torch.equal(y[:, :border], whole[:, :border]) and not y[:, border:].any()
            ops.linear_into(x, matrix.part(border, 160), y[:, border:])
            assert torch.equal(y, whole)
