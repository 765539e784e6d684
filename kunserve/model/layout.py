"""Where each weight lies: tensors packed into units, and units that a range of layers needs.

A unit is what is dropped and restored as one: the embedding, each layer, and norm + head. With tied embeddings the
final norm lies in the embedding's unit, which then is needed at both ends of a chain.
Tensors that one operation reads together (q, k, v; gate, up) lie next to each other, so that they are one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from kunserve.model.config import ModelConfig

Named = tuple[str, tuple[int, ...]]  # name and shape

ALIGNMENT = 256  # bytes; every tensor starts on it unless it continues a fused matrix


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a unit. `name` is the checkpoint's (Hugging Face) name; `offset` in bytes from the unit's start."""

    name: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class WeightUnit:
    """Weights that come and go together; `num_bytes` is the end of the last tensor."""

    name: str  # "embed", "layers.7", "head"
    tensors: tuple[TensorSpec, ...]
    num_bytes: int


def _pack(name: str, groups: list[list[Named]], item_bytes: int) -> WeightUnit:
    """Lay groups of tensors one after the other; tensors of a group touch."""
    offset, tensors = 0, []
    for group in groups:
        offset = -(-offset // ALIGNMENT) * ALIGNMENT
        for tensor_name, shape in group:
            tensors.append(TensorSpec(tensor_name, shape, offset))
            offset += prod(shape) * item_bytes
    return WeightUnit(name, tuple(tensors), offset)


def layer_name(layer: int) -> str:
    """Name of the unit that holds decoder layer `layer`."""
    return f"layers.{layer}"


def _layer_unit(config: ModelConfig, layer: int, item_bytes: int) -> WeightUnit:
    prefix, hidden, inner = f"model.layers.{layer}.", config.hidden_size, config.intermediate_size
    q, kv = config.q_size, config.kv_size
    attn, mlp = prefix + "self_attn.", prefix + "mlp."
    groups: list[list[Named]] = [
        [(prefix + "input_layernorm.weight", (hidden,))],
        [
            (attn + "q_proj.weight", (q, hidden)),
            (attn + "k_proj.weight", (kv, hidden)),
            (attn + "v_proj.weight", (kv, hidden)),
        ],
    ]
    if config.qkv_bias:
        groups.append([(attn + "q_proj.bias", (q,)), (attn + "k_proj.bias", (kv,)), (attn + "v_proj.bias", (kv,))])
    if config.qk_norm:
        groups += [[(attn + "q_norm.weight", (config.head_dim,))], [(attn + "k_norm.weight", (config.head_dim,))]]
    groups += [
        [(attn + "o_proj.weight", (hidden, q))],
        [(prefix + "post_attention_layernorm.weight", (hidden,))],
        [(mlp + "gate_proj.weight", (inner, hidden)), (mlp + "up_proj.weight", (inner, hidden))],
        [(mlp + "down_proj.weight", (hidden, inner))],
    ]
    return _pack(layer_name(layer), groups, item_bytes)


def weight_units(config: ModelConfig, item_bytes: int) -> tuple[WeightUnit, ...]:
    """All units of a model, in the order of a forward pass: embed, layers, and head unless it is tied."""
    vocab = (config.vocab_size, config.hidden_size)
    norm: list[Named] = [("model.norm.weight", (config.hidden_size,))]
    embed: list[list[Named]] = [[("model.embed_tokens.weight", vocab)]]
    layers = [_layer_unit(config, i, item_bytes) for i in range(config.num_layers)]
    if config.tie_embeddings:
        return (_pack("embed", [*embed, norm], item_bytes), *layers)
    head = _pack("head", [norm, [("lm_head.weight", vocab)]], item_bytes)
    return (_pack("embed", embed, item_bytes), *layers, head)


def units_of_stage(config: ModelConfig, first_layer: int, last_layer: int) -> tuple[str, ...]:
    """Names of the units that layers `[first_layer, last_layer)` need, with embedding and head at the ends."""
    names = [layer_name(i) for i in range(first_layer, last_layer)]
    is_first, is_last = first_layer == 0, last_layer == config.num_layers
    if is_first or (is_last and config.tie_embeddings):
        names.insert(0, "embed")
    if is_last and not config.tie_embeddings:
        names.append("head")
    return tuple(names)
