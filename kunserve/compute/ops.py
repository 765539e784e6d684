"""The operations a decoder is made of: the protocol, and the plain torch reference (any dtype, any device)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kunserve.model.quant.linear import Linear


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where the tokens of one microbatch stand on one stage. T tokens of B sequences, sequence by sequence.

    The K and V of the T new tokens are appended at `positions` before attention reads them (causal: a query at
    position p sees positions 0..p of its own sequence).
    """

    positions: Tensor  # (T,) int32: position of each token in its sequence
    cu_seqlens_q: Tensor  # (B + 1,) int32: sequence b has tokens cu_seqlens_q[b]..cu_seqlens_q[b + 1]
    context_lens: Tensor  # (B,) int32: tokens of sequence b whose KV exists once the new ones are appended
    block_tables: Tensor  # (B, W) int32: block ids on this stage; unused entries are 0
    block_size: int


class Ops(Protocol):
    """Operations on one device. Inputs are contiguous unless said otherwise; results are new tensors.

    `kv` is one layer's KV range: (num_blocks, 2, num_kv_heads, block_size, head_dim), [:, 0] keys, [:, 1] values. Its
    first dimension covers the reserved range; only mapped blocks are ever named by block tables.
    """

    def embed(self, token_ids: Tensor, weight: Linear) -> Tensor:
        """Rows of `weight` (V, H) for `token_ids` (T,) int32 -> (T, H); of blocks in float32."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square norm over the last dimension: (T, H) -> (T, H)."""

    def linear(self, x: Tensor, weight: Linear, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Return `residual + x @ weight.T + bias`: x (T, K), weight (N, K), bias (N,), residual (T, N) -> (T, N)."""

    def rotate_and_append(
        self,
        qkv: Tensor,
        rope: Tensor,
        kv: Tensor,
        batch: AttentionBatch,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """Norm (if given, per head) and rotate q and k, and write k and v into their slots of `kv`.

        qkv (T, (num_heads + 2 * num_kv_heads) * head_dim) is changed in place: its q part is what `attention` reads.
        rope (max_positions, head_dim): cosines in the first half of a row, sines in the second; the rotation is the
        "rotate half" of Hugging Face: pairs are (i, i + head_dim / 2).
        """

    def attention(self, qkv: Tensor, kv: Tensor, batch: AttentionBatch, num_heads: int) -> Tensor:
        """Causal attention of q in `qkv` over the blocks, scaled by head_dim**-0.5: -> (T, num_heads * head_dim)."""

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up: (T, 2 * I) -> (T, I)."""


def rope_table(head_dim: int, inv_freq: Tensor, max_positions: int, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of every position: (max_positions, head_dim), computed in float64 and cast.

    inv_freq (head_dim / 2,): angular step of each pair per position.
    """
    angles = torch.arange(max_positions, dtype=torch.float64)[:, None] * inv_freq.double()[None, :]
    assert inv_freq.numel() * 2 == head_dim
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
