"""A mixture of experts as two grouped matrix products in Triton. Nothing waits for the host: graphs can hold it.

Rows are put in the order of their experts, and each expert's are padded to whole blocks; how many blocks there can be
at most depends on shapes alone, so that the grid does too. A block of padding computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
import triton
import triton.language as tl
from torch import Tensor

from kunserve.compute.ops import ExpertWeights
from kunserve.sizes import ceil_div

# Of one program. With as many elements in float32 as in 16 bits it would have too few registers (sm_120).
BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER_BYTES = 16, 64, 128


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def expert_linear(  # type: ignore[no-untyped-def]
    x, weight, bias, out, pairs, block_experts, num_pairs, N, K,
    SHARED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Multiply a block of rows of one expert by its columns: out[p] = x[p // SHARED] @ weight[expert].T + bias."""
    block, column = tl.program_id(0), tl.program_id(1)
    expert = tl.load(block_experts + block).to(tl.int64)
    if expert >= 0:
        pair = tl.load(pairs + block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        is_row = pair < num_pairs
        n, k = column * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, INNER)
        rows = x + (pair // SHARED)[:, None] * K
        columns = weight + (expert * N + n)[None, :] * K
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, K, INNER):
            is_inner = start + k < K
            a = tl.load(rows + (start + k)[None, :], is_row[:, None] & is_inner[None, :], other=0.0)
            b = tl.load(columns + (start + k)[:, None], (n < N)[None, :] & is_inner[:, None], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        if HAS_BIAS:
            total += tl.load(bias + expert * N + n, n < N, other=0.0).to(tl.float32)[None, :]
        target = out + pair[:, None] * N + n[None, :]
        tl.store(target, total.to(out.dtype.element_ty), is_row[:, None] & (n < N)[None, :])


class Routes(NamedTuple):
    """Which rows go to which expert. T rows, k experts of each: a pair is a row and one of its experts."""

    weights: Tensor  # (T, k) float32
    pairs: Tensor  # (blocks * BLOCK_ROWS,) int32: by experts; T * k where there is padding
    block_experts: Tensor  # (blocks,) int32: the expert of each block; -1: all of it is padding


def route(logits: Tensor, num_per_token: int, normalize: bool) -> Routes:
    """Choose experts (T, E) -> routes, in operations whose shapes do not depend on what is chosen."""
    (T, E), device = logits.shape, logits.device
    top = logits.float().softmax(-1).topk(num_per_token, dim=-1)
    weights = top.values / top.values.sum(-1, keepdim=True) if normalize else top.values
    num_pairs, chosen = T * num_per_token, top.indices.flatten()
    num_blocks = ceil_div(num_pairs, BLOCK_ROWS) + min(E, num_pairs)
    counts = (chosen[:, None] == torch.arange(E, device=device)).sum(0)
    ends = ((counts + BLOCK_ROWS - 1) // BLOCK_ROWS).cumsum(0)  # blocks of the experts up to this one
    chosen, order = chosen.sort(stable=True)
    begins = (ends - (counts + BLOCK_ROWS - 1) // BLOCK_ROWS) * BLOCK_ROWS
    rank = torch.arange(num_pairs, device=device) - (counts.cumsum(0) - counts)[chosen]
    pairs = torch.full((num_blocks * BLOCK_ROWS,), num_pairs, dtype=torch.int32, device=device)
    pairs[begins[chosen] + rank] = order.int()
    experts = torch.searchsorted(ends, torch.arange(num_blocks, device=device), right=True)
    return Routes(weights, pairs, torch.where(experts < E, experts, -1).int())


def moe(x: Tensor, experts: ExpertWeights, act_and_mul: Callable[[Tensor, str, float], Tensor]) -> Tensor:
    """See kunserve.compute.ops.Ops.moe."""
    logits = F.linear(x, experts.router.dense(x.dtype), experts.router_bias)
    routes = route(logits, experts.num_per_token, experts.normalize)
    inner = _grouped(x, experts.gate_up, experts.gate_up_bias, routes, shared=experts.num_per_token)
    inner = act_and_mul(inner, experts.activation, experts.limit)
    parts = _grouped(inner, experts.down, experts.down_bias, routes, shared=1)
    parts = parts.view(len(x), experts.num_per_token, -1)
    return (parts.float() * routes.weights[..., None]).sum(1).to(x.dtype)


def _grouped(x: Tensor, weight: Tensor, bias: Tensor | None, routes: Routes, shared: int) -> Tensor:
    """Multiply each pair's row by its expert's matrix: (pairs, N); `shared` pairs have one row of `x`."""
    (_, N, K), num_pairs = weight.shape, routes.weights.numel()
    out = torch.empty(num_pairs, N, dtype=x.dtype, device=x.device)
    expert_linear[(len(routes.block_experts), triton.cdiv(N, BLOCK_COLUMNS))](
        x, weight, weight if bias is None else bias, out, routes.pairs, routes.block_experts, num_pairs, N, K,
        SHARED=shared, HAS_BIAS=bias is not None, PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
        ROWS=BLOCK_ROWS, COLUMNS=BLOCK_COLUMNS, INNER=BLOCK_INNER_BYTES // x.dtype.itemsize,
    )  # fmt: skip
    return out
