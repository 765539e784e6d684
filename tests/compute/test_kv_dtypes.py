"""KV of 16 bits: appended, it is rounded as torch rounds; attention over it is that over the rounded floats."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_layers import REFERENCE, Layer, Shape, assert_near, randn

from kunserve.compute.cpu_kernels import KernelsUnavailableError, load_kernels
from kunserve.compute.cpu_ops import CpuOps
from kunserve.compute.ops import PLAIN_SCORES, Scores
from kunserve.compute.torch_ops import TorchOps

HALVES = [torch.float16, torch.bfloat16]
SHAPES = [
    Shape(),
    Shape(4, 4, 16, 1),
    Shape(10, 2, 80, 16),
    Shape(6, 3, 24, 5),
    Shape(7, 1, 256, 16),
    Shape(2, 1, 8, 32),
]
STEPS = [[(1, 64), (2, 150)], [(0, 1), (1, 1), (2, 49), (3, 32)], [(2, 1), (1, 5), (3, 1)]]


@pytest.fixture(params=["as other tests", "no F16C"], scope="module")
def halves_ops(request: pytest.FixtureRequest, ops: CpuOps) -> CpuOps:
    """The kernels, and those of a CPU that has no instructions for numbers of 16 bits."""
    if request.param == "as other tests":
        return ops
    try:
        return CpuOps(load_kernels(("-mno-f16c",)))
    except KernelsUnavailableError as error:
        pytest.skip(str(error))


def halved(ops: CpuOps | TorchOps, shape: Shape, lengths: list[int], dtype: torch.dtype, scores: Scores) -> Layer:
    sinks = randn(shape.num_heads, seed=5) * 2 if scores.window else None
    layer = Layer(ops, shape, lengths, torch.float32, 7, scores, sinks)
    layer.kv = layer.kv.to(dtype)
    return layer


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scores", [PLAIN_SCORES, Scores(window=40, softcap=3.0)], ids=["plain", "window"])
def test_attention_is_that_over_the_rounded_floats_bitwise(
    halves_ops: CpuOps, shape: Shape, dtype: torch.dtype, scores: Scores
) -> None:
    layer = halved(halves_ops, shape, [1, 70, 200, 33], dtype, scores)
    for step in STEPS:
        batch = layer.batch(step)
        qkv = torch.cat([layer.inputs[b][layer.contexts[b] :][:n] for b, n in step])
        wide = layer.kv.float()
        both = [qkv.clone(), qkv.clone()]
        for one, kv in zip(both, (wide, layer.kv), strict=True):
            layer.ops.rotate_and_append(one, layer.rope, kv, batch, *layer.norms, 1e-6)
        assert torch.equal(layer.kv.isnan(), wide.isnan())
        assert torch.equal(layer.kv.nan_to_num(), wide.to(dtype).nan_to_num())  # rounded once, as torch does
        out = layer.ops.attention(both[1], layer.kv, batch, shape.num_heads, scores, layer.sinks)
        same = layer.ops.attention(both[0], layer.kv.float(), batch, shape.num_heads, scores, layer.sinks)
        assert torch.equal(out, same) and out.isfinite().all() and out.std() > 0
        expected = REFERENCE.attention(both[0].double(), layer.kv.double(), batch, shape.num_heads, scores, layer.sinks)
        assert_near(out, expected, ulps=64)
        for b, n in step:
            layer.contexts[b] += n


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_it_is_bitwise_independent_of_chunks_batch_and_blocks(halves_ops: CpuOps, dtype: torch.dtype) -> None:
    shape, lengths = Shape(), [150, 97]
    whole = halved(halves_ops, shape, lengths, dtype, PLAIN_SCORES)
    for b, n in enumerate(lengths):
        whole.append([(b, n)])
    for chunk in (1, 7, 64):
        pieces = halved(halves_ops, replace(shape, block_size=16 + chunk % 2), lengths, dtype, PLAIN_SCORES)
        while step := [
            (b, min(chunk, n - pieces.contexts[b])) for b, n in enumerate(lengths) if n > pieces.contexts[b]
        ]:
            pieces.append(step)
        for b in range(len(lengths)):
            assert torch.equal(torch.cat(pieces.outputs[b]), whole.outputs[b][0])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_numbers_are_rounded_as_torch_rounds_them(halves_ops: CpuOps, dtype: torch.dtype) -> None:
    """Ties, subnormal numbers, those too large, infinities, and what is no number."""
    bits = torch.randint(-(1 << 31), 1 << 31, (40 * 64,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    near_ties = torch.arange(-640, 640, dtype=torch.int32) * 0x1000 + 0x3F800000
    special = [0.0, -0.0, 65504.0, 65519.9, 65520.0, 1e-8, 2.0**-25, 1.5 * 2.0**-25, 3.4e38, float("inf"), -1e-40]
    values = torch.cat([bits.view(torch.float32), near_ties.view(torch.float32), torch.tensor(special)])
    values = torch.cat([values, torch.full((-len(values) % 64,), float("nan"))]).view(-1, 64)
    layer = halved(halves_ops, Shape(1, 1, 64, 16), [len(values)], dtype, PLAIN_SCORES)
    qkv = torch.cat([torch.zeros(len(values), 128), values], dim=1)
    layer.ops.rotate_and_append(qkv, layer.rope, layer.kv, layer.batch([(0, len(values))]))
    stored = torch.cat([layer.kv[block, 1, 0] for block in layer.tables[0]])[: len(values)]
    expected = values.to(dtype)
    assert torch.equal(stored.isnan(), expected.isnan()) and stored.isnan().any() and stored.isinf().any()
    assert torch.equal(stored.view(torch.int16)[~stored.isnan()], expected.view(torch.int16)[~stored.isnan()])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_reference_serves_it_too(dtype: torch.dtype, ops: CpuOps) -> None:
    """Where there is no C compiler."""
    layers = [halved(o, Shape(), [70], dtype, PLAIN_SCORES) for o in (ops, REFERENCE)]
    for layer in layers:
        layer.append([(0, 64)])
        layer.append([(0, 6)])
    actual, expected = (torch.cat(layer.outputs[0]) for layer in layers)
    torch.testing.assert_close(actual, expected, rtol=1e-3 if dtype is torch.float16 else 1e-2, atol=1e-2)
