"""Products with matrices that stay packed on a GPU (model/quant/planes.py): a kernel of ours, or torch's own for FP8.

The kernel takes codes apart in registers, rounds what they stand for to the activations' dtype, as a matrix that was
dequantized while loading would hold it, and sums in float32. The product is computed transposed: the weights' rows are
the side of which a tensor core wants 64 at once, while a decode step may have one row of activations. For few rows the
columns of a matrix are shared out, too, as its rows alone do not fill a GPU; a second launch then sums, in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kunserve.model.quant.linear import StoredRows
from kunserve.model.quant.planes import KINDS, Planes
from kunserve.sizes import ceil_div

COLUMNS = 64  # rows of the matrix, of a program: columns of what comes out
FEW_ROWS, MANY_ROWS = 16, 64  # of activations, of a program
MAX_SHARED_ROWS = 128  # up to so many the matrix's columns are shared out
INNER_BYTES = {"A4": 32, "A8": 64, "F8": 64}  # of a row of codes, at a time
WIDE_INNER_BYTES = 16  # the same for float32, which takes twice the registers
WANTED_PROGRAMS = 512  # that fill a GPU of 132 multiprocessors
MIN_TURNS = 8  # of a program: fewer are not worth their sum
NUM_STAGES = 3  # turns whose loads are under way
SUMMED = 1024  # numbers of a program that sums
QUANTIZED = 4096  # columns at a time


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _float8(codes):  # type: ignore[no-untyped-def]
    """Return e4m3 / 256 in float32: its bits are those of a float16 whose exponent has another bias. On any GPU."""
    wide = codes.to(tl.uint16)
    bits = (wide & 128) << 8 | (wide & 127) << 7
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["T", "group", "numbers", "span", "num_turns", "added_stride", "has_added"])  # type: ignore[untyped-decorator, unused-ignore]
def packed_product(  # type: ignore[no-untyped-def]
    x, codes, scales, added, out, T, N, K, row_bytes, half, group, numbers, span, num_turns, added_stride, has_added,
    KIND: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Compute out[p, t, n] = sum over the p-th `span` of k: x[t, k] * weight[n, k]; plus added[t * added_stride + n].

    A turn takes INNER bytes of each row. Rows beyond T or N are computed from the last, and not written: nothing in the
    loop is masked. What differs within a tile are offsets of 32 bits: of 64 they would take half of the registers.
    """
    column, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, t = column * COLUMNS + tl.arange(0, COLUMNS), block * ROWS + tl.arange(0, ROWS)
    is_out = (n < N)[:, None] & (t < T)[None, :]
    row, token = tl.minimum(n, N - 1) - column * COLUMNS, tl.minimum(t, T - 1) - block * ROWS
    codes += (column * COLUMNS).to(tl.int64) * row_bytes
    scales += (column * COLUMNS).to(tl.int64) * numbers
    x += (block * ROWS).to(tl.int64) * K
    k = tl.arange(0, INNER)
    of_codes, of_x = row[:, None] * row_bytes + k[None, :], token[None, :] * K + k[:, None]
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    for turn in range(part * span, tl.minimum(part * span + span, num_turns)):
        start = turn * INNER
        packed = tl.load(codes + start + of_codes)
        if KIND == 0:
            start += start // half * half  # column of the low halves
        pointer = scales + row * numbers
        if KIND == 2:
            values = _float8(packed) * (tl.load(pointer + start // group).to(tl.float32) * 256.0)[:, None]
        else:
            pointer += start // group * 2
            scale = tl.load(pointer).to(tl.float32)[:, None]
            offset = tl.load(pointer + 1).to(tl.float32)[:, None]
            low = packed & 15 if KIND == 0 else packed
            values = tl.fma(low.to(tl.float32), scale, offset)
        near = tl.load(x + start + of_x)
        total = tl.dot(values.to(near.dtype), near, total, input_precision=PRECISION)
        if KIND == 0:
            values = tl.fma((packed >> 4).to(tl.float32), scale, offset)
            far = tl.load(x + start + half + of_x)
            total = tl.dot(values.to(far.dtype), far, total, input_precision=PRECISION)
    t = t.to(tl.int64)
    more = tl.load(added + t[None, :] * added_stride + n[:, None], is_out & (has_added != 0), other=0.0)
    total += more.to(tl.float32)
    tl.store(out + ((part * T + t[None, :]) * N + n[:, None]), total.to(out.dtype.element_ty), is_out)


@triton.jit(do_not_specialize=["size", "num_parts", "added_stride", "has_added"])  # type: ignore[untyped-decorator, unused-ignore]
def sum_parts(  # type: ignore[no-untyped-def]
    parts, added, out, size, N, num_parts, added_stride, has_added, BLOCK: tl.constexpr
):
    """Sum over parts, in order: out[i] = sum of parts[p, i]; plus what `packed_product` adds. size: T * N."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_out = i < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(num_parts):
        total += tl.load(parts + part * size + i, is_out, other=0.0)
    more = tl.load(added + i // N * added_stride + i % N, is_out & (has_added != 0), other=0.0)
    tl.store(out + i, (total + more.to(tl.float32)).to(out.dtype.element_ty), is_out)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def quantize_rows(x, codes, scales, K, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write each row of x (T, K) as floats of 8 bits (e4m3), with the scale that makes its largest one 448."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        largest = tl.maximum(largest, tl.abs(tl.load(x + row * K + start + i, start + i < K, other=0.0).to(tl.float32)))
    scale = tl.maximum(tl.max(largest, 0), 1e-12) / 448.0
    tl.store(scales + row, scale)
    for start in range(0, K, BLOCK):
        is_in = start + i < K
        values = tl.load(x + row * K + start + i, is_in, other=0.0).to(tl.float32) / scale
        tl.store(codes + row * K + start + i, values.to(tl.float8e4nv), is_in)


def packed_linear(x: Tensor, weight: StoredRows, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """See Kernels.packed_linear."""
    planes, scales = weight.blocks, weight.scales
    assert isinstance(planes, Planes) and scales is not None
    (T, K), (N, row_bytes) = x.shape, weight.data.shape
    added = bias if residual is None else residual
    stride = residual.stride(0) if residual is not None else 0
    has_added = int(added is not None)
    is_wide = x.dtype is torch.float32
    half = planes.step // 2 if planes.kind == "A4" else planes.step
    inner = WIDE_INNER_BYTES if is_wide else min(half, INNER_BYTES[planes.kind])
    rows = FEW_ROWS if is_wide or T <= FEW_ROWS else MANY_ROWS
    grid, num_turns = (ceil_div(N, COLUMNS), ceil_div(T, rows)), row_bytes // inner
    is_shared = T <= MAX_SHARED_ROWS
    span = turns_per_program(grid[0] * grid[1], num_turns) if is_shared else num_turns
    num_parts = ceil_div(num_turns, span)
    out = torch.empty(T, N, dtype=x.dtype, device=x.device)
    parts = torch.empty(num_parts, T, N, dtype=torch.float32, device=x.device) if is_shared else out
    packed_product[(*grid, num_parts)](
        x, weight.data, scales, out if added is None or is_shared else added, parts,
        T, N, K, row_bytes, half, planes.group or K, scales.shape[1], span, num_turns,
        stride, 0 if is_shared else has_added,
        KIND=KINDS.index(planes.kind), PRECISION="ieee" if is_wide else "tf32",
        ROWS=rows, COLUMNS=COLUMNS, INNER=inner, num_warps=4, num_stages=NUM_STAGES,
    )  # fmt: skip
    if is_shared:
        sum_parts[(ceil_div(T * N, SUMMED),)](
            parts, out if added is None else added, out, T * N, N, num_parts, stride, has_added, BLOCK=SUMMED
        )
    return out if bias is None or residual is None else out + bias


def turns_per_program(num_programs: int, num_turns: int) -> int:
    """Return the turns of a program, where so many of them would take all turns: enough that there are enough."""
    return ceil_div(num_turns, max(1, min(WANTED_PROGRAMS // num_programs, num_turns // MIN_TURNS)))


def can_scale(x: Tensor, weight: StoredRows) -> bool:
    """Tell whether torch's product of 8-bit floats takes a matrix as it is stored: to bfloat16, and by 16 only."""
    planes = weight.blocks
    is_by_row = isinstance(planes, Planes) and planes.kind == "F8" and planes.group is None
    return is_by_row and x.dtype is torch.bfloat16 and weight.num_rows % 16 == 0 and weight.num_columns % 16 == 0


def scaled_linear(x: Tensor, weight: StoredRows, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """See Kernels.packed_linear, for `can_scale`: activations become floats of 8 bits, with a scale for each row."""
    assert weight.scales is not None
    T, K = x.shape
    codes = torch.empty(T, K, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(T, 1, dtype=torch.float32, device=x.device)
    quantize_rows[(T,)](x, codes, scale, K, BLOCK=QUANTIZED, num_warps=8)
    matrix = weight.data.view(torch.float8_e4m3fn).t()
    y = torch._scaled_mm(codes, matrix, scale, weight.scales.t(), bias=bias, out_dtype=x.dtype)
    return y if residual is None else y + residual
