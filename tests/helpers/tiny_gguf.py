"""A tiny Llama as a GGUF file and as a wheel that carries one, written by the `gguf` package."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from tiny_models import BOS, CHAT_TEMPLATE, EOS, SPECIAL_TOKENS, make_tiny_model

from kunserve.model.embedded import EmbeddedModel
from kunserve.model.gguf_convert import GLOBAL_NAMES, LAYER_NAMES

HIDDEN, HEADS, KV_HEADS = 64, 4, 2
MEMBER = "tiny/tiny.gguf"


def write_tiny_gguf(folder: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> Path:
    """Write `folder`/tiny.gguf, matrices as `kind`, and the Hugging Face model it stands for in `folder`/reference."""
    reference = make_tiny_model("llama", folder / "reference", tie_word_embeddings=True, intermediate_size=64)
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    _add_metadata(writer, reference)
    hf_names = {hf: name for name, hf in GLOBAL_NAMES.items()}
    for name, weight in load_file(reference / "model.safetensors").items():
        if (gguf_name := hf_names.get(name)) is None:
            _, _, layer, rest = name.split(".", 3)
            part = next(part for part, hf in LAYER_NAMES.items() if rest == f"{hf}.weight")
            gguf_name = f"blk.{layer}.{part}.weight"
        values = _permute(name, weight).numpy()
        if values.ndim == 1:
            writer.add_tensor(gguf_name, values)
        else:
            writer.add_tensor(gguf_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


def _permute(name: str, weight: torch.Tensor) -> torch.Tensor:
    """What llama.cpp's converter does to q and k: pairs (i, i + d / 2) of a head become neighbours."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return torch.from_numpy(
        np.ascontiguousarray(
            weight.numpy().reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
        )
    )


def _add_metadata(writer: gguf.GGUFWriter, reference: Path) -> None:
    vocabulary = json.loads((reference / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(64)
    writer.add_block_count(3)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_chat_template(CHAT_TEMPLATE)
