import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import PLAIN, make_tiny_model

from kunserve.errors import ConfigError
from kunserve.model.config import RopeScaling
from kunserve.model.hf_config import check_config, load_hf_config, parse_hf_config, to_hf_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 64}
MIXTRAL = LLAMA | {"architectures": ["MixtralForCausalLM"]}
DEEPSEEK = (
    LLAMA
    | {"architectures": ["DeepseekForCausalLM"], "n_routed_experts": 8, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 24}
)
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": None}


@pytest.mark.parametrize("family", PLAIN)
def test_what_transformers_writes_is_read(family: str, tmp_path: Path) -> None:
    config = load_hf_config(make_tiny_model(family, tmp_path))

    assert config.family == {"llama3": "llama", "qwen3-tied": "qwen3"}.get(family, family)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers) == (320, 64, 96, 3)
    assert (config.num_heads, config.num_kv_heads) == (4, 2)
    assert config.head_dim == (32 if family == "qwen3" else 16)
    assert config.max_position_embeddings == 512
    assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 10000.0)
    assert config.qkv_bias == (family == "qwen2")
    assert config.qk_norm == family.startswith("qwen3")
    assert config.tie_embeddings == (family in ("llama3", "qwen3-tied"))
    assert config.rope_scaling == (RopeScaling(8.0, 1.0, 4.0, 64) if family == "llama3" else None)
    assert (config.dtype, config.bos_token_id, config.eos_token_ids) == ("float32", 0, (2,))


@pytest.mark.parametrize("family", PLAIN)
def test_what_we_write_is_read_by_us_and_by_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = replace(load_hf_config(make_tiny_model(family, tmp_path / "model")), dtype="bfloat16")
    written = to_hf_config(config)
    assert parse_hf_config(written) == config

    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = AutoConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(theirs.to_dict(), default=str))
    assert load_hf_config(tmp_path) == config


def test_old_style_fields() -> None:
    old = LLAMA | {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "type": "llama3",
            "factor": 32,
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": 8192,
        },
        "torch_dtype": "torch.bfloat16",
        "eos_token_id": [5, 6],
    }
    config = parse_hf_config(old)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert (config.dtype, config.eos_token_ids, config.head_dim) == ("bfloat16", (5, 6), 16)
    assert parse_hf_config({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}).num_kv_heads == 4


def test_end_tokens_of_generation_config_win(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 1}))
    assert load_hf_config(tmp_path).eos_token_ids == (1,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert load_hf_config(tmp_path).eos_token_ids == (1, 7)


ALL = (0, 1, 2)


@pytest.mark.parametrize(
    ("values", "window", "layers"),
    [
        (MISTRAL, None, ()),
        (MISTRAL | {"sliding_window": 100}, 100, ALL),
        (QWEN2 | {"sliding_window": 100, "use_sliding_window": False}, None, ()),
        (QWEN2 | {"sliding_window": 100, "use_sliding_window": True}, None, ()),  # from layer 28 on
        (QWEN2 | {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 0}, 100, ALL),
        (QWEN2 | {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 3}, None, ()),
        (QWEN2 | {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 2}, 100, (2,)),
        (
            QWEN2
            | {"sliding_window": 100, "use_sliding_window": True}
            | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
            100,
            (0, 2),
        ),
    ],
)
def test_which_layers_have_a_window(values: dict[str, Any], window: int | None, layers: tuple[int, ...]) -> None:
    config = parse_hf_config(values)
    assert (config.window, config.windowed_layers, config.max_position_embeddings) == (window, layers, 512)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq", "bits": 3}, "weights of 3 bits are not served, only of 4"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "version 'gemv' is not served"),
        ({"quant_method": "gptq", "bits": 2}, "weights of 2 bits are not served, only of 4 or 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size: expected a number of columns"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "x\n"}, r"group_size: expected .* not 'x\\n'"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "checkpoint_format 'marlin' is not served",
        ),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2' is not served"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "weight_block_size .* is not served"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "'nvfp4-pack-quantized' are not served",
        ),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "with one group of layers"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "int-quantized",
                "config_groups": {"W8A8": ["Linear"]},
            },
            "with one group of layers",
        ),
        ({"quant_method": "awq", "bits": 4.0, "group_size": 128}, "weights of 4.0 bits are not served"),
        ({"quant_method": "fp8", "modules_to_not_convert": 5}, "modules_to_not_convert: expected a list of names"),
        ({"quant_method": "mxfp4"}, "mxfp4 is served of gpt-oss, whose experts are one tensor, only"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantized with modelopt .* without .*-NVFP4"),
        ({"quant_method": "other"}, "quantized with 'other' are not supported; serve the unquantized model$"),
        ({"quant_method": ""}, "quantized weights are not supported; serve the unquantized model$"),
        ({"bits": 4}, "quantized weights are not supported; serve the unquantized model$"),
        ("int8", "quantized weights are not supported"),
    ],
)
def test_quantized_weights_are_refused_by_their_method(quantization: object, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"quantization_config: .*{message}"):
        parse_hf_config(LLAMA | {"quantization_config": quantization})


def test_a_scaling_that_is_added_in_the_old_style_goes_before_what_the_file_had() -> None:
    """As in transformers: model cards tell people to add `rope_scaling` for long texts."""
    new = {"rope_type": "default", "rope_theta": 1e6}
    added = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    config = parse_hf_config(LLAMA | {"rope_parameters": new, "rope_scaling": added})
    assert config.rope_scaling is not None and config.rope_scaling.factor == 4.0
    assert (config.rope_theta, config.max_position_embeddings) == (1e6, 2048)
    assert parse_hf_config(LLAMA | {"rope_parameters": new}).rope_scaling is None


def test_gpt_oss_reads_its_scaling_in_the_old_style_too() -> None:
    values = LLAMA | {"architectures": ["GptOssForCausalLM"], "head_dim": 16, "num_local_experts": 4}
    values |= {"num_experts_per_tok": 2, "max_position_embeddings": 2048}
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}
    own, default = parse_hf_config(values | {"rope_scaling": scaling}), parse_hf_config(values)
    assert own.rope_scaling is not None and default.rope_scaling is not None
    assert (own.rope_scaling.factor, default.rope_scaling.factor) == (2.0, 32.0)
    assert own.rope_theta == default.rope_theta == 150000.0


@pytest.mark.parametrize(("family", "eps"), [("Llama", 1e-6), ("Mixtral", 1e-5), ("Phi3", 1e-5), ("Olmo2", 1e-5)])
def test_an_absent_epsilon_is_transformers_default(family: str, eps: float) -> None:
    values = LLAMA | {"architectures": [f"{family}ForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
    assert parse_hf_config(values | {"pad_token_id": 0}).rms_norm_eps == eps


def test_mistral_slides_when_it_says_nothing() -> None:
    values = {k: v for k, v in MISTRAL.items() if k != "sliding_window"} | {"max_position_embeddings": 9999}
    assert (parse_hf_config(values).window, parse_hf_config(values).max_position_embeddings) == (4096, 9999)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        (LLAMA | {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        (LLAMA | {"architectures": None}, "architectures"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA | {"quantization_config": {"quant_method": "fp4"}}, "quantization_config"),
        (DEEPSEEK | {"scoring_func": "sigmoid"}, "scoring_func: 'sigmoid' times 1.0 is not supported"),
        (DEEPSEEK | {"routed_scaling_factor": 2.5}, "scoring_func: 'softmax' times 2.5 is not supported"),
        (DEEPSEEK | {"n_shared_experts": 10**8}, "n_shared_experts"),
        (LLAMA | {"architectures": ["DeepseekV2ForCausalLM"]}, r"multi-head latent attention \(MLA\)"),
        (LLAMA | {"rope_parameters": {"rope_type": "proportional"}}, "rope_parameters: rope_type 'proportional'"),
        (LLAMA | {"rope_parameters": {"rope_type": "linear"}}, "factor"),
        (LLAMA | {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.05}}, "partial_rotary_factor"),
        (LLAMA | {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        (
            LLAMA | {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor",
        ),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters: layers"),
        (QWEN2 | WINDOW | {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
        (LLAMA | {"rope_scaling": "llama3"}, "rope_scaling"),
        (LLAMA | {"torch_dtype": "float8_e4m3fn"}, "dtype"),
        (LLAMA | {"hidden_size": None}, "hidden_size"),
        (LLAMA | {"hidden_size": "64"}, "hidden_size"),
        (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers"),
        (LLAMA | {"num_key_value_heads": 3}, "KV heads"),
        (LLAMA | {"head_dim": 15}, "head_dim"),
        (LLAMA | {"rms_norm_eps": -1}, "rms_norm_eps"),
        (LLAMA | {"eos_token_id": 320}, "eos_token_id"),
        (LLAMA | {"eos_token_id": "</s>"}, "eos_token_id"),
        ({k: v for k, v in QWEN2.items() if k != "num_key_value_heads"}, "num_key_value_heads"),
        ({k: v for k, v in QWEN3.items() if k != "head_dim"}, "head_dim"),
    ],
)
def test_what_would_run_wrongly_is_refused_by_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        parse_hf_config(values)
    assert "\n" not in caught.value.message


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [0, -1, True, 3.0, "3", [3], {}, float("nan"), float("inf"), 10**9, 10**400])
def test_a_size_is_a_positive_integer_of_a_known_order(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^field {field}: expected ") as caught:
        parse_hf_config(LLAMA | {field: value})
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1.0, True, "3", [3], {}, float("nan"), float("inf"), 1e300, 10**400])
def test_a_number_is_positive_finite_and_of_a_known_order(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^field {field}: expected ") as caught:
        parse_hf_config(LLAMA | {field: value})
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("field", ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
@pytest.mark.parametrize("value", [0, True, "3", float("nan"), float("inf"), 10**400])
def test_numbers_of_rope_scaling_are_as_strict(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^field {field}: expected "):
        parse_hf_config(LLAMA | {"rope_scaling": LLAMA3 | {field: value}})


@pytest.mark.parametrize("field", ["tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", ["false", "true", 1, [], 0.0])
def test_a_flag_is_true_or_false(field: str, value: object) -> None:
    values = LLAMA if field.endswith("bias") else QWEN2
    parse_hf_config(values | {field: None})
    with pytest.raises(ConfigError, match=f"^field {field}: expected true or false, not "):
        parse_hf_config(values | {field: value})


@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [True, 1.0, "1", {}, [[1]], [None], [1, True], -1, 320, [1, 320], 10**400])
def test_a_token_is_one_of_the_vocabulary(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^field {field}: .* is none of the 320 tokens"):
        parse_hf_config(LLAMA | {field: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (LLAMA | {"architectures": "LlamaForCausalLM"}, "architectures: expected a list of names, not 'Llama"),
        (LLAMA | {"architectures": 5}, "architectures: expected a list of names, not 5"),
        (LLAMA | {"architectures": [["x"]]}, "architectures: expected a list of names"),
        (LLAMA | {"architectures": [{}]}, "architectures: expected a list of names"),
        (LLAMA | {"architectures": ["x\ny"]}, r"architectures \['x\\ny'\] is not supported"),
        (LLAMA | {"rope_theta": 1.0}, "rope_theta: expected a number above 1 and up to 1e.15, not 1.0"),
        (LLAMA | {"rope_scaling": YARN | {"rope_theta": 1}}, "rope_theta: expected a number above 1"),
        (LLAMA | {"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_fast: 0.5 is below beta_slow 1.0"),
        (LLAMA | {"rope_scaling": []}, "rope_scaling: expected an object"),
        (LLAMA | {"rope_scaling": {"type": ["llama3"]}}, "rope_scaling: rope_type .* is not supported"),
        (LLAMA | {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor: 1.0 is not below"),
        (LLAMA | {"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}}, "low_freq_factor: 1.0 is not below"),
        (LLAMA | {"hidden_act": ["silu"]}, r"hidden_act: \['silu'\] is not supported"),
        (MIXTRAL | {"num_local_experts": 10**8}, "num_local_experts"),
        (LLAMA | {"partial_rotary_factor": "1"}, "partial_rotary_factor: expected a number"),
        (LLAMA | {"hidden_size": 65}, "hidden_size 65 is no multiple of 4 attention heads"),
        (LLAMA | {"bos_token_id": [1, 2]}, "bos_token_id: expected one token"),
        (LLAMA | {"torch_dtype": {"a": "b\nc"}}, "dtype"),
        (LLAMA | {"quantization_config": {"quant_method": "a\nb"}}, r"quantized with 'a\\nb' are"),
        (QWEN2 | WINDOW | {"max_window_layers": "3"}, "max_window_layers: expected an integer"),
        (QWEN2 | WINDOW | {"max_window_layers": -1}, "max_window_layers: expected"),
        (QWEN2 | WINDOW | {"sliding_window": float("inf")}, "sliding_window: expected an integer"),
    ],
)
def test_fields_of_another_kind_are_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_hf_config(values)
    assert "\n" not in caught.value.message and len(caught.value.message) < 200


def test_end_tokens_are_named_with_their_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 999}))
    with pytest.raises(ConfigError, match=r"/config\.json: field eos_token_id: 999 is none"):
        load_hf_config(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, "x"]}))
    with pytest.raises(ConfigError, match=r"/generation_config\.json: field eos_token_id: 'x' is none"):
        load_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"num_layers": 10**9}, "num_layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_scaling": RopeScaling(8.0, 4.0, 4.0, 64)}, "low_freq_factor"),
        ({"rope_scaling": RopeScaling(8.0, 1.0, float("nan"), 64)}, "high_freq_factor"),
        ({"eos_token_ids": (-1,)}, "eos_token_ids"),
        ({"bos_token_id": 320}, "bos_token_id"),
        ({"family": "gpt2"}, "family"),
        ({"dtype": "float8"}, "dtype"),
    ],
)
def test_a_shape_from_elsewhere_is_checked_alike(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(replace(parse_hf_config(LLAMA), **change))


@pytest.mark.parametrize("content", [None, "{", "[]", "[" * 200_000, '{"a":' * 200_000, '{"a": ' + "1" * 5000 + "}"])
def test_an_unreadable_file_is_named(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"^cannot read .*config\.json: ") as caught:
        load_hf_config(tmp_path)
    assert len(caught.value.message) < 300
