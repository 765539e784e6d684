"""Model files, conversion: one GGUF file (Llama architecture) -> a Hugging Face folder in float32.

The reader is our own: the `gguf` package reads each of 100,000 vocabulary strings into arrays of its own, which takes
ten times longer than all the rest. Its tables and its slower dequantizers serve for everything but our own formats.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from kunserve.errors import ConfigError
from kunserve.model.checkpoint import save_checkpoint
from kunserve.model.config import ModelConfig
from kunserve.model.hf_config import check_config

F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8  # ggml's numbers of the formats
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
CONTROL, USER_DEFINED = 3, 4  # token types

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor as stored: `data` is the raw bytes, `shape` that of the torch weight (out, in)."""

    name: str
    shape: tuple[int, ...]
    format: int
    data: Tensor


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Metadata and tensors of a GGUF file; the tensors share the buffer that was read."""

    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]


def convert_gguf(buffer: bytearray, folder: Path, progress: Callable[[str], None] = lambda _: None) -> ModelConfig:
    """Write config, tokenizer and float32 weights of the GGUF file in `buffer` into `folder`.

    Raises ConfigError when the file is damaged, or holds an architecture or tokenizer we do not know.
    """
    file = read_gguf(buffer)
    tensors = {}
    config = gguf_config(file)
    for i, tensor in enumerate(file.tensors):
        if i % 90 == 0:
            progress(f"dequantizing weights: {i} of {len(file.tensors)} tensors")
        name, weight = hf_name(tensor.name), dequantize(tensor)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _unpermute(weight, config.num_heads if "q_proj" in name else config.num_kv_heads)
        tensors[name] = weight
    progress("writing the converted model")
    save_checkpoint(folder, config, tensors)
    _save_tokenizer(file.metadata, folder)
    return config


def read_gguf(buffer: bytearray) -> GgufFile:
    """Parse a GGUF file (version 2 or 3, little endian). Raises ConfigError when it is damaged."""
    try:
        return _Reader(buffer).read()
    except (struct.error, LookupError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"damaged GGUF file: {error}") from None


class _Reader:
    """A position in the buffer, moved by each read."""

    def __init__(self, buffer: bytearray) -> None:
        self._buffer = buffer
        self._offset = 0

    def read(self) -> GgufFile:
        if self._buffer[:4] != b"GGUF" or self._scalar(4, skip=4) not in (2, 3):
            raise ValueError("it does not start as GGUF version 2 or 3")
        num_tensors, num_fields = self._scalar(10), self._scalar(10)
        metadata = {self._string(): self._value(self._scalar(4)) for _ in range(num_fields)}
        headers = [self._tensor_header() for _ in range(num_tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-self._offset // alignment) * alignment
        return GgufFile(metadata, tuple(self._tensor(start, *header) for header in headers))

    def _scalar(self, kind: int, skip: int = 0) -> Any:
        code = SCALARS[kind]
        (value,) = struct.unpack_from(code, self._buffer, self._offset + skip)
        self._offset += skip + struct.calcsize(code)
        return value

    def _string(self) -> str:
        start = self._offset + 8
        self._offset = start + self._scalar(10)
        if self._offset > len(self._buffer):
            raise ValueError("a string ends beyond the file")
        return self._buffer[start : self._offset].decode()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            item, count = self._scalar(4), self._scalar(10)
            return [self._value(item) for _ in range(count)]
        return self._scalar(kind)

    def _tensor_header(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dims = self._string(), self._scalar(4)
        dims = tuple(self._scalar(10) for _ in range(num_dims))
        return name, dims[::-1], self._scalar(4), self._scalar(10)  # GGUF stores the fastest dimension first

    def _tensor(self, start: int, name: str, shape: tuple[int, ...], format: int, offset: int) -> GgufTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(format)]
        num_bytes = prod(shape) // block * block_bytes
        data = torch.frombuffer(self._buffer, dtype=torch.uint8, count=num_bytes, offset=start + offset)
        return GgufTensor(name, shape, format, data)


def dequantize(tensor: GgufTensor) -> Tensor:
    """Return the float32 values, bit-equal to the `gguf` package's."""
    if tensor.format == F32:
        values = tensor.data.clone().view(torch.float32)
    elif tensor.format == F16:
        values = tensor.data.clone().view(torch.float16).float()
    elif tensor.format == Q4_1:  # 32 values: scale, minimum, 16 bytes of two nibbles (low ones first)
        blocks = tensor.data.view(-1, 20)
        scale, minimum = _float16(blocks[:, :2]), _float16(blocks[:, 2:4])
        nibbles = torch.cat([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], dim=1).float()
        values = nibbles.mul_(scale).add_(minimum)
    elif tensor.format == Q8_0:  # 32 values: scale, 32 signed bytes
        blocks = tensor.data.view(-1, 34)
        values = blocks[:, 2:].view(torch.int8).float().mul_(_float16(blocks[:, :2]))
    else:
        values = _dequantize_slowly(tensor)
    return values.view(tensor.shape)


def _float16(pairs: Tensor) -> Tensor:
    """Two bytes a row, (N, 2) uint8 -> (N, 1) float32."""
    return pairs.contiguous().view(torch.float16).float()


def _dequantize_slowly(tensor: GgufTensor) -> Tensor:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as gguf_dequantize

    kind = GGMLQuantizationType(tensor.format)
    try:
        return torch.from_numpy(gguf_dequantize(tensor.data.numpy(), kind))
    except NotImplementedError:
        raise ConfigError(f"tensor {tensor.name} has the format {kind.name}, which cannot be read") from None


def _unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's order of rotary pairs: pairs (2i, 2i + 1) of each head become (i, i + head_dim / 2)."""
    rows, columns = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns).contiguous()


def hf_name(name: str) -> str:
    """Translate a GGUF tensor's name; raises ConfigError for one that a Llama does not have."""
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in LAYER_NAMES:
            return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
    raise ConfigError(f"GGUF tensor {name} is not known in a Llama model")


def gguf_config(file: GgufFile) -> ModelConfig:
    """Read the model's shape from the metadata. Raises ConfigError for another architecture or scaled rope."""
    values = file.metadata
    if (architecture := values.get("general.architecture")) != "llama":
        raise ConfigError(f"GGUF architecture {architecture!r} is not supported, only 'llama'")
    if values.get("llama.rope.scaling.type", "none") != "none":
        raise ConfigError("GGUF rope scaling is not supported")
    try:
        hidden, heads = values["llama.embedding_length"], values["llama.attention.head_count"]
        config = ModelConfig(
            family="llama",
            vocab_size=len(values["tokenizer.ggml.tokens"]),
            hidden_size=hidden,
            intermediate_size=values["llama.feed_forward_length"],
            num_layers=values["llama.block_count"],
            num_heads=heads,
            num_kv_heads=values.get("llama.attention.head_count_kv", heads),
            head_dim=values.get("llama.attention.key_length", hidden // heads),
            max_position_embeddings=values["llama.context_length"],
            rms_norm_eps=_shortest(values["llama.attention.layer_norm_rms_epsilon"]),
            rope_theta=_shortest(values.get("llama.rope.freq_base", 10000.0)),
            tie_embeddings=all(tensor.name != "output.weight" for tensor in file.tensors),
            bos_token_id=values.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=(values["tokenizer.ggml.eos_token_id"],),
        )
    except KeyError as error:
        raise ConfigError(f"GGUF metadata lacks {error}") from None
    check_config(config)
    return config


def _shortest(value: float) -> float:
    """The decimal number somebody wrote: 9.999999747378752e-06 was 1e-05 before it became a float32."""
    return float(f"{value:.7g}")


def _save_tokenizer(values: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json (special tokens, chat template) and generation_config.json."""
    kind = (values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ConfigError(f"GGUF tokenizer {kind} is not supported, only ('gpt2', 'smollm')")
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in values["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # What the name "smollm" stands for: every digit alone, then GPT-2's byte-level words.
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED])
    tokenizer.save(str(folder / "tokenizer.json"))

    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: values.get(f"tokenizer.ggml.{gguf}_token_id") for name, gguf in names.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": values["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": values.get("tokenizer.chat_template"),
        **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
    }
    generation = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
