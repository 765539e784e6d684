"""GGUF: which tensors of a file, or parts of them, are the tensors that Hugging Face has.

A file holds the experts of a layer as one tensor, and may hold q, k and v as one, or what is one there as several. Each
part is a run of rows, whose bytes lie together: it is read without the rest of its tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from kunserve.errors import ConfigError
from kunserve.model.config import Experts, ModelConfig
from kunserve.model.config_fields import shorten
from kunserve.model.gguf.file import GgufFile, GgufTensor
from kunserve.model.gguf.rope import FACTORS
from kunserve.model.layout import EXPERT_NAMES, expected_shapes

Parts = tuple[GgufTensor, ...]  # whose rows follow each other; of the experts of a layer, those of each expert

GLOBAL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
QKV, GATE_UP = ("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")


class Piece(NamedTuple):
    """Part of a file's tensor: of one expert, if it holds those of all; some of its rows."""

    tensor: str
    expert: int | None = None
    rows: tuple[int, int] | None = None  # first and end
    num_rows: int = 0  # that there must be, of which these are some


Pieces = tuple[Piece, ...]


def parts_of(file: GgufFile, config: ModelConfig, layer_names: Mapping[str, str]) -> dict[str, Parts]:
    """Return what a file holds of each tensor of a model, by Hugging Face's names; `layer_names`: see `Architecture`.

    ConfigError if one is missing, has another shape, or would be left out: answers would be wrong without it.
    """
    shapes, ways = expected_shapes(config), dict(_ways(config, layer_names))
    found, missing, used = dict[str, Parts](), list[str](), set(FACTORS)
    for name, shape in shapes.items():
        pieces = next((way for way in ways[name] if all(piece.tensor in file.tensors for piece in way)), None)
        if pieces is None:
            missing += [piece.tensor for piece in ways[name][0] if piece.tensor not in file.tensors]
        else:
            found[name] = _checked(name, tuple(_cut(file.tensors[piece.tensor], piece) for piece in pieces), shape)
            used.update(piece.tensor for piece in pieces)
    if missing := list(dict.fromkeys(missing)):
        raise ConfigError(f"the file lacks {len(missing)} of its model's tensors: {shorten(missing)}")
    if unused := sorted(file.tensors.keys() - used):
        raise ConfigError(f"the file has tensors that {config.family} does not ({len(unused)}): {shorten(unused)}")
    return found


def joined_axis(name: str, num_dims: int) -> int:
    """Return the axis along which parts of a tensor follow each other: that of rows, or of what is added to each."""
    return num_dims - (1 if num_dims == 1 or name.endswith("bias") else 2)


def _ways(config: ModelConfig, layer_names: Mapping[str, str]) -> Iterator[tuple[str, list[Pieces]]]:
    """Yield Hugging Face's name of each tensor that a model may have, and the ways in which a file may hold it."""
    for name, ours in GLOBAL_NAMES.items():
        yield f"{name}.weight", [(Piece(f"{ours}.weight"),)]
    for layer in range(config.num_layers):
        for name, ways in _of_layer(config, config.experts_of(layer), {**LAYER_NAMES, **layer_names}):
            named = [tuple(piece._replace(tensor=f"blk.{layer}.{piece.tensor}") for piece in way) for way in ways]
            yield f"model.layers.{layer}.{name}", named


def _of_layer(
    config: ModelConfig, experts: Experts | None, names: Mapping[str, str]
) -> Iterator[tuple[str, list[Pieces]]]:
    q, kv = config.q_size, config.kv_size
    rows = dict(zip(QKV, ((0, q), (q, q + kv), (q + kv, q + 2 * kv)), strict=True))
    for kind in (".weight", ".bias"):
        for name, ours in names.items():
            whole = Piece("attn_qkv" + kind, rows=rows.get(ours), num_rows=q + 2 * kv)
            fused: list[Pieces] = [(whole,)] if ours in rows else []
            yield name + kind, [(Piece(ours + kind),), *fused]
        yield "self_attn.qkv_proj" + kind, [(Piece("attn_qkv" + kind),), tuple(Piece(ours + kind) for ours in QKV)]
    yield "self_attn.sinks", [(Piece("attn_sinks.weight"),)]
    if experts is not None:
        yield from _of_experts(experts)


def _of_experts(experts: Experts) -> Iterator[tuple[str, list[Pieces]]]:
    names, inner = EXPERT_NAMES[experts.style], experts.intermediate_size
    for kind in (".weight", ".bias"):
        yield names.router + kind, [(Piece("ffn_gate_inp" + kind),)]
    if "{}" in names.down:
        for i in range(experts.num_experts):
            for j, (name, ours) in enumerate(zip(names.gate_up, GATE_UP, strict=True)):
                fused = Piece("ffn_gate_up_exps.weight", i, (j * inner, (j + 1) * inner), 2 * inner)
                yield name.format(i), [(Piece(f"{ours}_exps.weight", i),), (fused,)]
            yield names.down.format(i), [(Piece("ffn_down_exps.weight", i),)]
    else:
        for ending, kind in (("", ".weight"), ("_bias", ".bias")):
            apart = tuple(Piece(f"{ours}_exps{kind}") for ours in GATE_UP)
            yield names.gate_up[0] + ending, [apart, (Piece("ffn_gate_up_exps" + kind),)]
            yield names.down + ending, [(Piece("ffn_down_exps" + kind),)]
    for part in ("gate", "up", "down"):
        yield f"{names.shared}.{part}_proj.weight", [(Piece(f"ffn_{part}_shexp.weight"),)]
    yield f"{names.shared}_gate.weight", [(Piece("ffn_gate_inp_shexp.weight"),)]


def _cut(tensor: GgufTensor, piece: Piece) -> GgufTensor:
    """Return the part of a tensor that a piece is. ConfigError if the tensor has no such part."""
    shape, num_dims = tensor.shape, 3 if piece.expert is not None else len(tensor.shape)
    end = piece.expert + 1 if piece.expert is not None else 0
    if len(shape) != num_dims or shape[0] < end or (piece.rows and shape[-2:][0] != piece.num_rows):
        raise ConfigError(f"tensor {tensor.name} has shape {list(shape)}: the model has other parts")
    if piece.expert is not None:
        tensor = replace(tensor.rows(piece.expert, end), shape=shape[1:])
    return tensor if piece.rows is None else tensor.rows(*piece.rows)


def _checked(name: str, parts: Parts, shape: tuple[int, ...]) -> Parts:
    """Return parts that together have a shape. ConfigError, with the name of one, if they have not."""
    if shape[0] == 1 and parts[0].shape == shape[1:]:  # the gate of a shared expert is a vector
        return (replace(parts[0], shape=shape),)
    axis, left = joined_axis(name, len(shape)), list(shape)
    left[axis] -= sum(part.shape[axis] for part in parts if len(part.shape) == len(shape))
    for part in parts:
        wanted = [*shape]
        wanted[axis] = part.shape[axis] if left[axis] == 0 and len(part.shape) == len(shape) else shape[axis]
        if list(part.shape) != wanted:
            raise ConfigError(f"tensor {part.name} has shape {list(part.shape)}, not {wanted}")
    return parts
