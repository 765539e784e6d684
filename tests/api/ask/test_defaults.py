from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from api_fakes import MODEL, FakeEngine, serving

from kunserve.api.ask.defaults import sampling_defaults, settings_not_obeyed
from kunserve.api.wire.backend import ModelInfo
from kunserve.errors import ConfigError
from kunserve.model.card import CardSampling, list_cards, load_card

RECOMMENDED = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    more = {"eos_token_id": [1, 2], "do_sample": True, "min_p": None, "transformers_version": "5.0"}
    (tmp_path / "generation_config.json").write_text(json.dumps({**RECOMMENDED, **more}))
    return tmp_path


def test_where_they_come_from(folder: Path, tmp_path: Path) -> None:
    assert sampling_defaults("auto", folder, {}) == RECOMMENDED
    assert sampling_defaults("auto", folder, {"top_k": 5, "min_p": 0.1}) == {**RECOMMENDED, "top_k": 5, "min_p": 0.1}
    assert sampling_defaults("auto", folder, {"top_k": None}) == {"temperature": 0.6, "top_p": 0.95}
    assert sampling_defaults("vllm", folder, {"top_k": 5}) == {"top_k": 5}
    assert sampling_defaults(str(folder), None, {}) == RECOMMENDED
    assert sampling_defaults("auto", None, {}) == {}
    assert sampling_defaults("auto", tmp_path / "none", {}) == {}


def test_what_is_not_obeyed_is_named(folder: Path, tmp_path: Path) -> None:
    assert settings_not_obeyed("auto", folder) == {}
    off = {
        "num_beams": 1,
        "repetition_penalty": 1.1,
        "stop_strings": None,
        "_from_model_config": True,
    }
    other = {
        "max_length": 99,
        "do_sample": False,
        "typical_p": 0.5,
        "num_beams": 4,
    }
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(off))
    assert settings_not_obeyed("auto", tmp_path) == {}
    path.write_text(json.dumps(off | other))
    assert settings_not_obeyed("auto", tmp_path) == settings_not_obeyed(str(tmp_path), None) == other
    assert settings_not_obeyed("vllm", tmp_path) == settings_not_obeyed("auto", None) == {}
    assert settings_not_obeyed("auto", tmp_path / "none") == {}


def test_lengths_and_stops_of_the_file_are_those_of_requests(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"max_new_tokens": 7, "min_new_tokens": 2, "stop_strings": ["###"]}))
    assert sampling_defaults("auto", tmp_path, {}) == {"max_tokens": 7, "min_tokens": 2, "stop": ["###"]}
    assert sampling_defaults("auto", tmp_path, {"max_new_tokens": 9})["max_tokens"] == 9
    assert settings_not_obeyed("auto", tmp_path) == {}
    for bad, message in (({"max_new_tokens": "7"}, "max_tokens"), ({"stop_strings": [3]}, "stop")):
        path.write_text(json.dumps(bad))
        with pytest.raises(ConfigError, match=f"generation_config.json: `{message}"):
            sampling_defaults("auto", tmp_path, {})


def test_a_card_speaks_where_the_folder_does_not(folder: Path, tmp_path: Path) -> None:
    card = CardSampling(temperature=0.2, min_p=0.1)
    assert sampling_defaults("auto", folder, {}, card) == {**RECOMMENDED, "min_p": 0.1}
    assert sampling_defaults("auto", tmp_path / "none", {}, card) == {"temperature": 0.2, "min_p": 0.1}
    assert sampling_defaults("auto", None, {"min_p": None}, card) == {"temperature": 0.2}
    assert sampling_defaults("vllm", folder, {}, card) == {}
    assert sampling_defaults(str(folder), None, {}, card) == RECOMMENDED
    with pytest.raises(ConfigError, match="the model card: `top_p` must be"):
        sampling_defaults("auto", folder, {}, CardSampling(top_p=7.0))


@pytest.mark.parametrize("name", list_cards())
def test_what_the_cards_say_can_be(name: str) -> None:
    values = sampling_defaults("auto", None, {}, load_card(name).defaults.sampling)
    assert (values == {"temperature": 0.2, "top_p": 0.9}) == (name == "smollm2-135m")


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("nowhere", {}, "cannot read nowhere/generation_config.json"),
        ("vllm", {"top_p": 7}, "--override-generation-config: `top_p` must be"),
        ("vllm", {"top_p": "high"}, "--override-generation-config: `top_p` must be a number"),
        ("vllm", {"stop": "x"}, "stop is none of"),
    ],
)
def test_what_cannot_be(source: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sampling_defaults(source, None, overrides)
    assert message in caught.value.message


def test_a_file_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": -1}')
    with pytest.raises(ConfigError, match="`temperature` must be at least 0"):
        sampling_defaults("auto", tmp_path, {})


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}),
    ],
)
async def test_what_a_request_says_goes_before(url: str, body: dict[str, Any]) -> None:
    engine = FakeEngine()
    model = ModelInfo(MODEL.served_names, 64, "/", 0, RECOMMENDED)
    async with serving(engine, model=model) as client:
        for more in ({}, {"temperature": None, "top_p": 1}, {"temperature": 0}):
            assert (await client.post(url, json={**body, **more})).status == 200
    seen = [(r.params.temperature, r.params.top_p, r.params.top_k) for r in engine.requests]
    assert seen == [(0.6, 0.95, 20), (0.6, 1.0, 20), (0.0, 0.95, 20)]
