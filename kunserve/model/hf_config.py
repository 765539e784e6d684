"""Model files, step 2: `config.json` of a Hugging Face folder -> `ModelConfig`, refusing what we would run wrongly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kunserve.errors import ConfigError
from kunserve.model.config import ACTIVATIONS, ModelConfig, RopeScaling
from kunserve.model.config_fields import (
    check_range,
    check_tokens,
    read_flag,
    read_float,
    read_int,
    read_tokens,
    show,
)
from kunserve.model.family.families import FAMILIES, family_fields, family_of, shape_values
from kunserve.model.family.rope import check_rope, read_rope
from kunserve.model.files import reading
from kunserve.model.layout import EXPERT_NAMES, formats_of
from kunserve.model.quant.formats import Formats
from kunserve.model.quant.scheme import METHODS, scheme_of

DTYPES = ("float32", "float16", "bfloat16", "float64")
NUMBERS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("max_position_embeddings", "rms_norm_eps", "rope_theta"),
)
SCALES = (
    *("attention_scale", "attention_softcap", "logit_softcap", "embed_scale", "residual_scale", "logit_divisor"),
    *("local_rope_theta", "window"),
)
EXPERT_NUMBERS = ("num_experts", "num_per_token", "intermediate_size")


def load_hf_config(folder: Path) -> ModelConfig:
    """Read `config.json`, and the end tokens of `generation_config.json`, which chat models keep there.

    Raises ConfigError when a file is missing or malformed, or the model is not one we run.
    """
    path, generation = folder / "config.json", folder / "generation_config.json"
    values = read_json(path)
    with reading(generation):
        ends = read_json(generation) if generation.exists() else {}
    if ends.get("eos_token_id") is not None:
        values["eos_token_id"] = None
    try:
        config = parse_hf_config(values)
        path = generation
        return replace(
            config, eos_token_ids=read_tokens(ends, "eos_token_id", config.vocab_size) or config.eos_token_ids
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object; raises ConfigError naming the file."""
    try:
        with reading(path):
            values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"cannot read {path}: it is nested too deeply") from None
    if not isinstance(values, dict):
        raise ConfigError(f"cannot read {path}: it holds no JSON object")
    return values


def parse_hf_config(values: Mapping[str, Any]) -> ModelConfig:
    """Translate a `config.json` (old or new style); raises ConfigError naming the field that is not supported."""
    family = family_of(values)
    values = shape_values(values, family)
    quantization = values.get("quantization_config")
    if quantization and not (isinstance(quantization, dict) and quantization.get("quant_method") in METHODS):
        raise ConfigError(f"field quantization_config: {_quantized(quantization)}")
    num_heads = read_int(values, "num_attention_heads")
    vocab_size = read_int(values, "vocab_size")
    hidden_size = read_int(values, "hidden_size")
    fields = family_fields(values, family)
    if values.get("head_dim") is None and hidden_size % num_heads:
        raise ConfigError(f"hidden_size {hidden_size} is no multiple of {num_heads} attention heads")
    positions = read_int(values, "max_position_embeddings")
    rope = read_rope(values)
    bos = read_tokens(values, "bos_token_id", vocab_size)
    if len(bos) > 1:
        raise ConfigError(f"field bos_token_id: expected one token, not {show(values['bos_token_id'])}")
    config = ModelConfig(
        family=family.name,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=read_int(values, "intermediate_size"),
        num_layers=read_int(values, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=read_int(values, "num_key_value_heads", num_heads),
        head_dim=read_int(values, "head_dim", hidden_size // num_heads),
        max_position_embeddings=rope.num_positions(positions),
        rms_norm_eps=read_float(values, "rms_norm_eps", 1e-6),
        tie_embeddings=read_flag(values, "tie_word_embeddings"),
        dtype=_dtype(values),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=read_tokens(values, "eos_token_id", vocab_size),
        **rope.fields,
        **fields,
    )
    check_config(config)
    return replace(config, formats=_formats(config, quantization)) if quantization else config


def _formats(config: ModelConfig, quantization: Mapping[str, Any]) -> Formats:
    """Return the blocks that a quantized checkpoint's matrices are kept in."""
    try:
        scheme = scheme_of(quantization)
    except ConfigError as error:
        raise ConfigError(f"field quantization_config: {error.message}") from None
    if scheme.layout == "mxfp4" and (config.experts is None or config.experts.style != "gpt_oss"):
        raise ConfigError("field quantization_config: mxfp4 is served of gpt-oss, whose experts are one tensor, only")
    return formats_of(config, scheme)


def check_config(config: ModelConfig) -> None:
    """Check a shape, wherever it was read: each number for itself, and that they fit each other. Raises ConfigError."""
    if config.family not in FAMILIES:
        raise ConfigError(f"field family: {show(config.family)} is none of {', '.join(FAMILIES)}")
    if config.dtype not in DTYPES:
        raise ConfigError(f"field dtype: {show(config.dtype)} is not supported, only {', '.join(DTYPES)}")
    for field in NUMBERS:
        check_range(field, getattr(config, field))
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(f"{config.num_heads} attention heads are no multiple of {config.num_kv_heads} KV heads")
    if config.head_dim % 2:
        raise ConfigError(f"head_dim {config.head_dim} is odd: it cannot be rotated")
    if not 0 < config.partial_rotary_factor <= 1 or config.rotary_dim % 2 or not config.rotary_dim:
        share = show(config.partial_rotary_factor)
        raise ConfigError(f"field partial_rotary_factor: {share} of head_dim {config.head_dim} cannot be rotated")
    for field in SCALES:
        if (value := getattr(config, field)) is not None:
            check_range(field, value)
    if config.activation not in ACTIVATIONS:
        raise ConfigError(f"field activation: {show(config.activation)} is none of {', '.join(ACTIVATIONS)}")
    if (experts := config.experts) is not None:
        for field in EXPERT_NUMBERS:
            check_range(field, getattr(experts, field))
        check_range("shared_size", experts.shared_size, may_be_0=True)
        if experts.style not in EXPERT_NAMES:
            raise ConfigError(f"field style: {show(experts.style)} is none of {', '.join(EXPERT_NAMES)}")
    if config.bos_token_id is not None:
        check_tokens("bos_token_id", (config.bos_token_id,), config.vocab_size)
    check_tokens("eos_token_ids", config.eos_token_ids, config.vocab_size)
    if config.rope_scaling is not None:
        check_rope(config.rope_scaling, config.rotary_dim)


PLAIN_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the `config.json` that `parse_hf_config` reads back as the same value (old rope style: every reader's).

    Only of families without variants, which is what models are converted to: ConfigError for others.
    """
    if config.family not in PLAIN_FAMILIES:
        raise ConfigError(f"a config.json is written for {', '.join(PLAIN_FAMILIES)} only, not for {config.family}")
    architecture = FAMILIES[config.family].architectures[0]
    scaling = config.rope_scaling
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling and _scaling_values(scaling),
        "sliding_window": None,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.dtype,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
    }


def _scaling_values(scaling: RopeScaling) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return values
    if scaling.kind != "llama3":
        raise ConfigError(f"a config.json is written for rope scaling linear and llama3 only, not for {scaling.kind}")
    return values | {
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


# What names of quantized models commonly end in, by their method.
QUANTIZED_NAMES = {
    "fbgemm_fp8": "-FP8",
    "bitsandbytes": "-bnb-4bit",
    "modelopt": "-FP8, -FP4 or -NVFP4",
    "modelopt_fp4": "-FP4 or -NVFP4",
}


def _quantized(quantization: object) -> str:
    """Return why quantized weights are refused, by their method, and what to serve instead."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if not isinstance(method, str) or not method.strip():
        return "quantized weights are not supported; serve the unquantized model"
    ending = QUANTIZED_NAMES.get(method.lower())
    example = f" (often the same name without {ending})" if ending else ""
    shown = method if ending else show(method)
    return f"weights quantized with {shown} are not supported; serve the unquantized model{example}"


def _dtype(values: Mapping[str, Any]) -> str:
    name = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"field dtype: {show(name)} is not supported, only {', '.join(DTYPES)}")
    return name
