"""The decoder: one file for Llama, Mistral and Qwen, whose differences are flags of `ModelConfig`. The forward path.

Runs any range of layers on the weights and KV of one device. The views it holds are over ranges whose addresses never
change, so a drop or a restore needs nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kunserve.compute.ops import AttentionBatch, Ops, rope_table
from kunserve.compute.rope import rope_inv_freq
from kunserve.gpu.kv_memory import KVMemory
from kunserve.gpu.weights import Weights
from kunserve.model.config import ModelConfig
from kunserve.model.layout import layer_name
from kunserve.model.quant.linear import Linear


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Views of one layer's weights. H hidden, I intermediate, D head_dim."""

    input_norm: Tensor  # (H,)
    qkv: Linear  # (q_size + 2 * kv_size, H)
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # (D,)
    k_norm: Tensor | None
    o: Linear  # (H, q_size)
    post_norm: Tensor  # (H,)
    gate_up: Linear  # (2 * I, H)
    down: Linear  # (H, I)

    @classmethod
    def of(cls, config: ModelConfig, weights: Weights, layer: int) -> LayerWeights:
        """Find the views of `layer` in a device's weights."""
        unit, prefix = layer_name(layer), f"model.layers.{layer}."

        def view(name: str, num_rows: int | None = None) -> Tensor:
            return weights.tensor(unit, prefix + name, num_rows)

        def linear(*names: str) -> Linear:
            return weights.linear(unit, *(f"{prefix}{name}.weight" for name in names))

        return cls(
            input_norm=view("input_layernorm.weight"),
            qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            qkv_bias=view("self_attn.q_proj.bias", config.q_size + 2 * config.kv_size) if config.qkv_bias else None,
            q_norm=view("self_attn.q_norm.weight") if config.qk_norm else None,
            k_norm=view("self_attn.k_norm.weight") if config.qk_norm else None,
            o=linear("self_attn.o_proj"),
            post_norm=view("post_attention_layernorm.weight"),
            gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
            down=linear("mlp.down_proj"),
        )


class Decoder:
    """A model on one device. `forward` runs the layers it is told to; they must be present."""

    def __init__(self, config: ModelConfig, ops: Ops, weights: Weights, kv: KVMemory, max_model_len: int) -> None:
        self._config, self._ops, self._weights = config, ops, weights
        self._kv = kv.layers
        self._layers = [LayerWeights.of(config, weights, i) for i in range(config.num_layers)]
        self._embed = weights.linear("embed", "model.embed_tokens.weight")
        tied = config.tie_embeddings
        self._norm = weights.tensor("embed" if tied else "head", "model.norm.weight")
        self._head = self._embed if tied else weights.linear("head", "lm_head.weight")
        self._rope = rope_table(config.head_dim, rope_inv_freq(config), max_model_len, self._norm.dtype).to(
            self._norm.device
        )

    @torch.inference_mode()
    def forward(
        self,
        first_layer: int,
        last_layer: int,
        x: Tensor,
        batch: AttentionBatch,
        sampled_rows: Tensor,
        *,
        with_head: bool = True,
    ) -> Tensor:
        """Run layers `[first_layer, last_layer)`, with the embedding before layer 0 and the head after the last.

        x: token ids (T,) int32 if `first_layer` is 0, else hidden states (T, H).
        Returns hidden states (T, H), or after the last layer the logits of `sampled_rows`: (R, V); without the head
        what `logits` takes: (R, H).
        """
        if first_layer == 0:
            x = self._ops.embed(x, self._embed).to(self._norm.dtype)
        for layer in range(first_layer, last_layer):
            x = self._layer(self._layers[layer], self._kv[layer], x, batch)
        if last_layer < self._config.num_layers:
            return x
        return self.logits(x[sampled_rows]) if with_head else x[sampled_rows]

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """The head: hidden states after the last layer (R, H) -> (R, V). Its weights must be present."""
        return self._ops.linear(self._ops.rms_norm(x, self._norm, self._config.rms_norm_eps), self._head)

    @torch.inference_mode()
    def probe(self, first_layer: int, last_layer: int) -> None:
        """Take one row through the weights of some layers that are there, without KV; raises if that fails."""
        x = torch.zeros((1, self._norm.shape[0]), dtype=self._norm.dtype, device=self._norm.device)
        for layer in range(first_layer, last_layer):
            if not self._weights.is_filled(layer_name(layer)):
                continue  # it was dropped since it was asked for
            w = self._layers[layer]
            self._ops.linear(self._ops.rms_norm(x, w.input_norm, self._config.rms_norm_eps), w.qkv, w.qkv_bias)

    def _layer(self, w: LayerWeights, kv: Tensor, x: Tensor, batch: AttentionBatch) -> Tensor:
        ops, eps = self._ops, self._config.rms_norm_eps
        qkv = ops.linear(ops.rms_norm(x, w.input_norm, eps), w.qkv, w.qkv_bias)
        ops.rotate_and_append(qkv, self._rope, kv, batch, w.q_norm, w.k_norm, eps)
        x = ops.linear(ops.attention(qkv, kv, batch, self._config.num_heads), w.o, residual=x)
        gate_up = ops.linear(ops.rms_norm(x, w.post_norm, eps), w.gate_up)
        return ops.linear(ops.silu_and_mul(gate_up), w.down, residual=x)
