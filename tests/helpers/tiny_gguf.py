"""A tiny Llama as a GGUF file and as a wheel that carries one, written by the `gguf` package."""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from tiny_models import BOS, CHAT_TEMPLATE, EOS, SPECIAL_TOKENS, make_tiny_model

from kunserve.model.embedded import EmbeddedModel
from kunserve.model.gguf.shape import GLOBAL_NAMES, LAYER_NAMES

MEMBER = "tiny/tiny.gguf"
PRE = {"llama": "smollm", "llama3": "llama-bpe"}  # how each family cuts words; the others as Qwen
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}  # rows of whole blocks, of any format


def write_tiny_gguf(
    folder: Path,
    kind: Kind = Kind.F32,
    family: str = "llama",
    kinds: Mapping[str, Kind] | None = None,
    num_files: int = 1,
    **overrides: Any,
) -> Path:
    """Write `folder`/tiny.gguf, and the Hugging Face model that it was made from in `folder`/reference.

    Matrices are of `kind`, those whose GGUF name holds a key of `kinds` of that; the file of the first of `num_files`
    is returned.
    """
    shape = {"tie_word_embeddings": True, "intermediate_size": 64} if kind in SMALL and not kinds else SHAPE
    reference = make_tiny_model(family, folder / "reference", **shape | overrides)
    config = json.loads((reference / "config.json").read_text())
    names = [folder / "tiny.gguf"]
    if num_files > 1:
        names = [folder / f"tiny-{i + 1:05}-of-{num_files:05}.gguf" for i in range(num_files)]
    writers = [gguf.GGUFWriter(path, family.removesuffix("3") if family == "llama3" else family) for path in names]
    _add_metadata(writers[0], reference, config, PRE.get(family, "qwen2"))
    if num_files > 1:
        writers[0].add_uint16("split.count", num_files)
    is_llama = family.startswith("llama")
    for i, (name, weight) in enumerate(load_file(reference / "model.safetensors").items()):
        writer, gguf_name = writers[i % num_files], _gguf_name(name)
        values = _permute(name, weight, config) if is_llama else weight.numpy()
        if values.ndim == 1:
            writer.add_tensor(gguf_name, values)
        else:
            of = next((one for part, one in (kinds or {}).items() if part in gguf_name), kind)
            writer.add_tensor(gguf_name, _quantize(values, of), raw_dtype=of)
    if family == "llama3":
        writers[-1].add_tensor("rope_freqs.weight", _rope_factors(config))
    for writer in writers:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return names[0]


SMALL = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_1, Kind.Q8_0, Kind.Q4_0, Kind.Q5_0, Kind.Q5_1)


def _gguf_name(name: str) -> str:
    known = {f"{hf}.weight": f"{ours}.weight" for ours, hf in GLOBAL_NAMES.items()}
    if name in known:
        return known[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{next(ours for ours, hf in LAYER_NAMES.items() if hf == part)}.{kind}"


def _quantize(values: np.ndarray[Any, Any], kind: Kind) -> np.ndarray[Any, Any]:
    """Quantize a matrix; the package cannot for K formats, whose codes are drawn at random then."""
    try:
        return np.asarray(gguf.quants.quantize(values, kind))
    except NotImplementedError:
        block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        made = np.random.default_rng(values.size).integers(0, 256, (values.size // block, num_bytes), dtype=np.uint8)
        scales = np.random.default_rng(1).uniform(0.0002, 0.0004, (len(made), 2)).astype(np.float16)
        if kind == Kind.Q6_K:
            made[:, 208:] = (scales[:, :1] / 20).view(np.uint8)
        else:
            scales[:, 1] *= 8  # so that values lie around 0
            made[:, :4] = scales.view(np.uint8)
        return made.reshape(len(values), -1)


def _rope_factors(config: dict[str, Any]) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter writes for Llama 3.1."""
    rope, half = config["rope_parameters"], config["head_dim"] // 2
    low, high, original = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    factors = []
    for i in range(half):
        wavelen = 2 * math.pi * rope["rope_theta"] ** (i / half)
        smooth = (original / wavelen - low) / (high - low)
        if wavelen < original / high:
            factors.append(1.0)
        else:
            is_slow = wavelen > original / low
            factors.append(rope["factor"] if is_slow else 1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def write_tiny_wheel(folder: Path) -> tuple[EmbeddedModel, Path]:
    """Write a wheel with the tiny GGUF file that pip accepts, and what a card would say about it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = write_tiny_gguf(folder)
    wheel, info = folder / "tiny_gguf_wheel-1.0-py3-none-any.whl", "tiny_gguf_wheel-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(model, MEMBER)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf-wheel\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return EmbeddedModel("tiny-gguf-wheel", "1.0", digest, MEMBER), wheel


def _permute(name: str, weight: torch.Tensor, config: dict[str, Any]) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to q and k of a Llama: pairs (i, i + d / 2) of a head become neighbours."""
    sizes = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    values: np.ndarray[Any, Any] = weight.numpy()
    if (size := sizes.get(name.split(".")[-2])) is None:
        return values
    heads = values.reshape(config[size], 2, len(values) // config[size] // 2, -1)
    return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(values.shape))


def _add_metadata(writer: gguf.GGUFWriter, reference: Path, config: dict[str, Any], pre: str) -> None:
    vocabulary = json.loads((reference / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config.get("rope_parameters", config).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_chat_template(CHAT_TEMPLATE)
