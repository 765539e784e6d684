"""GGUF: the architectures that are served, each with what its metadata are called in the family's `config.json`.

A file says less than a checkpoint: what all models of an architecture have in common is known to who runs it. Facts
are llama.cpp's (conversion/*.py, src/models/*.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kunserve.errors import ConfigError
from kunserve.model.gguf.fields import OTHERWISE, Fields

Values = Mapping[str, Any]
Reader = Callable[[Fields, Values], dict[str, Any]]  # and what is known so far -> fields of a config.json


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture: `hf` is transformers' class, `readers` read what not all have."""

    hf: str
    readers: tuple[Reader, ...] = ()
    layer_names: Mapping[str, str] = field(default_factory=dict)  # where they differ: Hugging Face's -> GGUF's
    has_moved_rows: bool = False  # q and k: llama.cpp turns neighbours, where transformers turns halves of a head
    has_whole_norms: bool = False  # norm weights with the 1 that transformers adds to them


def _biases(fields: Fields, _: Values) -> dict[str, Any]:
    return {
        "attention_bias": fields.has("blk.0.attn_q.bias") or fields.has("blk.0.attn_qkv.bias"),
        "mlp_bias": fields.has("blk.0.ffn_gate.bias"),
    }


def _mistral_if(fields: Fields, _: Values) -> dict[str, Any]:
    """Read what makes a Mistral or a Mixtral of a Llama: a window, experts."""
    window = fields.number_if_any("attention.sliding_window")
    if fields.number_if_any("expert_count") is None:
        return {} if window is None else {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    return {
        "architectures": ["MixtralForCausalLM"],
        "sliding_window": window,
        "num_local_experts": fields.whole("expert_count"),
        "num_experts_per_tok": fields.whole("expert_used_count"),
    }


def _experts(fields: Fields, values: Values) -> dict[str, Any]:
    used = fields.whole("expert_used_count")
    return {
        "num_experts": fields.whole("expert_count"),
        "num_experts_per_tok": used,
        "moe_intermediate_size": fields.whole("expert_feed_forward_length", values["intermediate_size"] // used),
    }


def _qwen3_moe(*_: Any) -> dict[str, Any]:
    return {"norm_topk_prob": True}


def _qwen2_moe(fields: Fields, values: Values) -> dict[str, Any]:
    size = fields.whole("expert_shared_feed_forward_length", values["intermediate_size"])
    return {"shared_expert_intermediate_size": size, "norm_topk_prob": False}


def _olmoe(fields: Fields, values: Values) -> dict[str, Any]:
    size = fields.whole("expert_feed_forward_length", values["intermediate_size"])
    return {
        "num_experts": fields.whole("expert_count"),
        "num_experts_per_tok": fields.whole("expert_used_count"),
        "intermediate_size": size,
        "norm_topk_prob": False,
    }


def _deepseek(fields: Fields, values: Values) -> dict[str, Any]:
    return {
        "n_routed_experts": fields.whole("expert_count"),
        "num_experts_per_tok": fields.whole("expert_used_count"),
        "n_shared_experts": fields.whole("expert_shared_count"),
        "moe_intermediate_size": fields.whole("expert_feed_forward_length"),
        "first_k_dense_replace": fields.whole("leading_dense_block_count", 0),
        "norm_topk_prob": False,
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0),
    }


def _gpt_oss(fields: Fields, values: Values) -> dict[str, Any]:
    rope = values["rope_scaling"]
    return {
        "attention_bias": True,
        "num_local_experts": fields.whole("expert_count"),
        "num_experts_per_tok": fields.whole("expert_used_count"),
        "intermediate_size": fields.whole("expert_feed_forward_length", values["intermediate_size"]),
        "rope_scaling": rope and rope | {"truncate": False},
        "rope_parameters": {},  # else a file without scaling would have the family's
    }


def _window(fields: Fields, _: Values) -> dict[str, Any]:
    return {"sliding_window": fields.number_if_any("attention.sliding_window")}


def _windows(fields: Fields, values: Values) -> dict[str, Any]:
    """Read a window and which layers have it: every n-th has none, or there is a flag for each."""
    pattern = fields.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        kinds = ["sliding_attention" if is_windowed else "full_attention" for is_windowed in pattern]
        return _window(fields, values) | {"layer_types": kinds}
    return _window(fields, values) | ({} if pattern is None else {"sliding_window_pattern": pattern})


def _gemma(layers_of_27b: int) -> Reader:
    def read(fields: Fields, values: Values) -> dict[str, Any]:
        """Read the soft caps. The scale of scores is not in the file: it is the head's size, but for 27B."""
        is_27b = values["num_hidden_layers"] == layers_of_27b
        of_27b = values["hidden_size"] // values["num_attention_heads"]
        return {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": of_27b if is_27b else values["head_dim"],
            "final_logit_softcapping": fields.number_if_any("final_logit_softcapping"),
        }

    return read


def _gemma2(fields: Fields, _: Values) -> dict[str, Any]:
    return {
        "sliding_window": fields.whole("attention.sliding_window", 4096),
        "attn_logit_softcapping": fields.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": fields.number("final_logit_softcapping", 30.0),
    }


def _gemma3(fields: Fields, _: Values) -> dict[str, Any]:
    """Read the two steps of rotation; Ollama's converter has names of its own for them."""
    return {
        "rope_theta": fields.number("rope.freq_base", fields.number("rope.global.freq_base", 1e6)),
        "rope_local_base_freq": fields.number("rope.freq_base_swa", fields.number("rope.local.freq_base", 1e4)),
    }


def _granite(fields: Fields, values: Values) -> dict[str, Any]:
    if fields.get("rope.scaling.finetuned") is False:  # llama.cpp's way to say that positions are not rotated
        raise ConfigError(f"metadata granite.rope.scaling.finetuned: False is not supported: {OTHERWISE}")
    return {
        "attention_multiplier": fields.number_if_any("attention.scale") or values["head_dim"] ** -0.5,
        "embedding_multiplier": fields.number_if_any("embedding_scale"),
        "residual_multiplier": fields.number_if_any("residual_scale"),
        "logits_scaling": fields.number("logit_scale"),
    }


def _smollm3(*_: Any) -> dict[str, Any]:
    return {"no_rope_layer_interval": 4}


AFTER_ATTENTION = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
GEMMA_NAMES = AFTER_ATTENTION | {"pre_feedforward_layernorm": "ffn_norm"}
FUSED = {"mlp.gate_up_proj": "ffn_up"}

ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", (_biases, _mistral_if), has_moved_rows=True),
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen3": Architecture("Qwen3ForCausalLM", (_biases,)),
    "qwen2moe": Architecture("Qwen2MoeForCausalLM", (_experts, _qwen2_moe)),
    "qwen3moe": Architecture("Qwen3MoeForCausalLM", (_biases, _experts, _qwen3_moe)),
    "deepseek": Architecture("DeepseekForCausalLM", (_biases, _deepseek), has_moved_rows=True),
    "gemma2": Architecture("Gemma2ForCausalLM", (_windows, _gemma(46), _gemma2), GEMMA_NAMES, has_whole_norms=True),
    "gemma3": Architecture("Gemma3ForCausalLM", (_windows, _gemma(62), _gemma3), GEMMA_NAMES, has_whole_norms=True),
    "phi3": Architecture("Phi3ForCausalLM", (_window,), FUSED),
    "olmo2": Architecture("Olmo2ForCausalLM", (_biases,), AFTER_ATTENTION),
    "olmoe": Architecture("OlmoeForCausalLM", (_biases, _olmoe)),
    "granite": Architecture("GraniteForCausalLM", (_biases, _granite), has_moved_rows=True),
    "smollm3": Architecture("SmolLM3ForCausalLM", (_biases, _smollm3), has_moved_rows=True),
    "gpt-oss": Architecture(
        "GptOssForCausalLM", (_windows, _gpt_oss), {"post_attention_layernorm": "post_attention_norm"}
    ),
}
