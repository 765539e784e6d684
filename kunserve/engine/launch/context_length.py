"""From the model, its card, a flag and the memory to the longest request that is served, and why it is not longer."""

from __future__ import annotations

from kunserve.config import EngineConfig
from kunserve.errors import ConfigError
from kunserve.model.card import ModelFiles
from kunserve.model.hf_config import cutting_window

DEFAULT_MAX_MODEL_LEN = 8192  # a model may have a million positions: a first start should not need memory for them


def wanted_max_model_len(files: ModelFiles, config: EngineConfig) -> int:
    """Return the tokens of the longest request: those of the flag, else of the card, else a default.

    Memory may hold less. ConfigError if the flag asks for more than the model can.
    """
    limit, asked = files.config.max_position_embeddings, config.max_model_len
    if asked is not None and asked > limit:
        reason = _window(files) or f"the model has {limit} positions"
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
        return f"it is {whose}; --max-model-len allows up to {limit}"
    return _window(files)


def _default(files: ModelFiles) -> int:
    return (files.card and files.card.defaults.max_model_len) or DEFAULT_MAX_MODEL_LEN


def _window(files: ModelFiles) -> str | None:
    """Return what a sliding window does to the length, if the model has one that does."""
    if files.folder is None or (cut := cutting_window(files.folder)) is None:
        return None
    window, positions = cut
    return f"the model has {positions} positions, but a sliding window of {window}: longer requests are not supported"
