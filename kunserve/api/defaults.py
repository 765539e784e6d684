"""What a request gets that does not say: the sampling settings that the model's authors recommend, as with vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kunserve.api.fields import Fields
from kunserve.api.protocol import read_params
from kunserve.errors import ConfigError, KunServeError
from kunserve.model.card import CardSampling
from kunserve.model.hf_config import read_json

NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # of all that Hugging Face's file may hold


def sampling_defaults(
    source: str, folder: Path | None, overrides: Mapping[str, Any], card: CardSampling | None = None
) -> dict[str, Any]:
    """Values by the names of request fields; `overrides` go before what `generation_config.json` says.

    `source`: "auto" reads the file in the model's `folder`, if there is one, over what the model's `card` says;
    "vllm" takes nothing of the model's; else it is a folder that must have the file. ConfigError for a file that cannot
    be read and for values that no request could bring.
    """
    values: dict[str, Any] = {}
    if source == "auto" and card is not None:
        values = _known(asdict(card))
        _check(values, "the model card")
    if source != "vllm":
        place = folder if source == "auto" else Path(source)
        path = None if place is None else place / "generation_config.json"
        if path is not None and (source != "auto" or path.exists()):
            found = read_json(path)
            _check(found, str(path))
            values |= _known(found)
    _check(overrides, "--override-generation-config")
    if unknown := overrides.keys() - set(NAMES):
        raise ConfigError(f"--override-generation-config: {sorted(unknown)[0]} is none of {', '.join(NAMES)}")
    return _known({**values, **overrides})


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in NAMES if values.get(name) is not None}


def _check(values: Mapping[str, Any], where: str) -> None:
    try:
        read_params(Fields(_known(values)), 1, None, 1)
    except KunServeError as error:
        raise ConfigError(f"{where}: {error.message}") from None
