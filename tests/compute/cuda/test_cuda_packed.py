"""Products with packed matrices: Triton's kernels in its interpreter against the reference; torch's rules for FP8.

In float16, as the interpreter has no product of bfloat16s.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpucheck.packed import random_part
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kunserve.compute.cuda import kernels, packed
from kunserve.compute.cuda.kernels import TritonKernels
from kunserve.compute.cuda.ops import CudaOps, TorchKernels
from kunserve.model.quant.linear import Linear, StoredRows
from kunserve.model.quant.planes import Planes, every_planes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="gpu_check compares the compiled kernels")
K = 256
FORMS = {f"{one.kind} of {one.group or 'rows'} by {one.step}, {one.scale_dtype}": one for one in every_planes()}


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(actual: Tensor, x: Tensor, part: StoredRows, *added: Tensor | None) -> None:
    """Within the rounding of the result, and of sums in float32, of what float64 makes of the same rounded matrix."""
    matrix = part.dense().to(x.dtype).double()
    expected, size = x.double() @ matrix.t(), x.double().abs() @ matrix.abs().t()
    for more in added:
        expected, size = (expected, size) if more is None else (expected + more.double(), size + more.double().abs())
    bound = 4 * torch.finfo(x.dtype).eps * expected.abs() + 1e-6 * size
    assert actual.dtype is x.dtype and actual.shape == expected.shape
    assert bool(((actual.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("num_rows", [1, 2, 16, 129])
@pytest.mark.parametrize("form", FORMS)
def test_the_product_is_that_of_the_matrix_as_numbers(form: str, num_rows: int) -> None:
    part, x = random_part(FORMS[form], 70, K), randn(num_rows, K, seed=1, dtype=torch.float16)
    assert_near(packed.packed_linear(x, part), x, part)


@pytest.mark.parametrize("form", ["A4 of 64 by 64, float32", "A8 of 32 by 32, float16", "F8 of rows by 128, float32"])
def test_in_float32(form: str) -> None:
    part, x = random_part(FORMS[form], 1, 2 * K), randn(5, 2 * K, seed=2)
    assert_near(packed.packed_linear(x, part), x, part)


@pytest.mark.parametrize("num_rows", [3, 150])
@pytest.mark.parametrize(("has_bias", "has_residual"), [(True, False), (False, True), (True, True)])
def test_bias_and_residual_are_added(num_rows: int, has_bias: bool, has_residual: bool) -> None:
    part, x = random_part(FORMS["A4 of 32 by 32, float32"], 66, K), randn(num_rows, K, seed=3)
    bias = randn(66, seed=4) if has_bias else None
    residual = randn(num_rows, 200, seed=5)[:, 20:86] if has_residual else None  # its rows lie apart
    assert_near(packed.packed_linear(x, part, bias, residual), x, part, bias, residual)


def test_columns_are_shared_out_where_rows_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    part, x, residual = (
        random_part(FORMS["A8 of 64 by 64, float32"], 70, 640),
        randn(2, 640, seed=6),
        randn(2, 70, seed=7),
    )
    taken: list[int] = []
    kernel = packed.sum_parts

    class Seen:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(parts: Tensor, *rest: object, **constants: object) -> None:
                taken.append(len(parts))
                kernel[grid](parts, *rest, **constants)

            return launch

    monkeypatch.setattr(packed, "sum_parts", Seen())
    assert_near(packed.packed_linear(x, part, None, residual), x, part, residual)
    assert taken == [5]  # of forty turns


@pytest.mark.parametrize(
    ("num_programs", "num_turns", "span"),
    [(64, 64, 8), (64, 224, 28), (448, 64, 64), (2004, 64, 64), (1, 3, 3), (1, 17, 9)],
)
def test_enough_programs_of_enough_turns(num_programs: int, num_turns: int, span: int) -> None:
    assert packed.turns_per_program(num_programs, num_turns) == span


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = torch.empty(x.shape, dtype=torch.float8_e4m3fn), torch.empty(len(x), 1)
    packed.quantize_rows[(len(x),)](x, codes, scale, x.shape[1], BLOCK=packed.QUANTIZED)
    return codes, scale


@pytest.mark.parametrize("num_rows", [1, 33])
def test_rows_become_floats_of_8_bits_with_their_scale(num_rows: int) -> None:
    x = randn(num_rows, 5000, seed=8, dtype=torch.bfloat16)  # more than a program takes at a time
    x[0, :] *= 1e-3
    codes, scale = quantized(x)
    expected = x.float().abs().amax(1, keepdim=True) / 448
    torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0)
    error, size = (codes.float() * scale - x.float()).abs(), x.float().abs()
    # The interpreter garbles what is below the smallest normal number, and what is rounded up to a power of two.
    is_judged = (size >= scale * 2**-6) & ((size / scale).frexp().mantissa < 0.96)
    assert is_judged.float().mean() > 0.8
    assert bool((error <= 1.001 * size / 16)[is_judged].all())  # half a unit of three bits


def test_a_row_of_zeros_stays_one() -> None:
    codes, scale = quantized(torch.zeros(2, 64, dtype=torch.bfloat16))
    assert not codes.float().any() and bool((scale > 0).all())


@pytest.mark.parametrize("num_rows", [1, 2, 16, 129])
def test_fp8_is_the_product_of_quantized_rows(num_rows: int) -> None:
    part, x = random_part(FORMS["F8 of rows by 128, float32"], 64, K), randn(num_rows, K, seed=9, dtype=torch.bfloat16)
    bias, residual = randn(64, seed=10, dtype=torch.bfloat16), randn(num_rows, 64, seed=11, dtype=torch.bfloat16)
    codes, scale = quantized(x)
    exact = (codes.float() * scale) @ part.dense().t()
    for more in ((None, None), (bias, None), (None, residual), (bias, residual)):
        found = TritonKernels(has_fp8=True).packed_linear(x, part, *more)
        expected = exact + sum(added.float() for added in more if added is not None)
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize(("has_fp8", "is_scaled"), [(True, True), (False, False)])
def test_without_tensor_cores_for_them_floats_are_unpacked(has_fp8: bool, is_scaled: bool) -> None:
    part, x = random_part(FORMS["F8 of rows by 128, float32"], 64, K), randn(3, K, seed=17, dtype=torch.bfloat16)
    taken: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("packed_linear", "scaled_linear"):
            patch.setattr(kernels, name, lambda *_, name=name: taken.append(name))
        TritonKernels(has_fp8=has_fp8).packed_linear(x, part)
    assert taken == ["scaled_linear" if is_scaled else "packed_linear"]


def test_fp8_is_only_where_torch_takes_the_matrix() -> None:
    x = randn(3, K, seed=12, dtype=torch.bfloat16)
    rows, groups = FORMS["F8 of rows by 128, float32"], FORMS["F8 of 128 by 128, float32"]
    assert packed.can_scale(x, random_part(rows, 32, K))
    assert not packed.can_scale(x.half(), random_part(rows, 32, K))
    assert not packed.can_scale(x, random_part(rows, 33, K))
    assert not packed.can_scale(x, random_part(groups, 32, K))
    assert not packed.can_scale(x, random_part(FORMS["A8 of rows by 128, float32"], 32, K))


@pytest.mark.parametrize("num_rows", [1, 129])
def test_torch_accepts_the_operands_on_a_gpu(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch checks of them before it launches anything, on tensors without memory."""

    class Nothing:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **__: None

    monkeypatch.setattr(packed, "quantize_rows", Nothing())
    with FakeTensorMode():
        x = torch.empty(num_rows, K, dtype=torch.bfloat16, device="cuda")

        def rows(num: int) -> StoredRows:
            codes = torch.empty(num, K, dtype=torch.uint8, device="cuda")
            return StoredRows(codes, FORMS["F8 of rows by 128, float32"], torch.empty(num, 1, device="cuda"))

        bias = torch.empty(64, dtype=torch.bfloat16, device="cuda")
        y = packed.scaled_linear(x, rows(64), bias)
        assert y.shape == (num_rows, 64) and y.dtype is torch.bfloat16 and y.device.type == "cuda"
        with pytest.raises(RuntimeError, match="divisible by 16"):  # what `can_scale` keeps from it
            packed.scaled_linear(x, rows(60))


@pytest.mark.parametrize("has_residual", [False, True])
def test_a_matrix_of_several_parts(has_residual: bool) -> None:
    """As q, k and v of a GGUF file, each in a format of its own."""
    numbers = StoredRows(randn(10, K, seed=13))
    parts = (
        random_part(FORMS["A4 of 32 by 32, float32"], 24, K),
        random_part(FORMS["A8 of 64 by 64, float32"], 8, K),
        numbers,
    )
    weight, x, bias = Linear(parts), randn(3, K, seed=14), randn(42, seed=15)
    residual = randn(3, 42, seed=16) if has_residual else None
    expected = x @ weight.dense(torch.float32).t() + bias + (0 if residual is None else residual)
    for made in (TritonKernels(), TorchKernels()):
        found = CudaOps(made).linear(x, weight, bias, residual)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_rows_of_an_embedding_are_unpacked() -> None:
    part = random_part(Planes.of("A8", 32, 32, "float16"), 40, K)
    ids = torch.tensor([7, 39, 7], dtype=torch.int32)
    assert torch.equal(CudaOps(TritonKernels()).embed(ids, Linear((part,))), part.dense()[ids.long()])
