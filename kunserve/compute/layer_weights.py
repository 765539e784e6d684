"""Views of one layer's weights, by what they do: the names of checkpoints end here."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kunserve.compute.ops import ExpertWeights
from kunserve.gpu.weights import Weights
from kunserve.model.config import Experts, ModelConfig
from kunserve.model.layout import EXPERT_NAMES, NORM_NAMES, expert_names, gate_up_names, layer_name, qkv_names
from kunserve.model.quant.linear import Linear, StoredRows


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """Views of a dense MLP, or of a shared expert. H hidden, I intermediate."""

    gate_up: Linear  # (2 * I, H)
    gate_up_bias: Tensor | None
    down: Linear  # (H, I)
    down_bias: Tensor | None
    shared_gate: Linear | None = None  # (1, H): its sigmoid is the weight of a shared expert


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Views of one layer. H hidden, D head_dim. What a family has not is None."""

    before_attention: Tensor | None  # (H,): norms of what goes into attention, and of what comes out of it
    after_attention: Tensor | None
    before_mlp: Tensor | None
    after_mlp: Tensor | None
    qkv: Linear  # (q_size + 2 * kv_size, H)
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # (D,), or (q_size,) where all heads are normed together
    k_norm: Tensor | None
    sinks: Tensor | None  # (num_heads,)
    o: Linear  # (H, q_size)
    o_bias: Tensor | None
    mlp: MlpWeights | None  # of all tokens: a dense MLP, or the shared expert beside `experts`
    experts: ExpertWeights | None

    @classmethod
    def of(cls, config: ModelConfig, weights: Weights, layer: int) -> LayerWeights:
        """Find the views of `layer` in a device's weights."""
        views, experts = _Views(weights, layer), config.experts_of(layer)
        qkv = qkv_names(config)
        norms = [name and name + ".weight" for name in NORM_NAMES[config.pre_norms, config.post_norms]]
        before, after, before_mlp, after_mlp = (None if name is None else views.of(name) for name in norms)
        return cls(
            before_attention=before,
            after_attention=after,
            before_mlp=before_mlp,
            after_mlp=after_mlp,
            qkv=views.linear(*qkv),
            qkv_bias=views.find(config.qkv_bias, qkv[0] + ".bias", config.q_size + 2 * config.kv_size),
            q_norm=views.find(config.qk_norm, "self_attn.q_norm.weight"),
            k_norm=views.find(config.qk_norm, "self_attn.k_norm.weight"),
            sinks=views.find(config.has_sinks, "self_attn.sinks"),
            o=views.linear("self_attn.o_proj"),
            o_bias=views.find(config.o_bias, "self_attn.o_proj.bias"),
            mlp=_mlp(config, views) if experts is None else _shared_expert(experts, views),
            experts=None if experts is None else _experts(config, experts, views),
        )


@dataclass(frozen=True, slots=True)
class _Views:
    """Finds tensors of a layer by their names within it."""

    weights: Weights
    layer: int

    def of(self, name: str, num_rows: int | None = None) -> Tensor:
        return self.weights.tensor(layer_name(self.layer), f"model.layers.{self.layer}.{name}", num_rows)

    def linear(self, *names: str) -> Linear:
        prefix = f"model.layers.{self.layer}."
        return self.weights.linear(layer_name(self.layer), *(f"{prefix}{name}.weight" for name in names))

    def matrix(self, *names: str) -> StoredRows:
        """Find what tensors, all stored alike, are together."""
        (part,) = self.weights.linear(
            layer_name(self.layer), *(f"model.layers.{self.layer}.{name}" for name in names)
        ).parts
        return part

    def find(self, is_there: bool, name: str, num_rows: int | None = None) -> Tensor | None:
        return self.of(name, num_rows) if is_there else None


def _mlp(config: ModelConfig, views: _Views) -> MlpWeights:
    gate_up = gate_up_names(config)
    return MlpWeights(
        gate_up=views.linear(*gate_up),
        gate_up_bias=views.find(config.mlp_bias, gate_up[0] + ".bias", 2 * config.intermediate_size),
        down=views.linear("mlp.down_proj"),
        down_bias=views.find(config.mlp_bias, "mlp.down_proj.bias"),
    )


def _shared_expert(experts: Experts, views: _Views) -> MlpWeights | None:
    name = EXPERT_NAMES[experts.style].shared
    return (
        MlpWeights(
            gate_up=views.linear(f"{name}.gate_proj", f"{name}.up_proj"),
            gate_up_bias=None,
            down=views.linear(f"{name}.down_proj"),
            down_bias=None,
            shared_gate=views.linear(f"{name}_gate") if experts.has_shared_gate else None,
        )
        if experts.shared_size
        else None
    )


def _experts(config: ModelConfig, experts: Experts, views: _Views) -> ExpertWeights:
    names, num = EXPERT_NAMES[experts.style], experts.num_experts
    gate_up, down = (views.matrix(*of) for of in expert_names(experts))
    return ExpertWeights(
        router=views.linear(names.router),
        router_bias=views.find(experts.has_bias, names.router + ".bias"),
        gate_up=gate_up.data.view(num, 2 * experts.intermediate_size, -1),
        gate_up_bias=views.find(experts.has_bias, names.gate_up[0] + "_bias"),
        down=down.data.view(num, config.hidden_size, -1),
        down_bias=views.find(experts.has_bias, names.down + "_bias"),
        num_per_token=experts.num_per_token,
        normalize=experts.normalize,
        activation=config.activation,
        limit=config.swiglu_limit,
        gate_up_blocks=gate_up.blocks,
        down_blocks=down.blocks,
    )
