"""The longest request that is served, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import make_tiny_model

from kunserve.config import EngineConfig
from kunserve.engine.launch.context_length import reason_for_max_model_len, wanted_max_model_len
from kunserve.errors import ConfigError
from kunserve.model.card import ModelFiles, resolve_model


def test_the_flag_goes_before_the_card_and_the_card_before_the_default() -> None:
    card = resolve_model("llama-8b", load_format="dummy")  # 131,072 positions, 32,768 by its card
    assert wanted_max_model_len(card, EngineConfig("m", max_model_len=50_000)) == 50_000
    assert wanted_max_model_len(card, EngineConfig("m")) == 32_768
    nobodys = ModelFiles("m", None, card.config)
    assert wanted_max_model_len(nobodys, EngineConfig("m")) == 8192


def test_what_shortens_requests_is_said(tmp_path: Path) -> None:
    card, config = resolve_model("llama-8b", load_format="dummy"), EngineConfig("m")
    assert (
        reason_for_max_model_len(card, config, 32_768)
        == "it is the card's default; --max-model-len allows up to 131072"
    )
    nobodys = ModelFiles("m", None, card.config)
    assert reason_for_max_model_len(nobodys, config, 8192) == "it is the default; --max-model-len allows up to 131072"
    memory = "KV memory holds no more of the 32768 tokens; raise --device-memory or use more devices"
    assert reason_for_max_model_len(card, config, 4096) == memory
    assert reason_for_max_model_len(card, EngineConfig("m", max_model_len=99), 99) is None
    whole = resolve_model(str(make_tiny_model("llama", tmp_path)))
    assert reason_for_max_model_len(whole, config, 512) is None


def test_a_sliding_window_shortens_no_request(tmp_path: Path) -> None:
    windowed = resolve_model(str(make_tiny_model("mistral-window", tmp_path)))
    assert wanted_max_model_len(windowed, EngineConfig("m")) == 512
    assert reason_for_max_model_len(windowed, EngineConfig("m"), 512) is None


def test_what_dynamic_scaling_cannot_do_is_said(tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    dynamic = resolve_model(str(make_tiny_model("llama", tmp_path, rope_parameters=scaling)))
    reason = "the model has 512 positions; dynamic scaling beyond them is not supported, as it would turn old keys"
    assert wanted_max_model_len(dynamic, EngineConfig("m")) == 512
    assert reason_for_max_model_len(dynamic, EngineConfig("m"), 512) == reason
    with pytest.raises(ConfigError, match=f"--max-model-len 600 is more than 512: {reason}"):
        wanted_max_model_len(dynamic, EngineConfig("m", max_model_len=600))


def test_longer_requests_than_a_model_was_trained_for_first_must_be_asked_for(tmp_path: Path) -> None:
    longrope = resolve_model(str(make_tiny_model("phi3-longrope", tmp_path)))
    assert wanted_max_model_len(longrope, EngineConfig("m")) == 700
    reason = reason_for_max_model_len(longrope, EngineConfig("m"), 700)
    assert reason is not None and reason.endswith("otherwise; --max-model-len allows up to 1024")
    assert wanted_max_model_len(longrope, EngineConfig("m", max_model_len=900)) == 900
