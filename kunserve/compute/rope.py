"""Rotary embedding: the angular step per position of each pair of a head, as transformers computes it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kunserve.model.config import Llama3RopeScaling, ModelConfig


def rope_inv_freq(config: ModelConfig) -> Tensor:
    """Return the steps in radians per position: (head_dim / 2,) float32 on the CPU.

    float32 throughout, in transformers' order of operations, so that both agree to the bit.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inv_freq = 1.0 / (config.rope_theta**exponents)
    return inv_freq if config.rope_scaling is None else _scale_llama3(inv_freq, config.rope_scaling)


def _scale_llama3(inv_freq: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Slow pairs turn `factor` times slower, fast ones stay, those between are interpolated (Llama 3.1)."""
    low_wavelen = scaling.original_max_position_embeddings / scaling.low_freq_factor
    high_wavelen = scaling.original_max_position_embeddings / scaling.high_freq_factor
    wavelen = 2 * math.pi / inv_freq
    scaled = torch.where(wavelen > low_wavelen, inv_freq / scaling.factor, inv_freq)
    smooth = (scaling.original_max_position_embeddings / wavelen - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smoothed = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    is_between = (wavelen >= high_wavelen) & (wavelen <= low_wavelen)
    return torch.where(is_between, smoothed, scaled)
