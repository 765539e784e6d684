"""Model files, step 2: `config.json` of a Hugging Face folder -> `ModelConfig`, refusing what we would run wrongly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kunserve.errors import ConfigError
from kunserve.model.config import Llama3RopeScaling, ModelConfig

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
DTYPES = ("float32", "float16", "bfloat16", "float64")


def load_hf_config(folder: Path) -> ModelConfig:
    """Read `config.json`, and the end tokens of `generation_config.json`, which chat models keep there.

    Raises ConfigError when a file is missing or malformed, or the model is not one we run.
    """
    values = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.exists() and (ends := read_json(generation).get("eos_token_id")) is not None:
        values["eos_token_id"] = ends
    try:
        return parse_hf_config(values)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error.message}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object; raises ConfigError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read {path}: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"cannot read {path}: it holds no JSON object")
    return values


def parse_hf_config(values: Mapping[str, Any]) -> ModelConfig:
    """Translate a `config.json` (old or new style); raises ConfigError naming the field that is not supported.

    Sliding windows are not run, but within one window they change nothing: `max_position_embeddings` is cut to it.
    """
    family = _family(values)
    _refuse_unsupported(values, family)
    num_heads = _int(values, "num_attention_heads")
    hidden_size = _int(values, "hidden_size")
    if "num_key_value_heads" not in values and family != "llama":
        raise ConfigError("field num_key_value_heads is missing")  # each family has another default: do not guess
    max_positions = _int(values, "max_position_embeddings")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    eos = values.get("eos_token_id")
    config = ModelConfig(
        family=family,
        vocab_size=_int(values, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_int(values, "intermediate_size"),
        num_layers=_int(values, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_int(values, "num_key_value_heads", num_heads),
        head_dim=_int(values, "head_dim", None if family == "qwen3" else hidden_size // num_heads),
        max_position_embeddings=min(max_positions, _sliding_window(values, family) or max_positions),
        rms_norm_eps=_float(values, "rms_norm_eps", 1e-6),
        rope_theta=_float(rope, "rope_theta", _float(values, "rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(rope, max_positions),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        dtype=_dtype(values),
        bos_token_id=values.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )
    check_config(config)
    return config


def cutting_window(folder: Path) -> tuple[int, int] | None:
    """Return the tokens of a model's sliding window and its positions, if the window is what bounds its requests."""
    values = read_json(folder / "config.json")
    window, positions = _sliding_window(values, _family(values)), _int(values, "max_position_embeddings")
    return (window, positions) if window is not None and window < positions else None


def check_config(config: ModelConfig) -> None:
    """Check that sizes fit each other; raises ConfigError."""
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(f"{config.num_heads} attention heads are no multiple of {config.num_kv_heads} KV heads")
    if config.head_dim % 2:
        raise ConfigError(f"head_dim {config.head_dim} is odd: it cannot be rotated")
    ids = [*config.eos_token_ids, *([] if config.bos_token_id is None else [config.bos_token_id])]
    if not all(isinstance(i, int) and 0 <= i < config.vocab_size for i in ids):
        raise ConfigError(f"bos_token_id or eos_token_id is not a token: {ids} of {config.vocab_size}")


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the `config.json` that `parse_hf_config` reads back as the same value (old rope style: every reader's)."""
    architecture = next(name for name, family in ARCHITECTURES.items() if family == config.family)
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
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        },
        "sliding_window": None,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.dtype,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
    }


def _family(values: Mapping[str, Any]) -> str:
    names = values.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise ConfigError(f"architectures {names} is not supported; these are: {', '.join(ARCHITECTURES)}")


def _refuse_unsupported(values: Mapping[str, Any], family: str) -> None:
    """Raise ConfigError for the first field that changes the result and that we do not compute."""
    if quantization := values.get("quantization_config"):
        raise ConfigError(f"field quantization_config: {_quantized(quantization)}")
    if (act := values.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"field hidden_act: {act!r} is not supported, only 'silu'")
    # transformers reads attention_bias for Llama and Qwen3 only; elsewhere a leftover has no effect.
    for field in ("attention_bias", "mlp_bias") if family in ("llama", "qwen3") else ():
        if values.get(field):
            raise ConfigError(f"field {field}: true is not supported for {family}")
    for style in ("rope_parameters", "rope_scaling"):
        rope = values.get(style) or {}
        if not isinstance(rope, dict):
            raise ConfigError(f"field {style}: expected an object")
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ("default", "llama3"):
            raise ConfigError(f"field {style}: rope_type {kind!r} is not supported, only 'default' and 'llama3'")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(f"field {style}: partial_rotary_factor is not supported")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("field partial_rotary_factor is not supported")


# What names of quantized models commonly end in, by their method.
QUANTIZED_NAMES = {
    "awq": "-AWQ",
    "gptq": "-GPTQ-Int4",
    "fp8": "-FP8",
    "fbgemm_fp8": "-FP8",
    "compressed-tensors": "-FP8 or -w4a16",
    "bitsandbytes": "-bnb-4bit",
}


def _quantized(quantization: object) -> str:
    """Return why quantized weights are refused, by their method, and what to serve instead."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if not isinstance(method, str):
        return "quantized weights are not supported; serve the unquantized model"
    ending = QUANTIZED_NAMES.get(method.lower())
    example = f" (often the same name without {ending})" if ending else ""
    return f"weights quantized with {method} are not supported; serve the unquantized model{example}"


def _sliding_window(values: Mapping[str, Any], family: str) -> int | None:
    """Tokens of the sliding window, or None where no layer uses one."""
    if family == "mistral":
        # transformers' default when the field is absent is 4096; null means none.
        return None if values.get("sliding_window", 4096) is None else _int(values, "sliding_window", 4096)
    if not values.get("use_sliding_window") or values.get("sliding_window") is None:
        return None
    if values.get("max_window_layers", 0) >= _int(values, "num_hidden_layers"):
        return None  # only layers from max_window_layers on slide
    return _int(values, "sliding_window")


def _rope_scaling(rope: Mapping[str, Any], max_positions: int) -> Llama3RopeScaling | None:
    if (rope.get("rope_type") or rope.get("type")) != "llama3":
        return None
    return Llama3RopeScaling(
        factor=_float(rope, "factor"),
        low_freq_factor=_float(rope, "low_freq_factor"),
        high_freq_factor=_float(rope, "high_freq_factor"),
        original_max_position_embeddings=_int(rope, "original_max_position_embeddings", max_positions),
    )


def _dtype(values: Mapping[str, Any]) -> str:
    name = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"field dtype: {name!r} is not supported, only {', '.join(DTYPES)}")
    return name


def _int(values: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = values.get(field)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"field {field} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"field {field}: expected a positive integer, not {value!r}")
    return value


def _float(values: Mapping[str, Any], field: str, default: float | None = None) -> float:
    value = values.get(field)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"field {field} is missing")
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"field {field}: expected a positive number, not {value!r}")
    return float(value)
