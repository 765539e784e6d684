"""Tiny models as GGUF files, written as llama.cpp's converters do, and a wheel that carries one."""

from __future__ import annotations

import hashlib
import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from tiny_models import BOS, CHAT_TEMPLATE, EOS, SPECIAL_TOKENS, make_tiny_deepseek, make_tiny_model

from kunserve.model.embedded import EmbeddedModel

MEMBER = "tiny/tiny.gguf"
# By the variant's name (tiny_models.VARIANTS) up to "-": what llama.cpp calls the family, where that is not the same.
ARCHITECTURES = {
    "llama3": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen3-moe": "qwen3moe",
    "qwen2-moe": "qwen2moe",
}
PRE = {"llama": "smollm", "llama3": "llama-bpe"}  # how each family cuts words; the others as Qwen
MOVED = ("llama", "granite", "smollm3", "deepseek")  # architectures that turn neighbours of q and k
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}  # rows of whole blocks, of any format


def architecture_of(family: str) -> str:
    """What llama.cpp calls the architecture of a variant."""
    known = ARCHITECTURES | {"gpt-oss": "gpt-oss"}
    return known.get(family) or known.get(family.partition("-")[0]) or family.partition("-")[0]


def write_tiny_gguf(
    folder: Path,
    kind: Kind = Kind.F32,
    family: str = "llama",
    kinds: Mapping[str, Kind] | None = None,
    num_files: int = 1,
    metadata: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write `folder`/tiny.gguf, and the Hugging Face model that it was made from in `folder`/reference.

    Matrices are of `kind`, those whose GGUF name holds a key of `kinds` of that; `metadata` are the architecture's
    own. The file of the first of `num_files` is returned.
    """
    shape = {"tie_word_embeddings": True, "intermediate_size": 64} if kind in SMALL and not kinds else SHAPE
    if family == "deepseek":
        reference = make_tiny_deepseek(folder).rename(folder / "reference")
    else:
        reference = make_tiny_model(family, folder / "reference", **shape | overrides)
    config = json.loads((reference / "config.json").read_text())
    names = [folder / "tiny.gguf"]
    if num_files > 1:
        names = [folder / f"tiny-{i + 1:05}-of-{num_files:05}.gguf" for i in range(num_files)]
    architecture = architecture_of(family)
    writers = [gguf.GGUFWriter(path, architecture) for path in names]
    _add_metadata(writers[0], reference, config, PRE.get(family, "qwen2"))
    for name, value in (metadata or {}).items():
        add = writers[0].add_float32 if isinstance(value, float) else writers[0].add_uint32
        (writers[0].add_string if isinstance(value, str) else add)(f"{architecture}.{name}", value)
    if num_files > 1:
        writers[0].add_uint16("split.count", num_files)
    for i, (name, values) in enumerate(_converted(reference, architecture, config)):
        writer = writers[i % num_files]
        if values.ndim == 1 or name.endswith(".bias"):
            writer.add_tensor(name, values)
        else:
            of = next((one for part, one in (kinds or {}).items() if part in name), kind)
            writer.add_tensor(name, _quantize(values, of), raw_dtype=of)
    if family == "llama3":
        writers[-1].add_tensor("rope_freqs.weight", _rope_factors(config))
    for name, factors in _longrope_factors(config):
        writers[-1].add_tensor(name, factors)
    for writer in writers:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return names[0]


def gguf_names(architecture: str, num_layers: int) -> Any:
    """The `gguf` package's own map of names, from Hugging Face's."""
    by_name = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(by_name[architecture], num_layers)


def _converted(
    reference: Path, architecture: str, config: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield the tensors of a checkpoint as llama.cpp's converter names and changes them."""
    names = gguf_names(architecture, config["num_hidden_layers"])
    experts = dict[str, list[np.ndarray[Any, Any]]]()  # of one layer, by the name of all
    for name, weight in load_file(reference / "model.safetensors").items():
        values: np.ndarray[Any, Any] = weight.numpy()
        if architecture in MOVED:
            values = _permute(name, weight, config)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if found := re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)\.weight", name):
            experts.setdefault(_named(names, f"{found[1]}.{found[2]}.weight"), []).append(values)
        elif architecture == "gpt-oss" and ".experts." in name:
            yield from _gpt_oss_experts(names, name, values)
        else:
            yield _named(names, f"{name}.weight" if name.endswith("sinks") else name), values
    for name, of_all in experts.items():
        yield name, np.stack(of_all)


def _named(names: Any, name: str) -> str:
    name = name.replace("block_sparse_moe.experts", "feed_forward.experts").replace("model.layers", "layers")
    for candidate in (name, f"model.{name}"):
        if (found := names.get_name(candidate, try_suffixes=(".weight", ".bias"))) is not None:
            return str(found)
    raise AssertionError(f"gguf has no name for {name}")


def _gpt_oss_experts(names: Any, name: str, values: np.ndarray[Any, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    stem, part = name.rsplit(".", 1)
    kind = "bias" if part.endswith("_bias") else "weight"
    if kind == "weight":
        values = values.swapaxes(-1, -2)
    if part.startswith("down"):
        yield _named(names, f"{stem}.down_proj.{kind}"), np.ascontiguousarray(values)
        return
    halves = (values[:, ::2], values[:, 1::2])
    for side, half in zip(("gate", "up"), halves, strict=True):
        yield _named(names, f"{stem}.{side}_proj.{kind}"), np.ascontiguousarray(half)


SMALL = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_1, Kind.Q8_0, Kind.Q4_0, Kind.Q5_0, Kind.Q5_1)


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
        return made.reshape(*values.shape[:-1], -1)


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


def _longrope_factors(config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    rope = config.get("rope_parameters") or {}
    for length in ("long", "short"):
        if (factors := rope.get(f"{length}_factor")) is not None:
            yield f"rope_factors_{length}.weight", np.array(factors, dtype=np.float32)


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
    rope = config.get("rope_parameters") or {}
    local, rope = rope.get("sliding_attention", {}), rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if "rope_theta" in local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    _add_scaling(writer, rope, config)
    if (share := rope.get("partial_rotary_factor", 1.0)) != 1:
        writer.add_rope_dimension_count(int(config["head_dim"] * share))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_own(writer, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_scaling(writer: gguf.GGUFWriter, rope: dict[str, Any], config: dict[str, Any]) -> None:
    kind = rope.get("rope_type")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "yarn" and "beta_fast" in rope:
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if kind == "longrope":
        scale = config["max_position_embeddings"] / rope["original_max_position_embeddings"]
        stretch = math.sqrt(1 + math.log(scale) / math.log(rope["original_max_position_embeddings"]))
        writer.add_rope_scaling_attn_factors(stretch)


# What converters write of families that have it, by its name in a config.json.
OWN = {
    "num_experts": "add_expert_count",
    "num_local_experts": "add_expert_count",
    "num_experts_per_tok": "add_expert_used_count",
    "moe_intermediate_size": "add_expert_feed_forward_length",
    "shared_expert_intermediate_size": "add_expert_shared_feed_forward_length",
    "attention_multiplier": "add_attention_scale",
    "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale",
    "logits_scaling": "add_logit_scale",
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
    "n_routed_experts": "add_expert_count",
    "n_shared_experts": "add_expert_shared_count",
    "first_k_dense_replace": "add_leading_dense_block_count",
}
WITH_WINDOW = ("gemma2", "gemma3_text", "phi3", "gpt_oss")


def _add_own(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    for name, add in OWN.items():
        if config.get(name) is not None:
            getattr(writer, add)(config[name])
    if config["model_type"] in WITH_WINDOW:
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if config["model_type"] == "gpt_oss":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
