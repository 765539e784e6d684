from math import prod
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

from kunserve.errors import ConfigError
from kunserve.model.card import CARDS, cache_root, list_cards, load_card, resolve_model
from kunserve.model.checkpoint import expected_shapes
from kunserve.model.hf_config import load_hf_config, parse_hf_config, to_hf_config
from kunserve.progress import Progress

NUM_PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_248_023_552,
}


def test_there_is_a_card_for_each() -> None:
    assert list_cards() == sorted(NUM_PARAMETERS)


@pytest.mark.parametrize("name", sorted(NUM_PARAMETERS))
def test_a_card_gives_the_full_shape(name: str) -> None:
    card = load_card(name)
    assert sum(map(prod, expected_shapes(card.config).values())) == NUM_PARAMETERS[name]
    assert parse_hf_config(to_hf_config(card.config)) == card.config
    assert card.hub_id or card.embedded
    assert card.licence
    assert card.config.eos_token_ids
    assert (card.defaults.max_model_len or 0) <= card.config.max_position_embeddings


def _write_card(folder: Path, old: str, new: str) -> None:
    text = (CARDS / "llama-8b.toml").read_text()
    assert old in text
    (folder / "llama-8b.toml").write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("licence =", "license =", "unknown field license; did you mean 'licence'"),
        (
            "max_model_len",
            "max_model_length",
            r"unknown field defaults\.max_model_length; did you mean 'max_model_len'",
        ),
        ("head_dim = 128", "", r"field config\.head_dim is missing"),
        ("head_dim = 128", 'head_dim = "128"', r"field config\.head_dim: expected int, not '128'"),
        ("head_dim = 128", "head_dim = true", r"field config\.head_dim: expected int"),
        ("factor = 8.0", 'factor = "8"', r"field config\.rope_scaling\.factor: expected float"),
        ("[128001, ", '["</s>", ', r"field config\.eos_token_ids: expected int"),
        ("num_kv_heads = 8", "num_kv_heads = 7", "KV heads"),
        ('name = "llama-8b"', 'name = "llama-9b"', "calls itself 'llama-9b'"),
        ("[config]", "[config", "cannot read"),
    ],
)
def test_a_wrong_card_is_named_with_its_field(old: str, new: str, message: str, tmp_path: Path) -> None:
    _write_card(tmp_path, old, new)
    with pytest.raises(ConfigError, match=message) as caught:
        load_card("llama-8b", [tmp_path])
    assert "llama-8b.toml" in caught.value.message


def test_numbers_of_a_card_become_floats(tmp_path: Path) -> None:
    _write_card(tmp_path, "rope_theta = 500000.0", "rope_theta = 500000")
    theta = load_card("llama-8b", [tmp_path]).config.rope_theta
    assert isinstance(theta, float)
    assert theta == 500000.0


def test_cards_of_the_user_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kunserve" / "models"
    folder.mkdir(parents=True)
    _write_card(folder, 'licence = "', 'licence = "mine: ')
    (folder / "mine.toml").write_text(
        (CARDS / "llama-8b.toml").read_text().replace('name = "llama-8b"', 'name = "mine"')
    )
    monkeypatch.delenv("KUNSERVE_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert list_cards() == sorted([*NUM_PARAMETERS, "mine"])
    assert load_card("llama-8b").licence.startswith("mine: ") and not load_card("llama-70b").licence.startswith(
        "mine: "
    )
    files = resolve_model("mine", load_format="dummy")
    assert (files.name, files.config) == ("mine", load_card("llama-8b").config)
    monkeypatch.setenv("KUNSERVE_CONFIG", str(tmp_path / "elsewhere"))
    assert list_cards() == sorted(NUM_PARAMETERS)


def test_dummy_weights_need_no_files() -> None:
    files = resolve_model("llama-70b", load_format="dummy")
    assert files.folder is None
    assert files.config.num_layers == 80
    assert files.card is not None
    assert files.card.name == files.name == "llama-70b"


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_local_folder(load_format: str, tmp_path: Path) -> None:
    folder = make_tiny_model("qwen2", tmp_path / "My-Model")
    files = resolve_model(str(folder), load_format=load_format)
    assert (files.name, files.folder, files.card) == ("My-Model", folder, None)
    assert files.config == load_hf_config(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lama-70b", "did you mean 'llama-70b'"),
        ("zzzzzz", "known are: llama-70b, llama-8b"),
        ("./llama-8b", "no such folder"),
        ("/does/not/exist", "no such folder"),
        (__file__, "is a file"),
    ],
)
def test_unknown_names_end_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_model(name)
    assert "\n" not in caught.value.message
    with pytest.raises(ConfigError, match="did you mean 'dummy'"):
        resolve_model("llama-8b", load_format="dumy")


def test_a_card_and_a_hub_id_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_model("llama", tmp_path)
    asked, lines = [], []

    def hub_folder(hub_id: str, progress: Progress) -> Path:
        asked.append(hub_id)
        progress("downloading", 0.5)
        return tmp_path

    monkeypatch.setattr("kunserve.model.hub.hub_folder", hub_folder)
    files = resolve_model("somebody/tiny-model", progress=lambda text, share: lines.append((text, share)))
    assert (files.name, files.folder) == ("somebody/tiny-model", tmp_path)
    files = resolve_model("llama-8b")
    assert (files.name, files.folder, files.config.num_layers) == ("llama-8b", tmp_path, 3)
    assert asked == ["somebody/tiny-model", "meta-llama/Llama-3.1-8B-Instruct"]
    assert lines == [("downloading", 0.5)]


def test_a_card_whose_weights_cannot_be_had_can_be_tried_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def hub_folder(hub_id: str, progress: Progress) -> Path:
        raise ConfigError(f"{hub_id} is gated")

    monkeypatch.setattr("kunserve.model.hub.hub_folder", hub_folder)
    with pytest.raises(ConfigError, match=r"^llama-8b: meta-llama/.* is gated, or try it with --load-format dummy$"):
        resolve_model("llama-8b")
    with pytest.raises(ConfigError, match=r"^somebody/tiny is gated$"):
        resolve_model("somebody/tiny")


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUNSERVE_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("KUNSERVE_CACHE")
    assert cache_root() == Path.home() / ".cache" / "kunserve"
