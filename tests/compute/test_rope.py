import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_model

from kunserve.compute.rope import layer_rope_table, rope_inv_freq
from kunserve.errors import ConfigError
from kunserve.model.card import load_card
from kunserve.model.config import ModelConfig
from kunserve.model.hf_config import load_hf_config, parse_hf_config, to_hf_config


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


TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0, "attention_factor": 1.1, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    | {"mscale": 1.0, "mscale_all_dim": 0.8},
    "longrope": {"factor": 4.0, "attention_factor": 1.1, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
}
BESIDE = {"rope_theta": 10000.0, "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0}
ODD: tuple[object, ...] = (
    0,
    1,
    1.0,
    2,
    -1,
    0.5,
    1e-300,
    5e-39,
    1e300,
    2**90,
    math.nan,
    math.inf,
    "4",
    "",
    True,
    [],
    {},
    [0.0] * 8,
)
ODD_LISTS: tuple[object, ...] = ([1e-300] * 8, [1e300] * 8, ["1"] * 8, [math.nan] * 8, [1.0] * 7)


@pytest.mark.parametrize("kind", SCALINGS)
def test_whatever_a_config_says_is_refused_or_can_be_computed(kind: str) -> None:
    """One error that names a field, or cosines and sines that are numbers: never a division by zero."""
    plain, num_refused = SCALINGS[kind] | BESIDE, 0
    cases = [plain | {field: value} for field in plain for value in (*ODD, *ODD_LISTS)]
    cases += [plain | {field: 1.0, "rope_theta": theta} for field in plain for theta in (1.0, 1.0000001, 1e15)]
    for rope in cases:
        try:
            config = parse_hf_config(TINY | {"rope_scaling": rope | {"rope_type": kind}})
        except ConfigError:
            num_refused += 1
            continue
        for max_positions in (32, 512):
            assert layer_rope_table(config, 0, max_positions, torch.float32).isfinite().all(), rope
    assert 0 < num_refused < len(cases)
