"""The CUDA operations that need no GPU: torch's against the reference, and Triton's in its interpreter."""

from __future__ import annotations

import pytest
import torch
from op_layers import randn
from torch import Tensor

from kunserve.compute.cuda.ops import CudaOps, Kernels, TorchKernels, cuda_dtype
from kunserve.compute.torch_ops import TorchOps
from kunserve.errors import ConfigError
from kunserve.model.quant.linear import Linear


def test_linear_adds_bias_and_residual() -> None:
    x, w, b, r = randn(5, 8, seed=0), Linear.of(randn(6, 8, seed=1)), randn(6, seed=2), randn(5, 6, seed=3)
    ops, reference = CudaOps(TorchKernels()), TorchOps()
    for bias in (None, b):
        for residual in (None, r):
            torch.testing.assert_close(ops.linear(x, w, bias, residual), reference.linear(x, w, bias, residual))


@pytest.mark.parametrize(
    ("name", "checkpoint", "dtype"),
    [
        ("auto", "bfloat16", torch.bfloat16),
        ("auto", "float32", torch.float32),
        ("float16", "bfloat16", torch.float16),
        ("float32", "bfloat16", torch.float32),
    ],
)
def test_dtypes(name: str, checkpoint: str, dtype: torch.dtype) -> None:
    assert cuda_dtype(name, checkpoint) is dtype


@pytest.mark.parametrize(("name", "checkpoint"), [("float8_e4m3fn", "bfloat16"), ("auto", "float8_e4m3fn")])
def test_other_dtypes_are_refused(name: str, checkpoint: str) -> None:
    with pytest.raises(ConfigError, match="float8_e4m3fn is not served on CUDA devices; use one of float32, float16"):
        cuda_dtype(name, checkpoint)


@pytest.fixture(scope="module")
def triton_kernels() -> Kernels:
    """Triton's kernels in its interpreter (tests/conftest.py asks for it)."""
    if torch.cuda.is_available():
        pytest.skip("gpu_check compares the compiled kernels on this machine's GPU")
    from kunserve.compute.cuda.kernels import TritonKernels

    return TritonKernels()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Within two roundings of the dtype."""
    torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(actual.dtype).eps, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_norm_and_activation(triton_kernels: Kernels, dtype: torch.dtype) -> None:
    reference = TorchKernels()
    x, weight = randn(5, 576, seed=0, dtype=dtype), randn(576, seed=1, dtype=dtype)
    assert_near(triton_kernels.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    y = randn(5, 576, seed=3, dtype=dtype)
    total, normed = triton_kernels.add_and_norm(x, y, weight, 1e-5)
    assert_near(total, x + y)
    assert_near(normed, reference.rms_norm(total, weight, 1e-5))
    gate_up = randn(3, 2 * 1536, seed=2, dtype=dtype)
    assert_near(triton_kernels.act_and_mul(gate_up), reference.act_and_mul(gate_up))


@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_rotate_and_append(triton_kernels: Kernels, dtype: torch.dtype, head_dim: int, is_normed: bool) -> None:
    num_heads, num_kv_heads = 4, 2
    positions = torch.tensor([0, 7, 3, 49, 5, 0], dtype=torch.int32)
    slots = torch.tensor([3, 17, 8, 0, 39, -1], dtype=torch.int32)
    rope = randn(50, head_dim, seed=3, dtype=dtype)
    q_norm, k_norm = (randn(head_dim, seed=i, dtype=dtype) if is_normed else None for i in (4, 5))
    results = []
    for kernels in (triton_kernels, TorchKernels()):
        qkv = randn(6, (num_heads + 2 * num_kv_heads) * head_dim, seed=6, dtype=dtype)
        kv = torch.zeros(10, 2, num_kv_heads, 4, head_dim, dtype=dtype)
        kernels.rotate_and_append(qkv, rope, kv, positions, slots, q_norm, k_norm, 1e-5)
        results.append((qkv[:5, : num_heads * head_dim], kv))
    for actual, expected in zip(*results, strict=True):
        scale = expected.float().abs().max()
        assert (actual.float() - expected.float()).abs().max() <= 2 * torch.finfo(dtype).eps * scale
        assert expected.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_rounds_kv_of_8_bits_as_torch_does(triton_kernels: Kernels, dtype: torch.dtype) -> None:
    """All numbers of 16 bits; of 32 bits whatever is near the middle between two of 8, and many at random."""
    head_dim, num_tokens = 4096, 16
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    if dtype is torch.float32:
        known = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        middle = ((known[1:] + known[:-1]) / 2).view(torch.int32)
        near = torch.cat([middle - 1, middle, middle + 1, known.view(torch.int32)])
        random = torch.randint(-(1 << 31), 1 << 31, ((1 << 16) - 2 * len(near),), dtype=torch.int32)
        numbers = torch.cat([near, near | -(1 << 31), random])
    numbers = numbers.view(dtype)
    values = numbers.view(num_tokens, head_dim)
    results = []
    for kernels in (triton_kernels, TorchKernels()):
        qkv = torch.cat([torch.zeros_like(values), torch.ones_like(values), values], 1)
        kv = torch.zeros(2, 2, 1, num_tokens, head_dim, dtype=torch.float8_e4m3fn)
        slots = torch.arange(num_tokens, dtype=torch.int32)
        kernels.rotate_and_append(qkv, torch.ones(num_tokens, 64, dtype=dtype), kv, slots, slots + 3, None, None, 0.0)
        blocks = kv.flatten(2, 3).view(torch.uint8)  # (block, key or value, slot, head_dim)
        results.append([of_kind.flatten(0, 1)[3 : num_tokens + 3].flatten() for of_kind in blocks.unbind(1)])
    (keys, actual), (expected_keys, expected) = results
    assert torch.equal(keys, expected_keys)
    kept, is_number = actual.view(torch.float8_e4m3fn).float(), ~numbers.isnan()
    assert torch.equal(actual[is_number], expected[is_number])  # the sign of what is no number is nobody's
    assert torch.equal(~kept.isnan(), is_number)
    is_large = numbers.abs() > 448  # infinite, too
    assert torch.equal(kept[is_large], numbers[is_large].sign().float() * 448)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_triton_rotates_before_it_rounds_to_8_bits(triton_kernels: Kernels, head_dim: int, dtype: torch.dtype) -> None:
    results = []
    for kv_dtype in (torch.float8_e4m3fn, dtype):
        qkv, rope = randn(6, 8 * head_dim, seed=6, dtype=dtype), randn(50, head_dim, seed=3, dtype=dtype)
        kv = torch.zeros(10, 2, 2, 4, head_dim, dtype=kv_dtype)
        positions, slots = (torch.tensor(t, dtype=torch.int32) for t in ([0, 7, 3, 49, 5, 0], [3, 17, 8, 0, 39, -1]))
        q_norm, k_norm = (randn(head_dim, seed=i, dtype=dtype) for i in (4, 5))
        triton_kernels.rotate_and_append(qkv, rope, kv, positions, slots, q_norm, k_norm, 1e-5)
        results.append((qkv, kv))
    (q, kv), (same_q, wide) = results
    assert torch.equal(q, same_q) and wide.any()
    assert torch.equal(kv.view(torch.uint8), wide.to(torch.float8_e4m3fn).view(torch.uint8))
