from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_model

from kunserve.compute.rope import rope_inv_freq
from kunserve.model.card import load_card
from kunserve.model.config import ModelConfig
from kunserve.model.hf_config import load_hf_config, to_hf_config


def _theirs(config: ModelConfig) -> torch.Tensor:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    values: dict[str, Any] = to_hf_config(replace(config, family="llama"))
    inv_freq: torch.Tensor = LlamaRotaryEmbedding(LlamaConfig(**values)).inv_freq
    return inv_freq


@pytest.mark.parametrize("card", ["smollm2-135m", "llama-8b", "qwen3-8b"])
def test_equal_to_transformers_to_the_bit(card: str) -> None:
    config = load_card(card).config
    inv_freq = rope_inv_freq(config)
    assert inv_freq.dtype == torch.float32
    assert torch.equal(inv_freq, _theirs(config))


def test_llama3_scaling_slows_down_slow_pairs_only(tmp_path: Path) -> None:
    config = load_hf_config(make_tiny_model("llama3", tmp_path))
    scaled, plain = rope_inv_freq(config), rope_inv_freq(replace(config, rope_scaling=None))
    assert torch.equal(scaled, _theirs(config))
    assert scaled[0] == plain[0]
    assert scaled[-1] == plain[-1] / 8
