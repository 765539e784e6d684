"""Where each weight lies: tensors packed into units, and units that a range of layers needs.

A unit is what is dropped and restored as one: the embedding, each layer, and norm + head. With tied embeddings the
final norm lies in the embedding's unit, which then is needed at both ends of a chain.
Tensors that one operation reads together (q, k, v; gate, up) lie next to each other, so that they are one matrix
where they are stored alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from kunserve.model.config import ModelConfig
from kunserve.model.quant.blocks import ITEM_BYTES, Blocks

if TYPE_CHECKING:
    import torch  # names are judged without it

Named = tuple[str, tuple[int, ...]]  # name and shape

ALIGNMENT = 256  # bytes; every tensor starts on it unless it continues a fused matrix


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a unit. `name` is the checkpoint's (Hugging Face) name; `offset` in bytes from the unit's start."""

    name: str
    shape: tuple[int, ...]  # of the numbers that it stands for
    offset: int
    dtype: str  # of what is stored
    blocks: Blocks | None = None  # None: it is stored as numbers

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Elements of `dtype` that are stored: of blocks the bytes of each row."""
        if self.blocks is None:
            return self.shape
        *rows, columns = self.shape
        return (*rows, columns // self.blocks.num_values * self.blocks.num_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes that are stored."""
        return prod(self.stored_shape) * ITEM_BYTES[self.dtype]

    @property
    def end(self) -> int:
        """Where the next tensor of the same matrix begins."""
        return self.offset + self.num_bytes

    def is_stored_like(self, other: TensorSpec) -> bool:
        """Whether the rows of both can be those of one matrix."""
        return (self.dtype, self.blocks, self.stored_shape[1:]) == (other.dtype, other.blocks, other.stored_shape[1:])


@dataclass(frozen=True, slots=True)
class WeightUnit:
    """Weights that come and go together; `num_bytes` is the end of the last tensor."""

    name: str  # "embed", "layers.7", "head"
    tensors: tuple[TensorSpec, ...]
    num_bytes: int


def _pack(name: str, groups: list[list[Named]], config: ModelConfig, dtype: str) -> WeightUnit:
    """Lay groups of tensors one after the other; tensors of a group touch where they are stored alike."""
    tensors: list[TensorSpec] = []
    for group in groups:
        for i, (tensor_name, shape) in enumerate(group):
            blocks, end = config.formats.of(tensor_name), tensors[-1].end if tensors else 0
            spec = TensorSpec(tensor_name, shape, end, dtype if blocks is None else "uint8", blocks)
            if i == 0 or not spec.is_stored_like(tensors[-1]):
                spec = replace(spec, offset=-(-end // ALIGNMENT) * ALIGNMENT)
            tensors.append(spec)
    return WeightUnit(name, tuple(tensors), tensors[-1].end)


def layer_name(layer: int) -> str:
    """Name of the unit that holds decoder layer `layer`."""
    return f"layers.{layer}"


def _layer_unit(config: ModelConfig, layer: int, dtype: str) -> WeightUnit:
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
    return _pack(layer_name(layer), groups, config, dtype)


def weight_units(config: ModelConfig, dtype: str | torch.dtype) -> tuple[WeightUnit, ...]:
    """All units of a model, in the order of a forward pass: embed, layers, and head unless it is tied.

    dtype: of what is stored as numbers, or its name.
    """
    dtype = str(dtype).removeprefix("torch.")
    vocab = (config.vocab_size, config.hidden_size)
    norm: list[Named] = [("model.norm.weight", (config.hidden_size,))]
    embed: list[list[Named]] = [[("model.embed_tokens.weight", vocab)]]
    layers = [_layer_unit(config, i, dtype) for i in range(config.num_layers)]
    if config.tie_embeddings:
        return (_pack("embed", [*embed, norm], config, dtype), *layers)
    head = _pack("head", [norm, [("lm_head.weight", vocab)]], config, dtype)
    return (_pack("embed", embed, config, dtype), *layers, head)


def units_of_stage(config: ModelConfig, first_layer: int, last_layer: int) -> tuple[str, ...]:
    """Names of the units that layers `[first_layer, last_layer)` need, with embedding and head at the ends."""
    names = [layer_name(i) for i in range(first_layer, last_layer)]
    is_first, is_last = first_layer == 0, last_layer == config.num_layers
    if is_first or (is_last and config.tie_embeddings):
        names.insert(0, "embed")
    if is_last and not config.tie_embeddings:
        names.append("head")
    return tuple(names)
