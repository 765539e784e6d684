"""Random tiny models of every family, as Hugging Face folders that a server can run: made by transformers itself."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

PLAIN = ("llama", "llama3", "mistral", "qwen2", "qwen3", "qwen3-tied")
VOCAB_SIZE = 320
SPECIAL_TOKENS = ("<|begin|>", "<|start|>", "<|end|>")  # ids 0, 1, 2
BOS, EOS = 0, 2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
TEXT = "the quick brown fox jumps over the lazy dog while another hound answers that nothing of this kind was there"

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 700,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + i for i in range(6)],
    "partial_rotary_factor": 0.75,
}
LONG = {"sliding_window": None, "original_max_position_embeddings": 700, "max_position_embeddings": 1024}
GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": 40, "tie_word_embeddings": True}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.125,
    "logits_scaling": 8.0,
    "attention_bias": True,
    "mlp_bias": True,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}

# By name: what transformers calls its configuration, and what it has beside SHAPE.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 50}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 33, "max_window_layers": 1}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-tied": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3-biases": ("Qwen3", {"attention_bias": True}),
    "gemma2": ("Gemma2", GEMMA | {"final_logit_softcapping": 8.0, "attn_logit_softcapping": 3.0}),
    "gemma3": (
        "Gemma3Text",
        GEMMA | {"sliding_window_pattern": 3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-longrope": ("Phi3", LONG | {"rope_parameters": LONGROPE, "tie_word_embeddings": True}),
    "phi3-window": ("Phi3", {"sliding_window": 47}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", GRANITE),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3Moe", EXPERTS | {"moe_intermediate_size": 24, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen2-moe": (
        "Qwen2Moe",
        EXPERTS | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    ),
    "olmoe": ("Olmoe", EXPERTS),
    "gpt-oss": ("GptOss", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 40}),
}
FAMILIES = tuple(VARIANTS)
ROUTER_SCALE = 0.6  # routers that choose clearly: near ties would be told apart by rounding


def make_tiny_model(
    family: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Save a random model of `family` (one of FAMILIES) and a tokenizer into `folder`; `overrides` change its config.

    Weights are large and norms and biases uneven, so that whatever a forward pass forgets shows in its logits.
    """
    model_class, config = _model_and_config(family, overrides)
    model = model_class(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    offset = 0 if family.startswith("gemma") else 1  # Gemma keeps norm weights around 0
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        scale = ROUTER_SCALE if "gate.weight" in name or "router" in name else 1.0 if "sinks" in name else 0.15
        weight.data.copy_(offset + 0.2 * noise if name.endswith("norm.weight") else scale * noise)
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


def make_tiny_deepseek(folder: Path) -> Path:
    """Save a DeepSeek in `folder`/deepseek, and in `folder`/qwen what transformers has instead, which answers the same.

    It is as Qwen2-MoE with gates of 0, which halve, and without biases.
    """
    theirs = make_tiny_model(
        "qwen2-moe", folder / "qwen", mlp_only_layers=[0], moe_intermediate_size=20, qkv_bias=False
    )
    tensors = load_file(theirs / "model.safetensors")
    for name in [name for name in tensors if name.endswith("shared_expert_gate.weight")]:
        tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, theirs / "model.safetensors", {"format": "pt"})

    ours = shutil.copytree(theirs, folder / "deepseek")
    values = json.loads((ours / "config.json").read_text())
    values |= {"architectures": ["DeepseekForCausalLM"], "n_routed_experts": values.pop("num_experts")}
    values |= {"first_k_dense_replace": 1, "n_shared_experts": 2}
    assert values["shared_expert_intermediate_size"] == 2 * values["moe_intermediate_size"]
    (ours / "config.json").write_text(json.dumps(values))
    halved = {
        name.replace("shared_expert.", "shared_experts."): tensor / 2 if "shared_expert.down" in name else tensor
        for name, tensor in tensors.items()
        if "shared_expert_gate" not in name
    }
    save_file(halved, ours / "model.safetensors", {"format": "pt"})
    return ours


def load_reference(folder: Path) -> Any:
    """The transformers model of a folder, for comparison: evaluation mode, eager attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def save_tiny_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer of VOCAB_SIZE tokens with a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator([TEXT], trainer)
    assert core.get_vocab_size() == VOCAB_SIZE, "TEXT is too short for that many merges"
    core.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[EOS],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _model_and_config(family: str, overrides: dict[str, Any]) -> tuple[Any, Any]:
    """transformers' model class and configuration of one of FAMILIES."""
    is_loaded = "transformers" in sys.modules
    import transformers

    prefix, more = VARIANTS[family]
    config = getattr(transformers, f"{prefix}Config")(**SHAPE | more | overrides)
    model_class = getattr(transformers, f"{prefix.removesuffix('Text')}ForCausalLM")
    if not is_loaded:  # twice as many objects as all that was there: collections pass over these, too (conftest.py)
        gc.freeze()
    return model_class, config
