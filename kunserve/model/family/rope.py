"""Model files, step 2: what a `config.json` says of rotation, in its old and its new style -> `ModelConfig`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kunserve.errors import ConfigError
from kunserve.model.config import ROPE_KINDS, RopeScaling
from kunserve.model.config_fields import (
    check_range,
    read_flag,
    read_float,
    read_int,
    read_numbers,
    read_object,
    show,
)

Values = Mapping[str, Any]
STYLES = ("rope_scaling", "rope_parameters")  # the old one goes before the new one: it is what people add to a file
OLD_KINDS = {"su": "longrope"}
SCALING_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow")


@dataclass(frozen=True, slots=True)
class Rope:
    """Fields of ModelConfig, and how many positions they reach."""

    fields: dict[str, Any]

    def num_positions(self, configured: int) -> int:
        """Return how many positions can be served of those that the model says it has.

        People who stretch a model with yarn add the scaling, and leave `max_position_embeddings` as it was.
        """
        scaling: RopeScaling | None = self.fields["rope_scaling"]
        if scaling is None or scaling.kind != "yarn":
            return configured
        return max(configured, int(scaling.factor * scaling.original_max_position_embeddings))


def read_rope(values: Values) -> Rope:
    """Read theta, scaling and the share that is rotated. Raises ConfigError naming the field that is not supported."""
    style = next((style for style in STYLES if read_object(values, style)), STYLES[0])
    rope = read_object(values, style)
    local = values.get("rope_local_base_freq")
    if any(isinstance(part, dict) for part in rope.values()):  # one for each kind of layer: with windows and without
        if set(rope) != {"full_attention", "sliding_attention"}:
            raise ConfigError(f"field {style}: layers {show(sorted(rope))} are not supported")
        windowed, rope = read_object(rope, "sliding_attention"), read_object(rope, "full_attention")
        if _kind(windowed, style) is not None:
            raise ConfigError(f"field {style}: scaling is not supported in layers with windows")
        local = windowed.get("rope_theta", local)
    factor = read_float(values, "partial_rotary_factor", 1.0)
    # Where the old style has none, it may stand in the new one, or beside both.
    beside = {"rope_theta": read_object(values, "rope_parameters").get("rope_theta")} | dict(values)
    fields = {
        "rope_theta": read_float(rope, "rope_theta", read_float(beside, "rope_theta", 10000.0)),
        "rope_scaling": _scaling(values, rope, style),
        "partial_rotary_factor": read_float(rope, "partial_rotary_factor", factor),
        "local_rope_theta": None if local is None else read_float({"rope_theta": local}, "rope_theta"),
    }
    return Rope(fields)


def check_rope(scaling: RopeScaling, rotary_dim: int) -> None:
    """Check a scaling, wherever it was read. Raises ConfigError naming the field."""
    if scaling.kind not in ROPE_KINDS:
        raise ConfigError(f"field kind: {show(scaling.kind)} is none of {', '.join(ROPE_KINDS)}")
    for field in SCALING_NUMBERS:
        check_range(field, getattr(scaling, field))
    is_relative = scaling.kind in ("llama3", "yarn", "longrope")
    check_range("original_max_position_embeddings", scaling.original_max_position_embeddings, may_be_0=not is_relative)
    if scaling.low_freq_factor >= scaling.high_freq_factor:  # what lies between is divided by their difference
        factors = f"{scaling.low_freq_factor} is not below high_freq_factor {scaling.high_freq_factor}"
        raise ConfigError(f"field low_freq_factor: {factors}")
    if scaling.kind == "yarn" and scaling.beta_fast < scaling.beta_slow:
        raise ConfigError(f"field beta_fast: {scaling.beta_fast} is below beta_slow {scaling.beta_slow}")
    if scaling.kind == "longrope":
        for name, divisors in (("short_factor", scaling.short_factors), ("long_factor", scaling.long_factors)):
            if len(divisors) != rotary_dim // 2:
                raise ConfigError(f"field {name}: it has {len(divisors)} numbers for {rotary_dim // 2} pairs")


def _kind(rope: Values, style: str) -> str | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kind = OLD_KINDS.get(kind, kind) if isinstance(kind, str) else kind
    if kind == "default":
        return None
    if kind not in ROPE_KINDS:
        raise ConfigError(f"field {style}: rope_type {show(kind)} is not supported, only {', '.join(ROPE_KINDS)}")
    return str(kind)


def _scaling(values: Values, rope: Values, style: str) -> RopeScaling | None:
    kind = _kind(rope, style)
    if kind is None:
        return None
    positions = read_int(values, "max_position_embeddings")
    # Phi-3 says the original length beside its rope, and then that is what counts.
    original = read_int(rope, "original_max_position_embeddings", positions)
    original = read_int(values, "original_max_position_embeddings", original)
    if kind == "llama3":
        return RopeScaling(
            read_float(rope, "factor"),
            read_float(rope, "low_freq_factor"),
            read_float(rope, "high_freq_factor"),
            original,
        )
    if kind == "yarn":
        return _yarn(rope, original, positions)
    if kind == "longrope":
        factor = read_float(rope, "factor", positions / original)
        return RopeScaling(
            factor,
            original_max_position_embeddings=original,
            kind=kind,
            attention_factor=read_float(rope, "attention_factor", longrope_stretch(factor, original)),
            short_factors=read_numbers(rope, "short_factor"),
            long_factors=read_numbers(rope, "long_factor"),
        )
    return RopeScaling(read_float(rope, "factor"), kind=kind)


def longrope_stretch(factor: float, original: int) -> float:
    """Return LongRoPE's factor of cosines and sines for contexts `factor` times as long as the original one."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0


def _yarn(rope: Values, original: int, positions: int) -> RopeScaling:
    factor = read_float(rope, "factor", positions / original)
    stretch = _mscale(factor, 1.0)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        stretch = _mscale(factor, read_float(rope, "mscale")) / _mscale(factor, read_float(rope, "mscale_all_dim"))
    return RopeScaling(
        factor,
        original_max_position_embeddings=original,
        kind="yarn",
        attention_factor=read_float(rope, "attention_factor", stretch),
        beta_fast=read_float(rope, "beta_fast", 32.0),
        beta_slow=read_float(rope, "beta_slow", 1.0),
        truncate=rope.get("truncate") is None or read_flag(rope, "truncate"),
    )


def _mscale(factor: float, mscale: float) -> float:
    """Return YaRN's factor of cosines and sines for contexts that are `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
