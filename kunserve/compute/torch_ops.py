"""The decoder's operations in plain torch: the reference the kernels are compared with, any dtype and device."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kunserve.compute.ops import PLAIN_SCORES, AttentionBatch, ExpertWeights, Ops, Scores
from kunserve.gpu.copies import bits_of
from kunserve.gpu.kv_memory import E4M3, MAX_E4M3
from kunserve.model.config import SWIGLU_ALPHA
from kunserve.model.quant.linear import Linear
from kunserve.sizes import ceil_div


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are taken in: half types are widened."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def as_kv(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return keys or values as KV of `dtype` keeps them. In 8 bits what is beyond 448 is kept as that."""
    return x.clamp(-MAX_E4M3, MAX_E4M3).to(dtype) if dtype == E4M3 else x.to(dtype)


class TorchOps(Ops):
    """`Ops` with nothing but torch calls: simple and obviously right, not fast. Implements kunserve.compute.ops.Ops."""

    def embed(self, token_ids: Tensor, weight: Linear) -> Tensor:
        """Take the rows of `weight` (V, H) for `token_ids` (T,) -> (T, H)."""
        return weight.rows(token_ids)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """Divide by the root mean square of the last dimension, times `offset + weight`: (..., H) -> (..., H)."""
        wide = x.to(_wide(x.dtype))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        if offset:  # Gemma rounds once, at the end
            return (normed * (offset + weight.to(wide.dtype))).to(x.dtype)
        return weight * normed.to(x.dtype)

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
        offset: float = 0.0,
    ) -> None:
        """Norm and rotate q (in place in `qkv`) and k; write k and v into their slots of `kv`."""
        _, _, num_kv_heads, block_size, head_dim = kv.shape
        heads = qkv.view(len(qkv), -1, head_dim)
        num_heads = heads.shape[1] - 2 * num_kv_heads
        q, k, v = torch.tensor_split(heads, (num_heads, num_heads + num_kv_heads), dim=1)
        positions = batch.positions.long()
        cos, sin = rope[positions].to(_wide(qkv.dtype)).unsqueeze(1).chunk(2, dim=-1)
        half = cos.shape[-1]

        def normed_and_rotated(x: Tensor, norm: Tensor | None) -> Tensor:
            if norm is not None:
                x = self.rms_norm(x.reshape(len(x), -1, norm.numel()), norm, eps, offset).view(x.shape)
            a, b, rest = torch.tensor_split(x.to(cos.dtype), (half, 2 * half), dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(qkv.dtype)

        num_tokens = batch.cu_seqlens_q.long().diff()
        sequence = torch.arange(len(num_tokens), device=qkv.device).repeat_interleave(num_tokens)
        blocks = batch.block_tables.long()[sequence, positions // block_size]
        for i, x in enumerate((normed_and_rotated(k, k_norm), v)):
            bits_of(kv)[blocks, i, :, positions % block_size] = bits_of(as_kv(x, kv.dtype))
        q.copy_(normed_and_rotated(q, q_norm))

    def attention(
        self,
        qkv: Tensor,
        kv: Tensor,
        batch: AttentionBatch,
        num_heads: int,
        scores: Scores = PLAIN_SCORES,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend causally, sequence by sequence, to its gathered blocks: -> (T, num_heads * head_dim)."""
        _, _, num_kv_heads, block_size, head_dim = kv.shape
        wide, num_tokens = _wide(kv.dtype), len(qkv)
        q = qkv[:, : num_heads * head_dim].reshape(num_tokens, num_kv_heads, -1, head_dim).transpose(0, 1).to(wide)
        q = q * (head_dim**-0.5 if scores.scale is None else scores.scale)
        out = torch.empty_like(q)
        ends, contexts, tables = batch.cu_seqlens_q.tolist(), batch.context_lens.tolist(), batch.block_tables.long()
        for b, context_len in enumerate(contexts):
            start, end = ends[b], ends[b + 1]
            blocks = bits_of(kv)[tables[b, : ceil_div(context_len, block_size)]].view(kv.dtype).to(wide)
            keys, values = blocks.movedim(0, 2).flatten(2, 3)[:, :, :context_len].unbind()  # (kv heads, context, dim)
            x = q[:, start:end].flatten(1, 2) @ keys.mT
            x = x if scores.softcap is None else self.softcap(x, scores.softcap)
            if end - start > 1 or scores.window is not None:  # the last token sees all
                behind = batch.positions[start:end, None] - torch.arange(context_len, device=kv.device)
                unseen = behind < 0 if scores.window is None else (behind < 0) | (behind >= scores.window)
                x = x.view(num_kv_heads, end - start, -1, context_len).masked_fill(unseen[:, None], float("-inf"))
                x = x.flatten(1, 2)
            if sinks is not None:
                sink = (
                    sinks.to(wide).view(num_kv_heads, 1, -1, 1).expand(-1, end - start, -1, 1).reshape(*x.shape[:2], 1)
                )
                x = torch.cat([x, sink], -1)
            weights = x.softmax(-1)[..., :context_len]
            out[:, start:end] = (weights @ values).view(num_kv_heads, end - start, -1, head_dim)
        return out.transpose(0, 1).to(qkv.dtype).flatten(1)

    def act_and_mul(self, gate_up: Tensor, activation: str = "silu", limit: float = 0.0) -> Tensor:
        """Compute activation(gate) * up: (T, 2 * I) -> (T, I)."""
        gate, up = gate_up.chunk(2, dim=-1)
        if activation == "clamped_swiglu":
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return (up + 1) * (gate * torch.sigmoid(gate * SWIGLU_ALPHA))
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """Compute cap * tanh(x / cap), element by element."""
        return torch.tanh(x / cap) * cap

    def gated(self, x: Tensor, gate: Tensor) -> Tensor:
        """Compute x * sigmoid(gate): (T, H), (T, 1) -> (T, H)."""
        return x * torch.sigmoid(gate)

    def moe(self, x: Tensor, experts: ExpertWeights) -> Tensor:
        """Route each row to its experts, and sum what they make of it in the order of their numbers: -> (T, H)."""
        wide = self.linear(x, experts.router, experts.router_bias).to(_wide(x.dtype)).softmax(-1)
        top = wide.topk(experts.num_per_token, dim=-1)
        chosen = top.values / top.values.sum(-1, keepdim=True) if experts.normalize else top.values
        weights = torch.zeros_like(wide).scatter_(-1, top.indices, chosen).to(x.dtype)
        out = torch.zeros_like(x)
        for i in range(len(experts.down)):
            rows = weights[:, i].nonzero()[:, 0]
            bias = [None if b is None else b[i] for b in (experts.gate_up_bias, experts.down_bias)]
            gate_up, down = experts.matrices(i)
            inner = self.act_and_mul(self.linear(x[rows], gate_up, bias[0]), experts.activation, experts.limit)
            out[rows] += self.linear(inner, down, bias[1]) * weights[rows, i, None]
        return out
