"""Model files, step 2: the families of models, each a small description of how its `config.json` becomes a decoder.

A family says which fields it reads (a leftover of another family must change nothing), what transformers takes for
those that are absent, and what its models have without saying so. What is not said here is as in Llama.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kunserve.errors import ConfigError
from kunserve.model.config import SWIGLU_ALPHA, Experts
from kunserve.model.config_fields import read_flag, read_float, read_int, read_ints, read_names, show

Values = Mapping[str, Any]
Reader = Callable[[Values], dict[str, Any]]  # fields of a config.json -> fields of ModelConfig

HIDDEN_ACTS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True)
class Family:
    """One family: `name` is transformers' model_type, `readers` read what not all families have."""

    name: str
    architectures: tuple[str, ...]
    always: Values = field(default_factory=dict)  # fields of ModelConfig
    defaults: Values = field(default_factory=dict)  # fields of config.json, where they are absent
    needs: tuple[str, ...] = ()  # fields of config.json that have another default in each family: do not guess
    readers: tuple[Reader, ...] = ()
    act_field: str = "hidden_act"


def attention_bias(values: Values) -> dict[str, Any]:
    """Read whether all four projections of attention have biases."""
    has_bias = read_flag(values, "attention_bias")
    return {"qkv_bias": has_bias, "o_bias": has_bias}


def qkv_bias(values: Values) -> dict[str, Any]:
    """Read whether the projections that go into attention have biases."""
    return {"qkv_bias": read_flag(values, "qkv_bias")}


def mlp_bias(values: Values) -> dict[str, Any]:
    """Read whether the matrices of the MLP have biases."""
    return {"mlp_bias": read_flag(values, "mlp_bias")}


def window_everywhere(values: Values) -> dict[str, Any]:
    """Read the window that every layer has."""
    if values.get("sliding_window") is None:
        return {}
    window, layers = read_int(values, "sliding_window"), read_int(values, "num_hidden_layers")
    return {"window": window, "windowed_layers": tuple(range(layers))}


def window_if_used(values: Values) -> dict[str, Any]:
    """Read Qwen's window, which all layers have from `max_window_layers` on, or those that `layer_types` names."""
    if not read_flag(values, "use_sliding_window") or values.get("sliding_window") is None:
        return {}
    first = read_int(values, "max_window_layers", 28, may_be_0=True)  # transformers' default
    return _window(values, lambda layer: layer >= first)


def window_of_all_if_used(values: Values) -> dict[str, Any]:
    """Read the window that every layer has if the model says that it uses one."""
    return window_everywhere(values) if read_flag(values, "use_sliding_window") else {}


def window_of_layer_types(values: Values) -> dict[str, Any]:
    """Read the window of the layers that `layer_types` names; where it is absent, of all but every n-th layer."""
    if values.get("sliding_window") is None:
        return {}
    every = read_int(values, "sliding_window_pattern", 2)
    return _window(values, lambda layer: (layer + 1) % every != 0)


def window_of_early_layers(values: Values) -> dict[str, Any]:
    """Read Qwen2-MoE's window, which every second of the first layers has, or those that `layer_types` names."""
    if not read_flag(values, "use_sliding_window") or values.get("sliding_window") is None:
        return {}
    end = read_int(values, "max_window_layers", 28, may_be_0=True)  # transformers' default
    return _window(values, lambda layer: layer < end and layer % 2 == 0)


def _window(values: Values, is_windowed: Callable[[int], bool]) -> dict[str, Any]:
    window, num_layers = read_int(values, "sliding_window"), read_int(values, "num_hidden_layers")
    if types := read_names(values, "layer_types"):
        if len(types) != num_layers or not set(types) <= {"sliding_attention", "full_attention"}:
            raise ConfigError(f"field layer_types: {show(types)} is not supported for {num_layers} layers")
        layers = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    else:
        layers = tuple(filter(is_windowed, range(num_layers)))
    return {"window": window, "windowed_layers": layers} if layers else {}


def gemma_scales(values: Values) -> dict[str, Any]:
    """Read Gemma's scale of scores and its soft caps; its embeddings grow with their width."""
    if values.get("use_bidirectional_attention"):
        raise ConfigError("field use_bidirectional_attention: true is not supported")
    caps = {"attn_logit_softcapping": "attention_softcap", "final_logit_softcapping": "logit_softcap"}
    return {
        "embed_scale": float(read_int(values, "hidden_size") ** 0.5),
        "attention_scale": read_float(values, "query_pre_attn_scalar") ** -0.5,
        **{ours: read_float(values, theirs) for theirs, ours in caps.items() if values.get(theirs) is not None},
    }


def granite_scales(values: Values) -> dict[str, Any]:
    """Read the four scales of Granite."""
    return {
        "embed_scale": read_float(values, "embedding_multiplier", 1.0),
        "residual_scale": read_float(values, "residual_multiplier", 1.0),
        "attention_scale": read_float(values, "attention_multiplier", 1.0),
        "logit_divisor": read_float(values, "logits_scaling", 1.0),
    }


def nope_layers(values: Values) -> dict[str, Any]:
    """Read which layers do not rotate: 0 in a list, or every n-th."""
    num_layers = read_int(values, "num_hidden_layers")
    rotates = read_ints(values, "no_rope_layers")
    if not rotates:
        every = read_int(values, "no_rope_layer_interval", 4)
        rotates = tuple(int((layer + 1) % every != 0) for layer in range(num_layers))
    if len(rotates) != num_layers:
        raise ConfigError(f"field no_rope_layers: it names {len(rotates)} of {num_layers} layers")
    return {"nope_layers": tuple(layer for layer, flag in enumerate(rotates) if not flag)}


def no_clipping(values: Values) -> dict[str, Any]:
    """Refuse models that clip q, k and v."""
    if values.get("clip_qkv") is not None:
        raise ConfigError(f"field clip_qkv: {show(values['clip_qkv'])} is not supported, only null")
    return {}


def mixtral_experts(values: Values) -> dict[str, Any]:
    """Read the experts of Mixtral."""
    size = read_int(values, "intermediate_size")
    return _experts(values, size, normalize=True, style="mixtral")


def olmoe_experts(values: Values) -> dict[str, Any]:
    """Read the experts of OLMoE."""
    size = read_int(values, "intermediate_size")
    return _experts(values, size, normalize=read_flag(values, "norm_topk_prob"), style="qwen")


def qwen_experts(values: Values) -> dict[str, Any]:
    """Read the experts of Qwen3-MoE, and which layers have none."""
    size, num_layers = read_int(values, "moe_intermediate_size"), read_int(values, "num_hidden_layers")
    step, without = read_int(values, "decoder_sparse_step", 1), read_ints(values, "mlp_only_layers")
    dense = tuple(layer for layer in range(num_layers) if layer in without or (layer + 1) % step)
    found = _experts(values, size, normalize=read_flag(values, "norm_topk_prob"), style="qwen")
    return found | {"dense_layers": dense}


def qwen2_experts(values: Values) -> dict[str, Any]:
    """Read the experts of Qwen2-MoE, beside which all tokens share one that has a gate."""
    found = qwen_experts(values)
    shared = read_int(values, "shared_expert_intermediate_size")
    return found | {"experts": replace(found["experts"], shared_size=shared, has_shared_gate=True)}


def deepseek_experts(values: Values) -> dict[str, Any]:
    """Read the experts of the first DeepSeek, beside which all tokens share some, which are one MLP."""
    scoring, scale = values.get("scoring_func") or "softmax", read_float(values, "routed_scaling_factor", 1.0)
    if scoring != "softmax" or scale != 1:
        raise ConfigError(f"field scoring_func: {show(scoring)} times {scale} is not supported, only softmax times 1")
    size, num_layers = read_int(values, "moe_intermediate_size"), read_int(values, "num_hidden_layers")
    first, step = read_int(values, "first_k_dense_replace", 0, may_be_0=True), read_int(values, "moe_layer_freq", 1)
    return _experts(
        values,
        size,
        normalize=read_flag(values, "norm_topk_prob"),
        style="deepseek",
        shared_size=size * read_int(values, "n_shared_experts", 0, may_be_0=True),
    ) | {"dense_layers": tuple(layer for layer in range(num_layers) if layer < first or layer % step)}


def gpt_oss_experts(values: Values) -> dict[str, Any]:
    """Read the experts of gpt-oss; their activation has a gain and bounds."""
    alpha = read_float(values, "swiglu_alpha", SWIGLU_ALPHA)
    if alpha != SWIGLU_ALPHA:
        raise ConfigError(f"field swiglu_alpha: {alpha} is not supported, only {SWIGLU_ALPHA}")
    size = read_int(values, "intermediate_size")
    found = _experts(values, size, normalize=True, style="gpt_oss", has_bias=True)
    return found | {"activation": "clamped_swiglu", "swiglu_limit": read_float(values, "swiglu_limit", 7.0)}


def _experts(values: Values, size: int, **more: Any) -> dict[str, Any]:
    names = ("num_local_experts", "n_routed_experts")
    count = next((name for name in names if values.get(name) is not None), "num_experts")
    num, chosen = read_int(values, count), read_int(values, "num_experts_per_tok")
    if chosen > num:
        raise ConfigError(f"field num_experts_per_tok: {chosen} is more than the {num} experts")
    return {"experts": Experts(num, chosen, size, **more)}


GEMMA = {"norm_offset": 1.0, "post_norms": True}
GEMMA_DEFAULTS = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "num_attention_heads": 8,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA2_DEFAULTS = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "max_position_embeddings": 8192}
GEMMA3_DEFAULTS = {
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "max_position_embeddings": 131072,
    "vocab_size": 262208,
}
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
BIASES = (attention_bias, mlp_bias)
KV_HEADS = ("num_key_value_heads",)
EPS = {"rms_norm_eps": 1e-5}  # of families whose default in transformers is not 1e-6

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", ("LlamaForCausalLM",), readers=BIASES),
        Family(
            *("mistral", ("MistralForCausalLM",)),
            defaults={"sliding_window": 4096},
            needs=KV_HEADS,
            readers=(window_everywhere,),
        ),
        Family("qwen2", ("Qwen2ForCausalLM",), {"qkv_bias": True}, needs=KV_HEADS, readers=(window_if_used,)),
        Family(
            *("qwen3", ("Qwen3ForCausalLM",), {"qk_norm": True}),
            needs=(*KV_HEADS, "head_dim"),
            readers=(attention_bias, window_if_used),
        ),
        Family(
            *("qwen3_moe", ("Qwen3MoeForCausalLM",), {"qk_norm": True}),
            needs=KV_HEADS,
            readers=(attention_bias, window_of_all_if_used, qwen_experts),
        ),
        Family(
            *("qwen2_moe", ("Qwen2MoeForCausalLM",)),
            defaults={"qkv_bias": True},
            needs=KV_HEADS,
            readers=(qkv_bias, window_of_early_layers, qwen2_experts),
        ),
        Family("deepseek", ("DeepseekForCausalLM",), readers=(attention_bias, deepseek_experts)),
        Family(
            *("mixtral", ("MixtralForCausalLM",)),
            defaults={"rope_theta": 1e6, **EPS},
            needs=KV_HEADS,
            readers=(window_everywhere, mixtral_experts),
        ),
        Family(
            *("gemma2", ("Gemma2ForCausalLM",), GEMMA, GEMMA_DEFAULTS | GEMMA2_DEFAULTS),
            readers=(attention_bias, gemma_scales, window_of_layer_types),
            act_field="hidden_activation",
        ),
        Family(
            "gemma3_text",
            ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
            GEMMA | {"qk_norm": True},
            GEMMA_DEFAULTS | GEMMA3_DEFAULTS,
            readers=(attention_bias, gemma_scales, window_of_layer_types),
            act_field="hidden_activation",
        ),
        Family("phi3", ("Phi3ForCausalLM",), {"has_fused_tensors": True}, EPS, readers=(window_everywhere,)),
        Family(
            *("olmo2", ("Olmo2ForCausalLM",)),
            always={"qk_norm": True, "qk_norm_whole": True, "pre_norms": False, "post_norms": True},
            defaults=EPS,
            readers=(attention_bias,),
        ),
        Family(
            *("olmoe", ("OlmoeForCausalLM",), {"qk_norm": True, "qk_norm_whole": True}, EPS),
            readers=(attention_bias, no_clipping, olmoe_experts),
        ),
        Family("granite", ("GraniteForCausalLM",), readers=(*BIASES, granite_scales)),
        Family(
            *("smollm3", ("SmolLM3ForCausalLM",)),
            defaults={"rope_theta": 2e6, "tie_word_embeddings": True},
            needs=KV_HEADS,
            readers=(*BIASES, nope_layers, window_if_used),
        ),
        Family(
            *("gpt_oss", ("GptOssForCausalLM",), {"has_sinks": True}),
            defaults={
                "attention_bias": True,
                "head_dim": 64,
                "num_key_value_heads": 8,
                "sliding_window": 128,
                "rope_theta": 150000.0,
                "rope_parameters": GPT_OSS_ROPE,
                **EPS,
            },
            readers=(attention_bias, window_of_layer_types, gpt_oss_experts),
        ),
    )
}
ARCHITECTURES = {name: family for family in FAMILIES.values() for name in family.architectures}

REFUSED = {
    "DeepseekV2ForCausalLM": "multi-head latent attention (MLA)",
    "DeepseekV3ForCausalLM": "multi-head latent attention (MLA)",
    "Qwen3NextForCausalLM": "linear attention",
    "Gemma3nForConditionalGeneration": "per-layer embeddings",
    "Llama4ForConditionalGeneration": "chunked attention",
}


def family_of(values: Values) -> Family:
    """Return the family of a `config.json`. Raises ConfigError for one that is not supported, with the reason."""
    names = read_names(values, "architectures")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
        if name in REFUSED:
            raise ConfigError(f"architectures {show(names)} is not supported: it has {REFUSED[name]}")
    raise ConfigError(f"architectures {show(names)} is not supported; families are: {', '.join(FAMILIES)}")


def shape_values(values: Values, family: Family) -> dict[str, Any]:
    """Return the fields of a `config.json` with the family's defaults; of one that also sees, those of its text."""
    text = values.get("text_config")
    if isinstance(text, dict):
        values = {key: value for key, value in values.items() if key != "text_config"} | text
    return {**family.defaults, **values}


def family_fields(values: Values, family: Family) -> dict[str, Any]:
    """Return the fields of ModelConfig that this family sets. Raises ConfigError naming the field that is not right."""
    for name in family.needs:
        if values.get(name) is None:
            raise ConfigError(f"field {name} is missing")
    act = values.get(family.act_field) or "silu"
    if not isinstance(act, str) or act not in HIDDEN_ACTS:
        raise ConfigError(f"field {family.act_field}: {show(act)} is not supported, only {', '.join(HIDDEN_ACTS)}")
    fields: dict[str, Any] = {"activation": HIDDEN_ACTS[act]}
    for reader in family.readers:
        fields |= reader(values)
    return {**fields, **family.always}
