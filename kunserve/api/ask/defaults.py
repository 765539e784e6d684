"""What a request gets that does not say: the sampling settings that the model's authors recommend, as with vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kunserve.api.ask.declared.check import read
from kunserve.api.ask.declared.generation import Completion
from kunserve.errors import ConfigError, KunServeError
from kunserve.model.card import CardSampling
from kunserve.model.hf_config import read_json

# What the file holds beside sampling settings: tokens that are read elsewhere, and what changes no answer.
NEUTRAL = frozenset(
    (
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
        *("use_cache", "cache_implementation", "return_dict_in_generate", "output_scores"),
        *("output_attentions", "output_hidden_states", "output_logits"),
    )
)
# Of all that Hugging Face's file may hold, what is obeyed, and the fields of requests that mean it.
FIELDS = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}


def sampling_defaults(
    source: str, folder: Path | None, overrides: Mapping[str, Any], card: CardSampling | None = None
) -> dict[str, Any]:
    """Return values by the names of request fields; `overrides` go before what `generation_config.json` says.

    `source`: "auto" reads the file in the model's `folder`, if there is one, over what the model's `card` says;
    "vllm" takes nothing of the model's; else it is a folder that must have the file. ConfigError for a file that cannot
    be read and for values that no request could bring.
    """
    values: dict[str, Any] = {}
    if source == "auto" and card is not None:
        values = asdict(card)
        _check(values, "the model card")
    if (path := _file(source, folder)) is not None:
        found = read_json(path)
        _check(found, str(path))
        values |= {name: value for name, value in found.items() if value is not None}
    _check(overrides, "--override-generation-config")
    if unknown := overrides.keys() - FIELDS.keys():
        raise ConfigError(f"--override-generation-config: {sorted(unknown)[0]} is none of {', '.join(FIELDS)}")
    return _known({**values, **overrides})


def settings_not_obeyed(source: str, folder: Path | None) -> dict[str, Any]:
    """Return the fields of the generation_config.json in force that change answers elsewhere, but not here.

    `source` and `folder` as in `sampling_defaults`. ConfigError for a file that cannot be read.
    """
    path = _file(source, folder)
    values = {} if path is None else read_json(path)
    known = {*FIELDS, *NEUTRAL}
    return {
        name: value
        for name, value in values.items()
        if name not in known and not name.startswith("_") and _has_effect(name, value)
    }


def _has_effect(name: str, value: object) -> bool:
    """Return whether a setting is one; null, false, 0, 1 and nothing are how transformers writes "off"."""
    if name == "do_sample":  # here `temperature` alone says whether to sample
        return value is False
    return not (value is None or value in (False, 0, 1) or value == [] or value == {} or value == "")


def _file(source: str, folder: Path | None) -> Path | None:
    """Return the path of the generation_config.json that `source` stands for; None if there is none and may be none."""
    if source == "vllm":
        return None
    path = folder if source == "auto" else Path(source)
    path = None if path is None else path / "generation_config.json"
    return path if path is not None and (source != "auto" or path.exists()) else None


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {field: values[name] for name, field in FIELDS.items() if values.get(name) is not None}


def _check(values: Mapping[str, Any], where: str) -> None:
    try:
        read({"prompt": "", **_known(values)}, Completion)
    except KunServeError as error:
        raise ConfigError(f"{where}: {error.message}") from None
