"""The decoder's operations in plain torch: the reference the kernels are compared with, any dtype and device."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kunserve.compute.ops import AttentionBatch
from kunserve.model.quant.linear import Linear


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are taken in: half types are widened."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


class TorchOps:
    """`Ops` with nothing but torch calls: simple and obviously right, not fast. Implements kunserve.compute.ops.Ops."""

    def embed(self, token_ids: Tensor, weight: Linear) -> Tensor:
        """Rows of `weight` (V, H) for `token_ids` (T,) -> (T, H)."""
        return weight.rows(token_ids)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square norm over the last dimension: (..., H) -> (..., H)."""
        wide = x.to(_wide(x.dtype))
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def linear(self, x: Tensor, weight: Linear, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Return `residual + x @ weight.T + bias`: (T, K), (N, K), (N,), (T, N) -> (T, N)."""
        y = F.linear(x, weight.dense(x.dtype), bias)
        return y if residual is None else residual + y

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
        """Norm and rotate q (in place in `qkv`) and k; write k and v into their slots of `kv`."""
        _, _, num_kv_heads, block_size, head_dim = kv.shape
        heads = qkv.view(len(qkv), -1, head_dim)
        num_heads = heads.shape[1] - 2 * num_kv_heads
        q, k, v = torch.tensor_split(heads, (num_heads, num_heads + num_kv_heads), dim=1)
        positions = batch.positions.long()
        cos, sin = rope[positions].to(_wide(qkv.dtype)).unsqueeze(1).chunk(2, dim=-1)

        def normed_and_rotated(x: Tensor, norm: Tensor | None) -> Tensor:
            x = x if norm is None else self.rms_norm(x, norm, eps)
            a, b = x.to(cos.dtype).chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(qkv.dtype)

        num_tokens = batch.cu_seqlens_q.long().diff()
        sequence = torch.arange(len(num_tokens), device=qkv.device).repeat_interleave(num_tokens)
        blocks = batch.block_tables.long()[sequence, positions // block_size]
        kv[blocks, 0, :, positions % block_size] = normed_and_rotated(k, k_norm)
        kv[blocks, 1, :, positions % block_size] = v
        q.copy_(normed_and_rotated(q, q_norm))

    def attention(self, qkv: Tensor, kv: Tensor, batch: AttentionBatch, num_heads: int) -> Tensor:
        """Causal attention, sequence by sequence over its gathered blocks: -> (T, num_heads * head_dim)."""
        _, _, num_kv_heads, block_size, head_dim = kv.shape
        q = qkv[:, : num_heads * head_dim].reshape(len(qkv), num_kv_heads, -1, head_dim)
        out = torch.empty_like(q)
        ends, contexts = batch.cu_seqlens_q.tolist(), batch.context_lens.tolist()
        for b, context_len in enumerate(contexts):
            tokens = slice(ends[b], ends[b + 1])
            blocks = batch.block_tables[b, : -(-context_len // block_size)].long()
            keys, values = kv[blocks].to(_wide(kv.dtype)).movedim(0, 2).flatten(2, 3)[:, :, :context_len]
            scores = torch.einsum("tkgd,ksd->kgts", q[tokens].to(keys.dtype), keys) * head_dim**-0.5
            unseen = torch.arange(context_len, device=kv.device) > batch.positions[tokens, None]
            weights = scores.masked_fill(unseen, float("-inf")).softmax(-1)
            out[tokens] = torch.einsum("kgts,ksd->tkgd", weights, values).to(qkv.dtype)
        return out.flatten(1)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up: (T, 2 * I) -> (T, I)."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
