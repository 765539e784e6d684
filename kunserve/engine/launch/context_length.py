"""From the model, its card, a flag and the memory to the longest request that is served, and why it is not longer."""

from __future__ import annotations

from kunserve.config import EngineConfig
from kunserve.errors import ConfigError
from kunserve.model.card import ModelFiles
from kunserve.model.config import ModelConfig

DEFAULT_MAX_MODEL_LEN = 8192  # a model may have a million positions: a first start should not need memory for them


def wanted_max_model_len(files: ModelFiles, config: EngineConfig) -> int:
    """Return the tokens of the longest request: those of the flag, else of the card, else a default.

    Memory may hold less. ConfigError if the flag asks for more than the model can.
    """
    limit, asked = files.config.max_position_embeddings, config.max_model_len
    if asked is not None and asked > limit:
        reason = _rope(files.config) or f"the model has {limit} positions"
        raise ConfigError(f"--max-model-len {asked} is more than {limit}: {reason}")
    return asked or min(_default(files), limit)


def reason_for_max_model_len(files: ModelFiles, config: EngineConfig, served: int) -> str | None:
    """Return why requests end at `served` tokens; None if the model ends there too, or a flag asked for it."""
    limit, wanted = files.config.max_position_embeddings, wanted_max_model_len(files, config)
    if served < wanted:
        return f"KV memory holds no more of the {wanted} tokens; raise --device-memory or use more devices"
    if config.max_model_len is not None:
        return None
    if served < limit:
        whose = "the card's default" if files.card and files.card.defaults.max_model_len else "the default"
        if not files.card and served == _original(files.config):
            whose = "the length the model was trained for first, beyond which it rotates all requests otherwise"
        return f"it is {whose}; --max-model-len allows up to {limit}"
    return _rope(files.config)


def _default(files: ModelFiles) -> int:
    default = (files.card and files.card.defaults.max_model_len) or DEFAULT_MAX_MODEL_LEN
    # Longer requests would change how the short ones are rotated: that must be asked for.
    return min(default, _original(files.config) or default)


def _original(config: ModelConfig) -> int | None:
    """Return the length up to which a model has rotations of their own (longrope); None where there is one for all."""
    scaling = config.rope_scaling
    return scaling.original_max_position_embeddings if scaling is not None and scaling.kind == "longrope" else None


def _rope(config: ModelConfig) -> str | None:
    """Return why a model that could be stretched as it goes ends where it does; None for others."""
    if config.rope_scaling is None or config.rope_scaling.kind != "dynamic":
        return None
    positions = config.max_position_embeddings
    return (
        f"the model has {positions} positions; dynamic scaling beyond them is not supported, as it would turn old keys"
    )
