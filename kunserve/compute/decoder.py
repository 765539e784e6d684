"""The decoder: the one forward path, for every family of models; their differences are fields of `ModelConfig`.

It runs any range of layers on the weights and KV of one device. Its views are over ranges whose addresses never change,
so it need not hear of a drop or a restore.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kunserve.compute.layer_weights import LayerWeights, MlpWeights
from kunserve.compute.ops import AttentionBatch, Ops, Scores
from kunserve.compute.rope import layer_rope_table, rope_kind
from kunserve.gpu.kv_memory import KVMemory
from kunserve.gpu.weights import Weights
from kunserve.model.config import ModelConfig
from kunserve.model.layout import layer_name
from kunserve.model.quant.linear import Linear


class Decoder:
    """A model on one device. The layers that `forward` is asked for must be present."""

    def __init__(self, config: ModelConfig, ops: Ops, weights: Weights, kv: KVMemory, max_model_len: int) -> None:
        self._config, self._ops, self._weights = config, ops, weights
        self._kv = kv.layers
        self._layers = [LayerWeights.of(config, weights, i) for i in range(config.num_layers)]
        self._near_layers = frozenset(config.near_layers)
        self._scores = [Scores.of(config, i) for i in range(config.num_layers)]
        self._embed = weights.linear("embed", "model.embed_tokens.weight")
        tied = config.tie_embeddings
        self._norm = weights.tensor("embed" if tied else "head", "model.norm.weight")
        self._head = self._embed if tied else weights.linear("head", "lm_head.weight")
        dtype, device = self._norm.dtype, self._norm.device
        # Rounded to the weights' dtype, as in Gemma's own code: rounded to bfloat16 it is another number.
        self._embed_scale = torch.tensor(config.embed_scale, dtype=dtype, device=device)
        tables: dict[tuple[bool, bool], Tensor] = {}
        for layer in range(config.num_layers):
            if (kind := rope_kind(config, layer)) not in tables:
                tables[kind] = layer_rope_table(config, layer, max_model_len, dtype).to(device)
        self._ropes = [tables[rope_kind(config, layer)] for layer in range(config.num_layers)]

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
            x = self._embedded(x)
        x = self._through(first_layer, last_layer, x, batch)
        if last_layer < self._config.num_layers:
            return x
        return self.logits(x[sampled_rows]) if with_head else x[sampled_rows]

    @property
    def vocab_size(self) -> int:
        """Return V, the number of rows of the head."""
        return self._head.shape[0]

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Apply the head to hidden states after the last layer: (R, H) -> (R, V). Its weights must be present."""
        return self.scaled(self._ops.linear(self._normed(x, self._norm), self._head))

    @torch.inference_mode()
    def multiply_head(self, x: Tensor, first: int, last: int, logits: Tensor) -> None:
        """Write products of hidden states (R, H) with the head's rows `[first, last)` into their columns of (R, V).

        Once all of them are there, `scaled` makes logits of them: those of `logits`.
        """
        part = self._head.part(first, last)
        self._ops.linear_into(self._normed(x, self._norm), part, logits[:, first:last])

    @torch.inference_mode()
    def scaled(self, logits: Tensor) -> Tensor:
        """Make logits of all products with the head: (R, V) -> (R, V)."""
        config = self._config
        if config.logit_divisor != 1:
            logits = logits / config.logit_divisor
        return logits if config.logit_softcap is None else self._ops.softcap(logits, config.logit_softcap)

    @torch.inference_mode()
    def probe(self, first_layer: int, last_layer: int) -> None:
        """Multiply a row of zeros by weights of each layer that is present, without KV; raises if the device fails."""
        x = torch.zeros((1, self._norm.shape[0]), dtype=self._norm.dtype, device=self._norm.device)
        for layer in range(first_layer, last_layer):
            if not self._weights.is_filled(layer_name(layer)):
                continue  # it was dropped since it was asked for
            w = self._layers[layer]
            self._ops.linear(self._normed(x, w.before_attention), w.qkv, w.qkv_bias)

    def _embedded(self, token_ids: Tensor) -> Tensor:
        x = self._ops.embed(token_ids, self._embed).to(self._norm.dtype)
        return x if self._config.embed_scale == 1 else x * self._embed_scale

    def _of_kind(self, layer: int, batch: AttentionBatch) -> AttentionBatch:
        """Return the view of a batch that a layer reads: that of near blocks, if its KV is of that kind."""
        return batch if batch.near is None or layer not in self._near_layers else batch.near

    def _through(self, first_layer: int, last_layer: int, x: Tensor, batch: AttentionBatch) -> Tensor:
        """Run layers on hidden states: (T, H) -> (T, H). A layer ends with the norm that the next one begins with."""
        normed = self._normed(x, self._layers[first_layer].before_attention)
        for layer in range(first_layer, last_layer):
            after = self._layers[layer + 1].before_attention if layer + 1 < last_layer else None
            x, normed = self._layer(layer, x, normed, self._of_kind(layer, batch), after)
        return x

    def _layer(
        self, layer: int, x: Tensor, normed: Tensor, batch: AttentionBatch, after: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run a layer on hidden states and what its first norm makes of them; `after`: the next norm's weight."""
        ops, config, w, kv = self._ops, self._config, self._layers[layer], self._kv[layer]
        qkv = ops.linear(normed, w.qkv, w.qkv_bias)
        ops.rotate_and_append(
            qkv, self._ropes[layer], kv, batch, w.q_norm, w.k_norm, config.rms_norm_eps, config.norm_offset
        )
        attended = ops.attention(qkv, kv, batch, config.num_heads, self._scores[layer], w.sinks)
        x, normed = self._added(x, attended, w.o, w.o_bias, w.after_attention, w.before_mlp)
        if w.experts is not None:
            y = ops.moe(normed, w.experts)
            if w.mlp is not None:
                y = ops.add(y, self._shared(normed, w.mlp))
            x = self._joined(x, y, w.after_mlp)
            return x, self._normed(x, after)
        assert w.mlp is not None
        return self._added(x, self._inner(normed, w.mlp), w.mlp.down, w.mlp.down_bias, w.after_mlp, after)

    def _inner(self, x: Tensor, mlp: MlpWeights) -> Tensor:
        """Return what an MLP makes of `x` before its last matrix: (T, H) -> (T, I)."""
        gate_up = self._ops.linear(x, mlp.gate_up, mlp.gate_up_bias)
        return self._ops.act_and_mul(gate_up, self._config.activation, self._config.swiglu_limit)

    def _shared(self, x: Tensor, mlp: MlpWeights) -> Tensor:
        """Return what the expert that all tokens share makes of `x`: (T, H) -> (T, H)."""
        y = self._ops.linear(self._inner(x, mlp), mlp.down)
        return y if mlp.shared_gate is None else self._ops.gated(y, self._ops.linear(x, mlp.shared_gate))

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        config = self._config
        return x if weight is None else self._ops.rms_norm(x, weight, config.rms_norm_eps, config.norm_offset)

    def _added(
        self, x: Tensor, y: Tensor, weight: Linear, bias: Tensor | None, norm: Tensor | None, after: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the residual `x` and what a last matrix makes of `y`; and that, normed by `after`.

        In one operation where nothing is between.
        """
        ops, config = self._ops, self._config
        if norm is not None or config.residual_scale != 1:
            x = self._joined(x, ops.linear(y, weight, bias), norm)
        elif after is None:
            x = ops.linear(y, weight, bias, residual=x)
        else:
            return ops.linear_and_norm(y, weight, bias, x, after, config.rms_norm_eps, config.norm_offset)
        return x, self._normed(x, after)

    def _joined(self, x: Tensor, y: Tensor, norm: Tensor | None) -> Tensor:
        """Return the residual `x` and what a layer adds to it, normed and scaled.

        Multiplying and adding are two operations: compilers fuse them in parts of a row only, which changes bits.
        """
        y, scale = self._normed(y, norm), self._config.residual_scale
        return self._ops.add(x, y if scale == 1 else y * scale)
