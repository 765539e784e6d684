"""Every operation of a decoder on CPU against the torch reference in float64; and bitwise batch invariance."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from op_layers import REFERENCE, Layer, Shape, assert_near, randn

from kunserve.compute.cpu_kernels import KernelsUnavailableError, load_kernels
from kunserve.compute.cpu_ops import CpuOps, cpu_ops_or_reference
from kunserve.compute.torch_ops import TorchOps
from kunserve.errors import EngineError
from kunserve.model.config import ACTIVATIONS
from kunserve.model.quant.linear import Linear, StoredRows

# ---- linear, norm, activation -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 5), (4, 16), (7, 24), (33, 100), (64, 576), (10, 2049), (6, 5000)])
@pytest.mark.parametrize("M", [1, 2, 3, 5, 8, 13, 37])
def test_linear_matches_float64(ops: CpuOps, M: int, N: int, K: int) -> None:
    x, w, bias, residual = randn(M, K), randn(N, K, seed=1), randn(N, seed=2), randn(M, N, seed=3)
    for b, r in [(None, None), (bias, None), (None, residual), (bias, residual)]:
        expected = REFERENCE.linear(
            x.double(), Linear.of(w.double()), None if b is None else b.double(), None if r is None else r.double()
        )
        magnitude = x.abs().double() @ w.abs().double().T + 1
        assert ((ops.linear(x, Linear.of(w), b, r) - expected).abs() / magnitude).max() < 2.0**-23 * max(2, K / 64)


@pytest.mark.parametrize(("N", "K"), [(960, 576), (10, 37), (7, 1536), (5, 4100)])
def test_linear_is_batch_invariant(ops: CpuOps, N: int, K: int) -> None:
    x, w, bias, residual = randn(200, K), randn(N, K, seed=1), randn(N, seed=2), randn(200, N, seed=3)
    matrix = Linear.of(w)
    whole = ops.linear(x, matrix, bias, residual)
    for M in (1, 2, 3, 4, 5, 6, 7, 8, 37, 100):
        for first in (0, 1, 100 - M):
            rows = slice(first, first + M)
            assert torch.equal(ops.linear(x[rows], matrix, bias, residual[rows]), whole[rows])


def test_a_matrix_in_parts_is_one_matrix(ops: CpuOps) -> None:
    x, w, bias, residual = randn(9, 37), randn(11, 37, seed=1), randn(11, seed=2), randn(9, 11, seed=3)
    matrix = Linear((StoredRows(w[:5]), StoredRows(w[5:6]), StoredRows(w[6:])))
    assert matrix.shape == (11, 37) and torch.equal(matrix.dense(torch.float32), w)
    for rows in (1, 9):
        whole = ops.linear(x[:rows], Linear.of(w), bias, residual[:rows])
        assert torch.equal(ops.linear(x[:rows], matrix, bias, residual[:rows]), whole)


def test_linear_reads_nothing_past_its_operands(ops: CpuOps) -> None:
    x, w = randn(6, 21), randn(6, 21, seed=1)
    around = torch.full((8, 21), float("nan"))
    around[1:7] = w
    x_around = around.clone()
    x_around[1:7] = x
    assert torch.equal(ops.linear(x_around[1:7], Linear.of(around[1:7])), ops.linear(x, Linear.of(w)))


@pytest.mark.parametrize("H", [1, 5, 16, 33, 64, 576, 1000])
def test_rms_norm_matches_float64(ops: CpuOps, H: int) -> None:
    x, weight = randn(5, H) * 3, randn(H, seed=1)
    assert_near(ops.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x.double(), weight.double(), 1e-5), ulps=6)


@pytest.mark.parametrize("width", [1, 3, 16, 37, 1536])
def test_silu_and_mul_matches_float64_and_ignores_position(ops: CpuOps, width: int) -> None:
    gate_up = randn(4, 2 * width) * 20
    actual, gate, up = ops.act_and_mul(gate_up), gate_up[:, :width].double(), gate_up[:, width:].double()
    expected = REFERENCE.act_and_mul(gate_up.double())
    assert ((actual - expected).abs() <= 4 * 2.0**-23 * expected.abs() + 1e-30).all()
    assert torch.allclose(expected, up * gate / (1 + torch.exp(-gate)), rtol=1e-13)
    for column in {0, width // 2, width - 1}:
        alone = ops.act_and_mul(gate_up[:, [column, width + column]].contiguous())
        assert torch.equal(alone[:, 0], actual[:, column])


def test_silu_and_mul_of_extremes(ops: CpuOps) -> None:
    gate = torch.tensor([0.0, -0.0, 88.5, 1e30, -86.0, -90.0, -1e30, float("inf"), float("nan")])
    actual = ops.act_and_mul(torch.stack([gate, torch.ones_like(gate)]).T.contiguous().view(len(gate), 2))[:, 0]
    expected = torch.tensor([0.0, 0.0, 88.5, 1e30, 0.0, 0.0, 0.0, float("inf"), float("nan")])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 37, 1536])
def test_activations_match_float64_and_ignore_position(ops: CpuOps, activation: str, width: int) -> None:
    gate_up = randn(4, 2 * width) * 6
    actual, expected = (o.act_and_mul(x, activation, 7.0) for o, x in ((ops, gate_up), (REFERENCE, gate_up.double())))
    # 1 + tanh and 1 + up cancel: what is left of them has the error of what they were.
    gate, up = gate_up[:, :width].abs(), gate_up[:, width:].abs()
    scale = expected.abs() if activation == "silu" else gate * (1 + up)
    assert ((actual - expected).abs() <= 6 * 2.0**-23 * scale + 1e-30).all()
    for column in {0, width // 2, width - 1}:
        alone = ops.act_and_mul(gate_up[:, [column, width + column]].contiguous(), activation, 7.0)
        assert torch.equal(alone[:, 0], actual[:, column])


def test_clamped_swiglu_bounds_gate_above_and_up_both_ways() -> None:
    gate_up = torch.tensor([[9.0, 2.0], [7.0, 2.0], [1.0, -9.0], [1.0, -7.0], [-9.0, 0.0]], dtype=torch.float64)
    a = REFERENCE.act_and_mul(gate_up, "clamped_swiglu", 7.0)[:, 0]
    assert a[0] == a[1] and a[2] == a[3] and a[4] == -9 * torch.sigmoid(torch.tensor(-9 * 1.702, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 5, 333])
def test_softcap_matches_float64_and_ignores_position(ops: CpuOps, size: int) -> None:
    x = randn(size) * torch.logspace(-6, 3, size)
    actual, expected = ops.softcap(x, 30.0), REFERENCE.softcap(x.double(), 30.0)
    assert ((actual - expected).abs() <= 4 * 2.0**-23 * expected.abs()).all()
    assert torch.equal(torch.cat([ops.softcap(x[i : i + 1], 30.0) for i in range(size)]), actual)
    extremes = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    torch.testing.assert_close(ops.softcap(extremes, 3.0), torch.tensor([3.0, -3.0, float("nan"), 0.0]), equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (7, 64), (16, 515)])
def test_sums_are_those_of_torch_bitwise(ops: CpuOps, shape: tuple[int, int]) -> None:
    x, y = randn(*shape), randn(*shape, seed=1) * torch.logspace(-9, 9, shape[1])
    expected = x + y
    assert torch.equal(ops.add(x, y), expected) and torch.equal(REFERENCE.add(x, y), expected)


def test_norm_weights_may_be_kept_around_zero(ops: CpuOps) -> None:
    x, weight = randn(5, 37), randn(37, seed=1) * 0.1
    expected = REFERENCE.rms_norm(x.double(), 1 + weight.double(), 1e-5)
    torch.testing.assert_close(REFERENCE.rms_norm(x.double(), weight.double(), 1e-5, 1.0), expected)
    assert_near(ops.rms_norm(x, weight, 1e-5, 1.0), expected, ulps=6)


def test_embed_takes_int32_and_checks_range(ops: CpuOps) -> None:
    weight = randn(11, 8)
    ids = torch.tensor([10, 0, 10], dtype=torch.int32)
    assert torch.equal(ops.embed(ids, Linear.of(weight)), weight[[10, 0, 10]])
    with pytest.raises(IndexError):
        ops.embed(ids + 1, Linear.of(weight))


# ---- attention ----------------------------------------------------------------------------------------------------


SHAPES = [
    Shape(),
    Shape(4, 4, 16, 1),
    Shape(8, 1, 128, 32),
    Shape(10, 2, 80, 16),
    Shape(6, 3, 24, 5),
    Shape(2, 1, 8, 32),
    Shape(7, 1, 256, 16),
    Shape(100, 2, 40, 16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_attention_matches_float64(ops: CpuOps, shape: Shape, norm: bool) -> None:
    lengths = [1, 70, 200, 33]
    layers = [Layer(ops, shape, lengths, torch.float32, 7), Layer(REFERENCE, shape, lengths, torch.float64, 7)]
    steps = [[(1, 64), (2, 150)], [(0, 1), (1, 1), (2, 49), (3, 32)], [(2, 1), (1, 5), (3, 1)]]
    for step in steps:
        actual, expected = (layer.append(step, norm) for layer in layers)
        assert_near(actual, expected, ulps=48)
    written = ~layers[1].kv.isnan()
    assert torch.equal(written, ~layers[0].kv.isnan())
    torch.testing.assert_close(layers[0].kv.double()[written], layers[1].kv[written], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [Shape(), Shape(4, 4, 80, 32), Shape(8, 1, 128, 7)], ids=str)
def test_attention_is_bitwise_independent_of_chunks_batch_and_blocks(ops: CpuOps, shape: Shape) -> None:
    lengths = [150, 97]
    whole = Layer(ops, shape, lengths, torch.float32, 3)
    for b, n in enumerate(lengths):
        whole.append([(b, n)])
    for chunk in (1, 7, 64):
        pieces = Layer(ops, replace(shape, block_size=shape.block_size + chunk % 2), lengths, torch.float32, 3)
        while step := [
            (b, min(chunk, n - pieces.contexts[b])) for b, n in enumerate(lengths) if n > pieces.contexts[b]
        ]:
            pieces.append(step)
        for b in range(len(lengths)):
            assert torch.equal(torch.cat(pieces.outputs[b]), whole.outputs[b][0])


@pytest.mark.parametrize("head_dim", [16, 64])
def test_attention_of_extreme_scores(ops: CpuOps, head_dim: int) -> None:
    shape = Shape(2, 1, head_dim, 16)
    layers = [Layer(o, shape, [120], t, 1) for o, t in ((ops, torch.float32), (REFERENCE, torch.float64))]
    for layer in layers:
        layer.inputs[0][:, : 3 * head_dim] *= 30.0
        layer.append([(0, 120)])
    assert_near(layers[0].outputs[0][0], layers[1].outputs[0][0], ulps=2000)


def test_a_token_without_slot_is_an_error(ops: CpuOps) -> None:
    layer = Layer(ops, Shape(), [40], torch.float32, 0)
    batch = layer.batch([(0, 20)])
    qkv = layer.inputs[0][:20].clone()
    for bad in (
        replace(batch, positions=batch.positions + 4090),
        replace(batch, positions=batch.positions - 1),
        replace(batch, block_tables=batch.block_tables[:, :1].contiguous()),
        replace(batch, block_tables=batch.block_tables + 1000),
    ):
        with pytest.raises(EngineError, match="slot"):
            ops.rotate_and_append(qkv, layer.rope, layer.kv, bad)
    with pytest.raises(EngineError, match="block table"):
        ops.attention(qkv, layer.kv, replace(batch, block_tables=batch.block_tables - 1000), 9)
    assert not layer.kv[[i for i in range(len(layer.kv)) if i not in layer.tables[0]]].isfinite().any()


# ---- choosing and building ----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty kernel cache."""
    monkeypatch.setenv("KUNSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cache"


def test_kernels_are_built_once_and_leave_nothing_else(cache: Path) -> None:
    try:
        load_kernels()
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
    (library,) = (cache / "kernels").iterdir()
    stamp = library.stat().st_mtime_ns
    assert isinstance(load_kernels(), ctypes.CDLL)
    assert [(p.name, p.stat().st_mtime_ns) for p in (cache / "kernels").iterdir()] == [(library.name, stamp)]


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [("PATH", "", "no C compiler"), ("CC", "/nowhere/cc", "cannot run"), ("CC", "false", "failed with 1")],
)
def test_without_a_compiler_the_reference_is_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(variable, value)
    ops, why = cpu_ops_or_reference(torch.float32)
    assert isinstance(ops, TorchOps) and reason in why and "\n" not in why
    assert not list((cache / "kernels").iterdir())


def test_a_cache_that_cannot_be_used_is_no_failure(cache: Path) -> None:
    cache.write_text("not a folder")
    ops, why = cpu_ops_or_reference(torch.float32)
    assert isinstance(ops, TorchOps) and "kernel cache" in why


def test_the_reference_is_used_for_what_kernels_do_not_cover() -> None:
    for dtype, head_dim, reason in [
        (torch.float64, 64, "float64"),
        (torch.float32, 20, "20"),
        (torch.float32, 264, "264"),
    ]:
        ops, why = cpu_ops_or_reference(dtype, head_dim)
        assert isinstance(ops, TorchOps) and reason in why


def test_reference_attention_is_scaled_dot_product_attention() -> None:
    layer = Layer(REFERENCE, Shape(4, 2, 16, 4), [11], torch.float64, 5)
    batch, qkv = layer.batch([(0, 11)]), layer.inputs[0].clone()
    REFERENCE.rotate_and_append(qkv, layer.rope, layer.kv, batch)
    q = qkv[:, :64].view(11, 4, 16).transpose(0, 1)
    blocks = layer.kv[layer.tables[0]]
    keys, values = (blocks[:, i].transpose(0, 1).reshape(2, -1, 16)[:, :11] for i in range(2))
    expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(REFERENCE.attention(qkv, layer.kv, batch, 4), expected.transpose(0, 1).flatten(1))
    rotated = torch.complex(*layer.inputs[0][3, :16].view(2, 8)) * torch.complex(*layer.rope[3].view(2, 8))
    torch.testing.assert_close(qkv[3, :16], torch.cat([rotated.real, rotated.imag]))
