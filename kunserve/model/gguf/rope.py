"""GGUF: how rotation is stretched, as `rope_scaling` of a `config.json`."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from math import prod
from typing import Any

from kunserve.errors import ConfigError
from kunserve.model.config_fields import show
from kunserve.model.family.rope import longrope_stretch
from kunserve.model.files import reading
from kunserve.model.gguf.fields import OTHERWISE, Fields, shortest
from kunserve.model.gguf.file import GgufFile, GgufTensor

LLAMA3_FACTORS = "rope_freqs.weight"  # of Llama 3.1 and later: what each pair's step is divided by
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"  # of Phi-3, as in its config
FACTORS = (LLAMA3_FACTORS, LONG_FACTORS, SHORT_FACTORS)
# The scalings of Llama 3.1 that were published; a file has their factors, not these numbers.
LLAMA3_SCALINGS = tuple(
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
)


def read_rope_scaling(fields: Fields, theta: float, rotary_dim: int) -> dict[str, Any] | None:
    """Return the scaling that the metadata say, or that the file's factors are of; None if there is none.

    rotary_dim: elements of a head that are rotated. ConfigError for a scaling that is not computed.
    """
    said, found = _said(fields), [name for name in FACTORS if fields.has(name)]
    if not found:
        return said
    if said is not None:
        both = f"rope.scaling.factor {said['factor']:g} together with tensor {found[0]}"
        raise ConfigError(f"{both} is not supported: {OTHERWISE}")
    if found[0] == LLAMA3_FACTORS:
        return _llama3(fields.file.tensors[LLAMA3_FACTORS], theta, rotary_dim // 2)
    return _longrope(fields)


def _said(fields: Fields) -> dict[str, Any] | None:
    """Return the scaling that the metadata say: without a type it is linear; factors of 0 and 1 stand for none."""
    kind = fields.get("rope.scaling.type") or "linear"
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 0.0))  # the old name
    if kind in ("none", "longrope"):  # which is in the tensors, if the model was stretched
        return None
    if kind not in ("linear", "yarn"):
        raise ConfigError(
            f"metadata rope.scaling.type: {show(kind)} is not supported, only linear and yarn: {OTHERWISE}"
        )
    if factor in (0, 1):
        return None
    return {"rope_type": "linear", "factor": factor} if kind == "linear" else _yarn(fields, factor)


def _yarn(fields: Fields, factor: float) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": fields.whole("rope.scaling.original_context_length"),
        "beta_fast": fields.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": fields.number("rope.scaling.yarn_beta_slow", 1.0),
    }


def _longrope(fields: Fields) -> dict[str, Any]:
    """Return Phi-3's scaling. Its stretch of cosines and sines follows from its lengths unless it says another."""
    original, context = fields.whole("rope.scaling.original_context_length"), fields.whole("context_length")
    usual = longrope_stretch(context / original, original)
    stretch = fields.number("rope.scaling.attn_factor", usual)
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "long_factor": list(_numbers(fields.file, LONG_FACTORS)),
        "short_factor": list(_numbers(fields.file, SHORT_FACTORS)),
        **({} if math.isclose(stretch, usual, rel_tol=1e-6) else {"attention_factor": stretch}),
    }


def _llama3(tensor: GgufTensor, theta: float, num_pairs: int) -> dict[str, Any]:
    """Return the scaling that factors are of."""
    found = _numbers_of(tensor)
    if len(found) != num_pairs:
        raise ConfigError(f"tensor {tensor.name} has {len(found)} numbers for {num_pairs} pairs")
    for scaling in LLAMA3_SCALINGS:
        wanted = [_factor(scaling, theta ** (-i / num_pairs)) for i in range(num_pairs)]
        if all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(wanted, found, strict=True)):
            return scaling
    raise ConfigError(f"tensor {tensor.name} scales positions in another way than Llama 3.1 and 3.2: not supported")


def _factor(scaling: Mapping[str, Any], step: float) -> float:
    """Return what Llama 3.1 divides a pair's step per position (radians) by."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * step / (2 * math.pi)  # within the original context
    share = min(1.0, max(0.0, (turns - low) / (high - low)))
    return float(1 / ((1 - share) / scaling["factor"] + share))


def _numbers(file: GgufFile, name: str) -> tuple[float, ...]:
    if (tensor := file.tensors.get(name)) is None:
        raise ConfigError(f"tensor {name} is missing: {OTHERWISE}")
    return tuple(map(shortest, _numbers_of(tensor)))


def _numbers_of(tensor: GgufTensor) -> tuple[float, ...]:
    if tensor.format != "F32":
        raise ConfigError(f"tensor {tensor.name} has the format {tensor.format}, not F32")
    with reading(tensor.path), tensor.path.open("rb") as data:
        data.seek(tensor.offset)
        return struct.unpack(f"<{prod(tensor.shape)}f", data.read(tensor.num_bytes))
