"""Random tiny models of every family, as Hugging Face folders that a server can run: made by transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3", "qwen3-tied")
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
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_tiny_model(
    family: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Save a random model of `family` (one of FAMILIES) and a tokenizer into `folder`; `overrides` change its config.

    Weights are large and norms and biases uneven, so that whatever a forward pass forgets shows in its logits.
    """
    model = _model_class(family)(_config(family, overrides)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data.copy_(1 + 0.2 * noise if name.endswith("norm.weight") else 0.15 * noise)
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


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


def _config(family: str, overrides: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    match family:
        case "llama":
            return LlamaConfig(**SHAPE | overrides)
        case "llama3":
            return LlamaConfig(**SHAPE | {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True} | overrides)
        case "mistral":
            return MistralConfig(**SHAPE | {"sliding_window": None} | overrides)
        case "qwen2":
            return Qwen2Config(**SHAPE | overrides)
        case "qwen3":
            return Qwen3Config(**SHAPE | {"head_dim": 32} | overrides)
        case "qwen3-tied":
            return Qwen3Config(**SHAPE | {"tie_word_embeddings": True} | overrides)
    raise ValueError(f"no tiny family {family!r}; these are: {', '.join(FAMILIES)}")


def _model_class(family: str) -> Any:
    from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

    classes = {"mistral": MistralForCausalLM, "qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}
    return classes.get(family.removesuffix("-tied"), LlamaForCausalLM)
