"""Where each weight lies: tensors packed into units, and units that a range of layers needs.

A unit is what is dropped and restored as one: the embedding, each layer, and norm + head. With tied embeddings the
final norm lies in the embedding's unit, which then is needed at both ends of a chain.
Tensors that one operation reads together (q, k, v; gate, up) lie next to each other, so that they are one matrix
where they are stored alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from kunserve.model.config import Experts, ModelConfig
from kunserve.model.family.stored import names_of
from kunserve.model.quant.blocks import ITEM_BYTES, Blocks
from kunserve.model.quant.formats import NO_BLOCKS, Formats
from kunserve.model.quant.planes import SCALES, Planes
from kunserve.model.quant.scheme import Scheme
from kunserve.sizes import ceil_div

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
        """Return the shape as stored, in elements of `dtype`; where rows are blocks, their length is in bytes."""
        if self.blocks is None:
            return self.shape
        *rows, columns = self.shape
        return (*rows, columns // self.blocks.num_values * self.blocks.num_bytes)

    @property
    def num_bytes(self) -> int:
        """Return the number of bytes that are stored."""
        return prod(self.stored_shape) * ITEM_BYTES[self.dtype]

    @property
    def end(self) -> int:
        """Return where the next tensor of the same matrix begins."""
        return self.offset + self.num_bytes

    def is_stored_like(self, other: TensorSpec) -> bool:
        """Tell whether the rows of both tensors can be those of one matrix."""
        return (self.dtype, self.blocks, self.stored_shape[1:]) == (other.dtype, other.blocks, other.stored_shape[1:])


@dataclass(frozen=True, slots=True)
class WeightUnit:
    """Weights that come and go together; `num_bytes` is the end of the last tensor."""

    name: str  # "embed", "layers.7", "head"
    tensors: tuple[TensorSpec, ...]
    num_bytes: int


def _pack(name: str, groups: list[list[Named]], config: ModelConfig, dtype: str) -> WeightUnit:
    """Lay groups of tensors one after the other; tensors of a group touch where they are stored alike.

    Behind a group lie the scales of those whose scales are tensors of their own, in the same way.
    """
    tensors: list[TensorSpec] = []
    for group in groups:
        specs = []
        for tensor, shape in group:
            blocks = config.formats.of(tensor)
            specs.append(TensorSpec(tensor, shape, 0, dtype if blocks is None else "uint8", blocks))
        scales = [_scales(spec, spec.blocks) for spec in specs if isinstance(spec.blocks, Planes)]
        for alike in (specs, scales):
            for i, spec in enumerate(alike):
                end = tensors[-1].end if tensors else 0
                is_continued = i > 0 and spec.is_stored_like(tensors[-1])
                tensors.append(replace(spec, offset=end if is_continued else ceil_div(end, ALIGNMENT) * ALIGNMENT))
    return WeightUnit(name, tuple(tensors), tensors[-1].end)


def _scales(spec: TensorSpec, planes: Planes) -> TensorSpec:
    N, K = spec.shape
    return TensorSpec(spec.name + SCALES, planes.scales_shape(N, K), 0, planes.scale_dtype)


def layer_name(layer: int) -> str:
    """Return the name of the unit that holds decoder layer `layer`."""
    return f"layers.{layer}"


# Norms of a layer by (pre_norms, post_norms): before and after attention, before and after the MLP.
NORM_NAMES: dict[tuple[bool, bool], tuple[str | None, str | None, str | None, str | None]] = {
    (True, False): ("input_layernorm", None, "post_attention_layernorm", None),
    (False, True): (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    (True, True): (
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
}


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a checkpoint calls the router and the matrices of an expert; {} is the expert's number.

    Without {} a tensor holds all experts.
    """

    router: str
    gate_up: tuple[str, ...]
    down: str
    shared: str = ""  # what the names of the shared expert's matrices begin with


EXPERT_NAMES: dict[str, ExpertNames] = {
    "qwen": ExpertNames(
        "mlp.gate",
        ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
        "mlp.experts.{}.down_proj.weight",
        shared="mlp.shared_expert",
    ),
    "mixtral": ExpertNames(
        "block_sparse_moe.gate",
        ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
        "block_sparse_moe.experts.{}.w2.weight",
    ),
    "gpt_oss": ExpertNames("mlp.router", ("mlp.experts.gate_up_proj",), "mlp.experts.down_proj"),
}
EXPERT_NAMES["deepseek"] = replace(EXPERT_NAMES["qwen"], shared="mlp.shared_experts")


def qkv_names(config: ModelConfig) -> tuple[str, ...]:
    """Return the names, within a layer, of what is one matrix with the rows of q, k and v."""
    return ("self_attn.qkv_proj",) if config.has_fused_tensors else tuple(f"self_attn.{i}_proj" for i in "qkv")


def gate_up_names(config: ModelConfig) -> tuple[str, ...]:
    """Return the names, within a layer, of what is one matrix with the rows of gate and up."""
    return ("mlp.gate_up_proj",) if config.has_fused_tensors else ("mlp.gate_proj", "mlp.up_proj")


def expert_names(experts: Experts) -> tuple[list[str], list[str]]:
    """Return the names, within a layer, of what is gate and up of all experts in their order, and of what is down."""
    names, numbers = EXPERT_NAMES[experts.style], range(experts.num_experts)
    if "{}" not in names.down:
        return list(names.gate_up), [names.down]
    return [name.format(i) for i in numbers for name in names.gate_up], [names.down.format(i) for i in numbers]


def _rows(names: tuple[str, ...], sizes: tuple[int, ...], ending: str, *more: int) -> list[Named]:
    """Name the tensors of one matrix, whose parts have `sizes` rows: one for each part, or one for all."""
    sizes = sizes if len(names) > 1 else (sum(sizes),)
    return [(name + ending, (size, *more)) for name, size in zip(names, sizes, strict=True)]


def _attention(config: ModelConfig) -> list[list[Named]]:
    hidden, q, kv, names = config.hidden_size, config.q_size, config.kv_size, qkv_names(config)
    groups = [_rows(names, (q, kv, kv), ".weight", hidden)]
    if config.qkv_bias:
        groups.append(_rows(names, (q, kv, kv), ".bias"))
    if config.qk_norm:
        sizes = (q, kv) if config.qk_norm_whole else (config.head_dim, config.head_dim)
        groups += [[(f"self_attn.{name}_norm.weight", (size,))] for name, size in zip("qk", sizes, strict=True)]
    if config.has_sinks:
        groups.append([("self_attn.sinks", (config.num_heads,))])
    groups.append([("self_attn.o_proj.weight", (hidden, q))])
    return groups + [[("self_attn.o_proj.bias", (hidden,))]] * config.o_bias


def _mlp(config: ModelConfig) -> list[list[Named]]:
    hidden, inner, names = config.hidden_size, config.intermediate_size, gate_up_names(config)
    groups = [_rows(names, (inner, inner), ".weight", hidden)]
    if config.mlp_bias:
        groups.append(_rows(names, (inner, inner), ".bias"))
    groups.append([("mlp.down_proj.weight", (hidden, inner))])
    return groups + [[("mlp.down_proj.bias", (hidden,))]] * config.mlp_bias


def _experts(config: ModelConfig, experts: Experts) -> list[list[Named]]:
    """Name the tensors of a mixture: the gate and up of all experts are one matrix, and so are their downs."""
    hidden, inner, num = config.hidden_size, experts.intermediate_size, experts.num_experts
    names, (gate_up, down) = EXPERT_NAMES[experts.style], expert_names(experts)
    groups: list[list[Named]] = [[(names.router + ".weight", (num, hidden))]]
    if "{}" not in names.down:
        groups += [[(gate_up[0], (num, 2 * inner, hidden))], [(down[0], (num, hidden, inner))]]
    else:
        groups += [[(name, (inner, hidden)) for name in gate_up], [(name, (hidden, inner)) for name in down]]
    if experts.has_bias:
        groups.append([(names.router + ".bias", (num,))])
        groups += [[(names.gate_up[0] + "_bias", (num, 2 * inner))], [(names.down + "_bias", (num, hidden))]]
    if shared := experts.shared_size:
        groups.append([(f"{names.shared}.{part}_proj.weight", (shared, hidden)) for part in ("gate", "up")])
        groups.append([(f"{names.shared}.down_proj.weight", (hidden, shared))])
    if experts.has_shared_gate:
        groups.append([(names.shared + "_gate.weight", (1, hidden))])
    return groups


def _layer_unit(config: ModelConfig, layer: int, dtype: str) -> WeightUnit:
    prefix, experts = f"model.layers.{layer}.", config.experts_of(layer)
    norms = NORM_NAMES[config.pre_norms, config.post_norms]
    groups: list[list[Named]] = [[(name + ".weight", (config.hidden_size,))] for name in norms if name is not None]
    groups += _attention(config)
    groups += _mlp(config) if experts is None else _experts(config, experts)
    named = [[(prefix + name, shape) for name, shape in group] for group in groups]
    return _pack(layer_name(layer), named, config, dtype)


def weight_units(config: ModelConfig, dtype: str | torch.dtype) -> tuple[WeightUnit, ...]:
    """Return all units of a model, in the order of a forward pass: embed, layers, and head unless it is tied.

    dtype: of what is stored as numbers, or its name.
    """
    return _weight_units(config, str(dtype).removeprefix("torch."))


@lru_cache(maxsize=32)  # a mixture of experts has tens of thousands of tensors, and a plan asks a hundred times
def _weight_units(config: ModelConfig, dtype: str) -> tuple[WeightUnit, ...]:
    vocab = (config.vocab_size, config.hidden_size)
    norm: list[Named] = [("model.norm.weight", (config.hidden_size,))]
    embed: list[list[Named]] = [[("model.embed_tokens.weight", vocab)]]
    layers = [_layer_unit(config, i, dtype) for i in range(config.num_layers)]
    if config.tie_embeddings:
        return (_pack("embed", [*embed, norm], config, dtype), *layers)
    head = _pack("head", [norm, [("lm_head.weight", vocab)]], config, dtype)
    return (_pack("embed", embed, config, dtype), *layers, head)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that the model needs, in the order of a forward pass."""
    units = weight_units(replace(config, formats=NO_BLOCKS), config.dtype)
    return {tensor.name: tensor.shape for unit in units for tensor in unit.tensors}


def formats_of(config: ModelConfig, scheme: Scheme) -> Formats:
    """Return the blocks that each matrix is kept in, of a checkpoint that is quantized or becomes so as it is read."""
    shapes = {spec.name: spec.shape for unit in weight_units(config, config.dtype) for spec in unit.tensors}
    held = {name: shape[-1] for name, shape in shapes.items() if scheme.holds(name, len(shape))}
    held = {
        name: columns for name, columns in held.items() if not scheme.skips(*names_of(name.removesuffix(".weight")))
    }
    kept = {name: blocks for name, columns in held.items() if (blocks := scheme.blocks_of(columns))}
    kept = without_uneven(config, kept)
    return Formats(kept, scheme, frozenset(kept if scheme.is_made else held))


def without_uneven(config: ModelConfig, blocks: Mapping[str, Blocks]) -> dict[str, Blocks]:
    """Return the blocks of matrices, but for those of experts that are not all stored alike: one operation reads them.

    Such are kept as numbers.
    """
    uneven = set[str]()
    for layer in range(config.num_layers):
        experts = config.experts_of(layer)
        for names in () if experts is None else expert_names(experts):
            named = [f"model.layers.{layer}.{name}" for name in names]
            if len({blocks.get(name) for name in named}) > 1:
                uneven.update(named)
    return {name: kept for name, kept in blocks.items() if name not in uneven}


def units_of_stage(config: ModelConfig, first_layer: int, last_layer: int) -> tuple[str, ...]:
    """Return the names of the units that a stage `[first_layer, last_layer)` needs, embedding and head at the ends."""
    names = [layer_name(i) for i in range(first_layer, last_layer)]
    is_first, is_last = first_layer == 0, last_layer == config.num_layers
    if is_first or (is_last and config.tie_embeddings):
        names.insert(0, "embed")
    if is_last and not config.tie_embeddings:
        names.append("head")
    return tuple(names)
