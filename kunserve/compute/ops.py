"""The operations a decoder is made of: the protocol, and the plain torch reference (any dtype, any device)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kunserve.model.config import ModelConfig
from kunserve.model.quant.blocks import Blocks
from kunserve.model.quant.linear import Linear, StoredRows


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
    # The same with ids of near blocks, for the layers with a window, where their KV is a kind of its own.
    near: AttentionBatch | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Scores:
    """What becomes of attention's scores before softmax: one value for all layers of a kind."""

    scale: float | None = None  # of q @ k; None: head_dim ** -0.5
    window: int | None = None  # a query at position p sees positions p - window + 1..p; None: all up to p
    softcap: float | None = None  # c: scaled scores x become c * tanh(x / c)

    @classmethod
    def of(cls, config: ModelConfig, layer: int) -> Scores:
        """Return those of a layer of a model."""
        return cls(config.attention_scale, config.window_of(layer), config.attention_softcap)


PLAIN_SCORES = Scores()


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Views of the experts of a layer. E experts, H hidden, I the width of one."""

    router: Linear  # (E, H)
    router_bias: Tensor | None  # (E,)
    gate_up: Tensor  # (E, 2 * I, H): of each expert the rows of gate, then those of up; of blocks the bytes of a row
    gate_up_bias: Tensor | None  # (E, 2 * I)
    down: Tensor  # (E, H, I); of blocks the bytes of a row
    down_bias: Tensor | None  # (E, H)
    num_per_token: int
    normalize: bool  # whether the weights of the chosen experts sum to 1, or are those of all experts' softmax
    activation: str = "silu"
    limit: float = 0.0
    gate_up_blocks: Blocks | None = None  # None: stored as numbers
    down_blocks: Blocks | None = None

    def matrices(self, expert: int) -> tuple[Linear, Linear]:
        """Return gate_up (2 * I, H) and down (H, I) of one expert."""
        gate_up, down = self.gate_up[expert], self.down[expert]
        return Linear((StoredRows(gate_up, self.gate_up_blocks),)), Linear((StoredRows(down, self.down_blocks),))


class Ops(Protocol):
    """Operations on one device. Inputs are contiguous unless said otherwise; results are new tensors.

    `kv` is one layer's KV range: (num_blocks, 2, num_kv_heads, block_size, head_dim), [:, 0] keys, [:, 1] values. Its
    first dimension covers the reserved range; only mapped blocks are ever named by block tables. It may have
    fewer bits than the rest.
    """

    def embed(self, token_ids: Tensor, weight: Linear) -> Tensor:
        """Take the rows of `weight` (V, H) for `token_ids` (T,) int32 -> (T, H); of blocks in float32."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """Divide by the root mean square of the last dimension, times `offset + weight`: (T, H) -> (T, H)."""

    def linear(self, x: Tensor, weight: Linear, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Return `residual + x @ weight.T + bias`: x (T, K), weight (N, K), bias (N,), residual (T, N) -> (T, N)."""

    def linear_into(self, x: Tensor, weight: Linear, y: Tensor) -> None:
        """Write `x @ weight.T` into columns of a larger tensor: x (T, K), weight (N, K), y (T, N)."""
        y.copy_(self.linear(x, weight))

    def linear_and_norm(
        self,
        x: Tensor,
        weight: Linear,
        bias: Tensor | None,
        residual: Tensor,
        norm: Tensor,
        eps: float,
        offset: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Return what `linear` does, and what `rms_norm` makes of that with the weight `norm`: (T, N) each."""
        total = self.linear(x, weight, bias, residual)
        return total, self.rms_norm(total, norm, eps, offset)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute x + y, element by element: (T, N) each."""
        return x + y

    def rotate_and_append(
        self,
        qkv: Tensor,
        rope: Tensor,
        kv: Tensor,
        batch: AttentionBatch,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
        offset: float = 0.0,
    ) -> None:
        """Norm (if given) and rotate q and k, and write k and v into their slots of `kv`.

        qkv (T, (num_heads + 2 * num_kv_heads) * head_dim) is changed in place: its q part is what `attention` reads.
        q_norm, k_norm: as wide as a head, for each head by itself, or as wide as all heads, for all of them together.
        rope (max_positions, rotary_dim): cosines in the first half of a row, sines in the second; the rotation is the
        "rotate half" of Hugging Face: pairs are (i, i + rotary_dim / 2), what lies behind stays. rotary_dim may be 0.
        """

    def attention(
        self,
        qkv: Tensor,
        kv: Tensor,
        batch: AttentionBatch,
        num_heads: int,
        scores: Scores = PLAIN_SCORES,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend causally with q in `qkv` to the blocks: -> (T, num_heads * head_dim).

        sinks (num_heads,): a score that takes part in a head's softmax, for nothing.
        """

    def act_and_mul(self, gate_up: Tensor, activation: str = "silu", limit: float = 0.0) -> Tensor:
        """Compute activation(gate) * up: (T, 2 * I) -> (T, I). `activation`: of kunserve.model.config.ACTIVATIONS.

        clamped_swiglu bounds gate (above) and up (both ways) by `limit`, and multiplies with up + 1.
        """

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """Compute cap * tanh(x / cap), element by element."""

    def gated(self, x: Tensor, gate: Tensor) -> Tensor:
        """Compute x * sigmoid(gate): (T, H), (T, 1) -> (T, H)."""

    def moe(self, x: Tensor, experts: ExpertWeights) -> Tensor:
        """Sum what the chosen experts make of each row, times their weights: (T, H) -> (T, H)."""


def rope_table(
    rotary_dim: int, inv_freq: Tensor, max_positions: int, dtype: torch.dtype, stretch: float = 1.0
) -> Tensor:
    """Return cosines and sines of every position: (max_positions, rotary_dim), computed in float64 and cast.

    inv_freq (rotary_dim / 2,): angular step of each pair per position; stretch: what both are multiplied by.
    """
    angles = torch.arange(max_positions, dtype=torch.float64)[:, None] * inv_freq.double()[None, :]
    assert inv_freq.numel() * 2 == rotary_dim
    return (torch.cat([angles.cos(), angles.sin()], dim=-1) * stretch).to(dtype)
