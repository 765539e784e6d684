import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny_model

from kunserve.errors import ConfigError
from kunserve.model.card import (
    CARDS,
    HUB_ID,
    cache_root,
    check_model,
    config_root,
    list_cards,
    load_card,
    resolve_model,
)
from kunserve.model.hf_config import load_hf_config, parse_hf_config, to_hf_config
from kunserve.model.layout import expected_shapes
from kunserve.progress import Progress

NUM_PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_248_023_552,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "gpt-oss-20b": 20_914_757_184,
    "gemma-3-12b": 11_766_034_176,
    "phi-4": 14_659_507_200,
}

# What the models' own config.json say, where they are of families that are not written (with the end tokens of their
# generation_config.json, and without what changes nothing).
GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
TEXT = {"hidden_size": 3840, "intermediate_size": 15360, "model_type": "gemma3_text", "num_attention_heads": 16}
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "bos_token_id": 151643, "eos_token_id": [151645, 151643],
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_window_layers": 48,
        "max_position_embeddings": 40960, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "decoder_sparse_step": 1,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "vocab_size": 32000,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "bos_token_id": 199998, "head_dim": 64,
        "eos_token_id": [200002, 199999, 200012], "hidden_act": "silu", "hidden_size": 2880, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "rms_norm_eps": 1e-5, "rope_scaling": GPT_OSS_ROPE, "rope_theta": 150000,
        "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False, "vocab_size": 201088,
        "torch_dtype": "bfloat16",
    },
    "gemma-3-12b": {
        "architectures": ["Gemma3ForConditionalGeneration"], "bos_token_id": 2, "eos_token_id": [1, 106],
        "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1152},
        "text_config": TEXT | {
            "num_hidden_layers": 48, "num_key_value_heads": 8, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    },
    "phi-4": {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "bos_token_id": 100257, "eos_token_id": 100265,
        "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 17920, "max_position_embeddings": 16384,
        "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10, "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 16384, "rope_scaling": None, "rope_theta": 250000, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 100352,
    },
}  # fmt: skip


def test_there_is_a_card_for_each() -> None:
    assert list_cards() == sorted(NUM_PARAMETERS)


@pytest.mark.parametrize("name", sorted(NUM_PARAMETERS))
def test_a_card_gives_the_full_shape(name: str) -> None:
    card = load_card(name)
    assert sum(map(prod, expected_shapes(card.config).values())) == NUM_PARAMETERS[name]
    assert parse_hf_config(PUBLISHED.get(name) or to_hf_config(card.config)) == card.config
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
        ("licence =", '"a\\nb" =', r"unknown field 'a\\nb'"),
        ("num_kv_heads = 8", "num_kv_heads = 0", "field num_kv_heads: expected a positive number"),
        ("num_layers = 32", "num_layers = 1000000000", "field num_layers: expected a positive number up to 2000"),
        (
            "rope_theta = 500000.0",
            f"rope_theta = 1{'0' * 400}",
            "field rope_theta: expected a number above 1 and up to",
        ),
        ("factor = 8.0", "factor = nan", "field factor: expected a positive number"),
        ("max_model_len = 32768", "max_model_len = 0", r"field defaults\.max_model_len: expected a positive number"),
        ("[config]", f"deep = {'[' * 100_000}\n[config]", "nested too deeply"),
        ('name = "llama-8b"', 'name = "llama-8b\\n"', r"calls itself 'llama-8b\\n'"),
        ('name = "llama-8b"', 'name = "llama-9b"', "calls itself 'llama-9b'"),
        ("[config]", "[config", "cannot read"),
    ],
)
def test_a_wrong_card_is_named_with_its_field(old: str, new: str, message: str, tmp_path: Path) -> None:
    _write_card(tmp_path, old, new)
    with pytest.raises(ConfigError, match=message) as caught:
        load_card("llama-8b", [tmp_path])
    assert "llama-8b.toml" in caught.value.message and "\n" not in caught.value.message


def test_a_card_that_is_a_folder_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").mkdir()
    with pytest.raises(ConfigError) as caught:
        load_card("mine", [tmp_path])
    assert caught.value.message == f"cannot read {tmp_path / 'mine.toml'}: Is a directory"


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
        ("zzzzzz", "known are: gemma-3-12b, gpt-oss-20b"),
        ("./llama-8b", "no such folder"),
        ("/does/not/exist", "no such folder"),
        (__file__, "is a file"),
        ("a" * 300, "^cannot read a+: File name too long$"),
        (f"/{'a' * 300}/b", "^cannot read .*: File name too long$"),
        ("~nosuchuser/model", "^--model ~nosuchuser/model: no home folder of ~nosuchuser is known; give the whole"),
        ("a\nb", r"^--model 'a\\nb': the name holds a character that cannot be printed$"),
        ("a\0b", r"cannot be printed$"),
        ("\udcff", r"cannot be printed$"),
        (f"x/{'a' * 97}", "no such folder, and the Hub has no names like this"),
        ("x/a..b", "the Hub has no names"),
    ],
)
def test_unknown_names_end_in_one_line(name: str, message: str) -> None:
    for judge in (check_model, resolve_model):
        with pytest.raises(ConfigError, match=message) as caught:
            judge(name)
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

    monkeypatch.setattr("kunserve.model.hub.snapshot.hub_folder", hub_folder)
    files = resolve_model("somebody/tiny-model", progress=lambda text, share: lines.append((text, share)))
    assert (files.name, files.folder) == ("somebody/tiny-model", tmp_path)
    files = resolve_model("llama-8b")
    assert (files.name, files.folder, files.config.num_layers) == ("llama-8b", tmp_path, 3)
    assert asked == ["somebody/tiny-model", "meta-llama/Llama-3.1-8B-Instruct"]
    assert lines == [("downloading", 0.5)]


def test_a_card_whose_weights_cannot_be_had_can_be_tried_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def hub_folder(hub_id: str, progress: Progress) -> Path:
        raise ConfigError(f"{hub_id} is gated")

    monkeypatch.setattr("kunserve.model.hub.snapshot.hub_folder", hub_folder)
    with pytest.raises(ConfigError, match=r"^llama-8b: meta-llama/.* is gated, or try it with --load-format dummy$"):
        resolve_model("llama-8b")
    with pytest.raises(ConfigError, match=r"^somebody/tiny is gated$"):
        resolve_model("somebody/tiny")


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUNSERVE_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("KUNSERVE_CACHE")
    assert cache_root() == Path.home() / ".cache" / "kunserve"


@pytest.mark.parametrize(("variable", "root"), [("KUNSERVE_CONFIG", config_root), ("KUNSERVE_CACHE", cache_root)])
def test_a_home_that_nobody_has_is_named_with_its_variable(
    variable: str, root: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "~nosuchuser/x")
    with pytest.raises(ConfigError, match=f"^{variable} ~nosuchuser/x: no home folder of ~nosuchuser is known; give"):
        root()


@pytest.mark.parametrize(
    "name",
    [
        *("a/b", "a-b/c.d_e", "A/b1", "x/" + "a" * 96, "x/" + "a" * 97, "a" * 96 + "/x", "a" * 97 + "/x", "a/b.git"),
        *("a--b/c", "a/b..c", "-a/b", "a-/b", "a/-b", "a/b.", ".a/b", "a/_b", "a/b c", "a/b/c", "a/b\n", "a/", "/b"),
        *("a/git", "é/b", "a/b-c--d"),
    ],
)
def test_the_hubs_own_library_knows_the_same_names(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        is_right = True
    except HFValidationError:
        is_right = False
    assert (HUB_ID.fullmatch(name) is not None) == is_right


@contextmanager
def another_user() -> Iterator[None]:
    """Root may read everything: become nobody. Whoever else runs the tests is kept out by the rights of its files."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def refusal(name: Path) -> str:
    with another_user(), pytest.raises(ConfigError) as caught:
        check_model(str(name))
    return caught.value.message


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder with a card and a model in places that any user may reach: pytest's own are their owner's alone."""
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        home = Path(top) / "home"
        for path in make_tiny_model("llama", home / "model").iterdir():
            path.chmod(0o644)
        (home / "models").mkdir()
        _write_card(home / "models", "[config]", "[config]")
        yield home
        for path in (home, home / "model"):
            path.chmod(0o755)


def test_cards_of_a_home_that_cannot_be_read_are_left_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUNSERVE_CONFIG", str(home))
    assert load_card("llama-8b").licence
    home.chmod(0)
    with another_user():
        assert list_cards() == sorted(NUM_PARAMETERS)
        check_model("smollm2-135m")


@pytest.mark.parametrize("inside", ["model", "none", "none/deeper"])
def test_a_model_below_a_folder_that_cannot_be_read_is_one_line(home: Path, inside: str) -> None:
    home.chmod(0o600)
    assert refusal(home / inside) == f"cannot read {home / inside}: Permission denied"


@pytest.mark.parametrize("part", ["", "config.json", "model.safetensors", "tokenizer.json"])
def test_a_part_of_a_model_that_cannot_be_read_is_named(home: Path, part: str) -> None:
    path = home / "model" / part
    path.chmod(0)
    assert refusal(home / "model") == f"cannot read {path}: Permission denied"


def test_a_folder_that_cannot_be_listed_is_named_if_it_lacks_weights(home: Path) -> None:
    folder = home / "model"
    folder.chmod(0o311)
    with another_user():
        check_model(str(folder))
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == f"cannot read {folder}: Permission denied"
