"""Rotary embedding: the angular step per position of each pair of a head, as transformers computes it.

A rotation depends on nothing but its position and on how the server was started: KV outlives the step that wrote it,
and requests share it. So what transformers decides by the length of the longest request at hand is decided once here,
by the longest request that is served.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kunserve.compute.ops import rope_table
from kunserve.model.config import ModelConfig, RopeScaling


def layer_rope_table(config: ModelConfig, layer: int, max_positions: int, dtype: torch.dtype) -> Tensor:
    """Return cosines and sines of a layer: (max_positions, rotary_dim); with no columns where it does not rotate.

    max_positions: of the longest request that is served.
    """
    if layer in config.nope_layers:
        return torch.empty(max_positions, 0, dtype=dtype)
    if config.local_rope_theta is not None and layer in config.windowed_layers:
        return rope_table(
            config.rotary_dim, _inv_freq(config.local_rope_theta, config.rotary_dim), max_positions, dtype
        )
    stretch = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    return rope_table(config.rotary_dim, rope_inv_freq(config, max_positions), max_positions, dtype, stretch)


def rope_kind(config: ModelConfig, layer: int) -> tuple[bool, bool]:
    """Return what the table of a layer depends on: layers of one kind share it."""
    return layer in config.nope_layers, config.local_rope_theta is not None and layer in config.windowed_layers


def rope_inv_freq(config: ModelConfig, max_positions: int = 0) -> Tensor:
    """Return the steps in radians per position: (rotary_dim / 2,) float32 on the CPU.

    float32 throughout, in transformers' order of operations, so that both agree to the bit.
    """
    scaling = config.rope_scaling
    if scaling is None:
        return _inv_freq(config.rope_theta, config.rotary_dim)
    return _SCALED[scaling.kind](scaling, config.rope_theta, config.rotary_dim, max_positions)


def _exponents(dim: int) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32) / dim


def _inv_freq(theta: float, dim: int) -> Tensor:
    return 1.0 / (theta ** _exponents(dim))


def _linear(scaling: RopeScaling, theta: float, dim: int, _: int) -> Tensor:
    """Let all pairs turn `factor` times slower."""
    return _inv_freq(theta, dim) / scaling.factor


def _dynamic(_: RopeScaling, theta: float, dim: int, __: int) -> Tensor:
    """Stretch nothing: within the model's positions, which is all that is served, nothing has to be."""
    return _inv_freq(theta, dim)


def _llama3(scaling: RopeScaling, theta: float, dim: int, _: int) -> Tensor:
    """Turn slow pairs `factor` times slower, leave fast ones, and interpolate those between (Llama 3.1)."""
    inv_freq = _inv_freq(theta, dim)
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


def _yarn(scaling: RopeScaling, theta: float, dim: int, _: int) -> Tensor:
    """Stretch as llama3, but what lies between is the pairs that turn `beta_slow` to `beta_fast` times (YaRN)."""

    def pair(num_turns: float) -> float:
        original = scaling.original_max_position_embeddings
        return (dim * math.log(original / (num_turns * 2 * math.pi))) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    periods = theta ** _exponents(dim)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _longrope(scaling: RopeScaling, theta: float, dim: int, max_positions: int) -> Tensor:
    """Divide each pair by a number of its own: one where requests stay within the original length, one else."""
    is_long = max_positions > scaling.original_max_position_embeddings
    factors = torch.tensor(scaling.long_factors if is_long else scaling.short_factors, dtype=torch.float32)
    return 1.0 / (factors * theta ** _exponents(dim))


_SCALED: dict[str, Callable[[RopeScaling, float, int, int], Tensor]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
