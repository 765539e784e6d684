"""GGUF: the model that a file's metadata describe, and the Hugging Face names of its tensors."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from math import prod
from typing import Any

from kunserve.errors import ConfigError
from kunserve.model.config import ModelConfig, RopeScaling
from kunserve.model.config_fields import show
from kunserve.model.files import reading
from kunserve.model.gguf.file import GgufFile, GgufTensor
from kunserve.model.hf_config import check_config
from kunserve.model.quant.formats import Formats

ARCHITECTURES = ("llama", "qwen2", "qwen3")
OTHERWISE = "take the model in safetensors instead of GGUF"
ROPE_FACTORS = "rope_freqs.weight"  # of Llama 3.1 and later: what each pair's step is divided by
# The scalings that were published; a file has their factors, not these numbers.
LLAMA3_SCALINGS = (RopeScaling(8.0, 1.0, 4.0, 8192), RopeScaling(32.0, 1.0, 4.0, 8192))
GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Tokens that end a turn or a text, whatever the file names as its one end token.
ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>")
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # types of tokens


def hf_name(name: str) -> str:
    """Translate a tensor's name; raises ConfigError for one that none of these models has."""
    match name.split("."):
        case [part, kind] if part in GLOBAL_NAMES:
            return f"{GLOBAL_NAMES[part]}.{kind}"
        case ["blk", layer, part, kind] if part in LAYER_NAMES and layer.isdecimal():
            return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"
    raise ConfigError(f"tensor {name} is of no model that is served from GGUF files")


def hf_tensors(file: GgufFile) -> dict[str, GgufTensor]:
    """Return the weights by their Hugging Face names. ConfigError for one that none of these models has."""
    return {hf_name(name): tensor for name, tensor in file.tensors.items() if name != ROPE_FACTORS}


def gguf_config(file: GgufFile) -> ModelConfig:
    """Return the model's shape, with the blocks of its matrices. ConfigError for one that is not run."""
    try:
        return _config(file)
    except ConfigError as error:
        raise ConfigError(f"{file.paths[0]}: {error.message}") from None
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:  # values of another kind than they are known
        raise ConfigError(f"{file.paths[0]}: its metadata is damaged ({error})") from None


def _config(file: GgufFile) -> ModelConfig:
    metadata = file.metadata
    family = metadata.get("general.architecture")
    if family not in ARCHITECTURES:
        raise ConfigError(f"architecture {show(family)} is not served from GGUF files, only {', '.join(ARCHITECTURES)}")
    fields = _Fields(metadata, family)
    _refuse_unsupported(fields)
    hidden, heads = fields.whole("embedding_length"), fields.whole("attention.head_count")
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    head_dim = fields.whole("attention.key_length", hidden // max(1, heads))
    theta = _shortest(fields.number("rope.freq_base", 10000.0))
    vocab_size = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else len(tokens)
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    config = ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=fields.whole("feed_forward_length"),
        num_layers=fields.whole("block_count"),
        num_heads=heads,
        num_kv_heads=fields.whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=fields.whole("context_length"),
        rms_norm_eps=_shortest(fields.number("attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, fields, theta),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        bos_token_id=None if type(bos) is int and not 0 <= bos < vocab_size else bos,  # see tokenizer._special_ids
        eos_token_ids=_ends(metadata),
        formats=Formats({name: t.blocks for name, t in hf_tensors(file).items() if t.blocks and len(t.shape) == 2}),
    )
    check_config(config)
    if (dims := fields.whole("rope.dimension_count", head_dim)) != head_dim:
        raise ConfigError(f"{family}.rope.dimension_count {dims} is not the head's size {head_dim}: not supported")
    return config


class _Fields:
    """The metadata of one architecture: `llama.block_count` and so on."""

    def __init__(self, metadata: Mapping[str, Any], family: str) -> None:
        self._metadata, self._family = metadata, family

    def get(self, name: str) -> Any:
        """Return a value, or None."""
        return self._metadata.get(f"{self._family}.{name}")

    def whole(self, name: str, default: int | None = None) -> int:
        """Return an integer. ConfigError if it is none, or missing without a default."""
        value = self.number(name, default)
        if not isinstance(value, int):
            raise ConfigError(f"metadata {self._family}.{name}: expected a whole number, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number. ConfigError if it is none, or missing without a default."""
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"metadata lack {self._family}.{name}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"metadata {self._family}.{name}: expected a number, not {type(value).__name__}")
        return value


def _refuse_unsupported(fields: _Fields) -> None:
    """Raise ConfigError for the first value that changes the result and that we do not compute."""
    if fields.get("expert_count"):
        raise ConfigError("mixtures of experts are not supported in GGUF files")


def _rope_scaling(file: GgufFile, fields: _Fields, theta: float) -> RopeScaling | None:
    """Return the scaling that the metadata say, or that the file's factors are of."""
    linear, tensor = _linear_scaling(fields), file.tensors.get(ROPE_FACTORS)
    if linear is not None and tensor is not None:
        both = f"rope.scaling.factor {linear.factor:g} together with tensor {tensor.name}"
        raise ConfigError(f"{both} is not supported: {OTHERWISE}")
    return linear if tensor is None else _scaling_of(tensor, theta)


def _linear_scaling(fields: _Fields) -> RopeScaling | None:
    """Return the scaling that the metadata say: without a type it is linear; factors of 0 and 1 stand for none."""
    if (kind := fields.get("rope.scaling.type") or "linear") not in ("none", "linear"):
        raise ConfigError(f"metadata rope.scaling.type: {show(kind)} is not supported, only linear: {OTHERWISE}")
    if (stretch := fields.number("rope.scaling.attn_factor", 1.0)) != 1:
        raise ConfigError(f"metadata rope.scaling.attn_factor: {stretch:g} is not supported, only 1: {OTHERWISE}")
    factor = _shortest(fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 0.0)))  # the old name
    return None if kind == "none" or factor in (0, 1) else RopeScaling(factor, kind="linear")


def _scaling_of(tensor: GgufTensor, theta: float) -> RopeScaling:
    """Return the scaling that factors are of."""
    if tensor.format != "F32":
        raise ConfigError(f"tensor {tensor.name} has the format {tensor.format}, not F32")
    with reading(tensor.path), tensor.path.open("rb") as data:
        data.seek(tensor.offset)
        found = struct.unpack(f"<{prod(tensor.shape)}f", data.read(tensor.num_bytes))
    for scaling in LLAMA3_SCALINGS:
        wanted = [_factor(scaling, theta ** (-i / len(found))) for i in range(len(found))]
        if all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(wanted, found, strict=True)):
            return scaling
    raise ConfigError(f"tensor {tensor.name} scales positions in another way than Llama 3.1 and 3.2: not supported")


def _factor(scaling: RopeScaling, step: float) -> float:
    """Return what Llama 3.1 divides a pair's step per position (radians) by."""
    turns = scaling.original_max_position_embeddings * step / (2 * math.pi)  # within the original context
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = min(1.0, max(0.0, share))
    return 1 / ((1 - share) / scaling.factor + share)


def _ends(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tokens that end an answer: first the file's own."""
    names = ("eos", "eot", "eom")
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
    tokens, types = metadata.get("tokenizer.ggml.tokens") or [], metadata.get("tokenizer.ggml.token_type") or []
    control = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind == CONTROL}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")  # SmolLM2 uses up one of them for it
    ids += [control[token] for token in ENDS if token in control and control[token] != unknown]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _shortest(value: float) -> float:
    """Return the decimal number that somebody wrote: 9.999999747378752e-06 was 1e-05 before it became a float32."""
    return float(f"{value:.7g}")
