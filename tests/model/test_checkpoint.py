import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, make_tiny_model

from kunserve.errors import ConfigError
from kunserve.model.checkpoint import (
    DummySource,
    SafetensorsSource,
    open_weights,
    save_checkpoint,
)
from kunserve.model.config import ModelConfig
from kunserve.model.family.stored import stored_form
from kunserve.model.hf_config import load_hf_config
from kunserve.model.layout import expected_shapes

CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=50,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_position_embeddings=64,
    qkv_bias=True,
    qk_norm=True,
)


def _random_tensors(config: ModelConfig = CONFIG) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in expected_shapes(config).items()}


def _shard(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the single file by two shards and an index."""
    save_checkpoint(folder, CONFIG, tensors)
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_of_every_family(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = load_hf_config(make_tiny_model(family, tmp_path, dtype=dtype))
    saved = load_file(tmp_path / "model.safetensors")
    source = open_weights(tmp_path, config, "auto")
    assert config.dtype == str(dtype).removeprefix("torch.")
    assert set(expected_shapes(config)) == set(saved)
    for name, shape in expected_shapes(config).items():
        out = torch.empty(shape)
        source.copy_into(name, out)
        form = stored_form(name)
        assert torch.equal(out, (form.read(saved[name]) if form else saved[name]).float()), name


def test_shards(tmp_path: Path) -> None:
    tensors = _random_tensors()
    _shard(tmp_path, tensors)
    source = SafetensorsSource(tmp_path, CONFIG)
    for name, tensor in tensors.items():
        out = torch.empty_like(tensor)
        source.copy_into(name, out)
        assert torch.equal(out, tensor)


def test_several_threads_copy_at_once(tmp_path: Path) -> None:
    tensors = _random_tensors()
    save_checkpoint(tmp_path, CONFIG, tensors)
    source = SafetensorsSource(tmp_path, CONFIG)

    def copy(name: str) -> bool:
        out = torch.empty_like(tensors[name])
        source.copy_into(name, out)
        return torch.equal(out, tensors[name])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(copy, list(tensors) * 20))


def test_a_tied_model_needs_no_head_and_may_carry_one(tmp_path: Path) -> None:
    tied = replace(CONFIG, tie_embeddings=True)
    save_checkpoint(tmp_path, tied, _random_tensors(tied))
    SafetensorsSource(tmp_path, tied)
    with pytest.raises(ConfigError, match=r"lm_head\.weight"):
        SafetensorsSource(tmp_path, CONFIG)
    save_checkpoint(tmp_path, tied, _random_tensors(CONFIG))
    SafetensorsSource(tmp_path, tied)


def test_all_missing_tensors_are_reported_together(tmp_path: Path) -> None:
    tensors = _random_tensors()
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    save_checkpoint(tmp_path, CONFIG, tensors)
    message = r"lacks 2 of \d+ tensors: model.layers.1.mlp.up_proj.weight, model.norm.weight$"
    with pytest.raises(ConfigError, match=message):
        SafetensorsSource(tmp_path, CONFIG)


def test_wrong_shapes_and_dtypes_are_refused_when_opened(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    save_checkpoint(tmp_path, CONFIG, _random_tensors() | {name: torch.zeros(12, 9)})
    with pytest.raises(ConfigError, match=r"gate_proj.*\[12, 9\].*model\.safetensors, not \[12, 8\]"):
        SafetensorsSource(tmp_path, CONFIG)
    for dtype, code in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")):
        save_checkpoint(tmp_path, CONFIG, _random_tensors() | {name: torch.zeros(12, 8).to(dtype)})
        with pytest.raises(ConfigError, match=f"gate_proj.* is {code}"):
            SafetensorsSource(tmp_path, CONFIG)


def test_copying_checks_name_and_shape(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CONFIG, _random_tensors())
    for source in (SafetensorsSource(tmp_path, CONFIG), DummySource(CONFIG)):
        with pytest.raises(ConfigError, match=r"no tensor model\.nothing"):
            source.copy_into("model.nothing", torch.empty(1))
        with pytest.raises(ConfigError, match=r"model\.norm\.weight has shape \[8\]"):
            source.copy_into("model.norm.weight", torch.empty(8, 1))


def test_damaged_folders_end_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither"):
        SafetensorsSource(tmp_path, CONFIG)
    _shard(tmp_path, _random_tensors())
    (tmp_path / "b.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ConfigError, match=r"cannot read .*b\.safetensors"):
        SafetensorsSource(tmp_path, CONFIG)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ConfigError) as caught:
        SafetensorsSource(tmp_path, CONFIG)
    assert caught.value.message == f"cannot read {tmp_path / 'b.safetensors'}: No such file or directory"
    save_file({"other": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match=r"b\.safetensors holds"):
        SafetensorsSource(tmp_path, CONFIG)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="weight_map"):
        SafetensorsSource(tmp_path, CONFIG)


def test_dummy_weights_depend_on_seed_and_name_only() -> None:
    def fill(source: DummySource, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        out = torch.empty(expected_shapes(CONFIG)[name], dtype=dtype)
        source.copy_into(name, out)
        return out

    names = list(expected_shapes(CONFIG))
    first, again, other = DummySource(CONFIG, 1), DummySource(CONFIG, 1), DummySource(CONFIG, 2)
    expected = {name: fill(first, name) for name in names}
    for name in reversed(names):
        assert torch.equal(fill(again, name), expected[name])
        assert torch.equal(fill(again, name, torch.bfloat16), expected[name].bfloat16())
        assert not torch.equal(fill(other, name), expected[name])
    gate, up = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
    assert not torch.equal(expected[gate], expected[up])


def test_dummy_weights_look_like_weights() -> None:
    config = replace(CONFIG, vocab_size=300_000)  # larger than the pool of random numbers
    source = DummySource(config)
    for name, shape in expected_shapes(config).items():
        out = torch.full(shape, torch.nan)
        source.copy_into(name, out)
        mean, std = (1.0, 0.1) if name.endswith("norm.weight") else (0.0, 0.02)
        assert out.isfinite().all()
        assert (out - mean).abs().max() < 6 * std, name
        assert (out != mean).all(), name
    assert out.std().item() == pytest.approx(0.02, rel=0.01)
    assert len(torch.unique(out, dim=0)) == 300_000


def test_dummy_needs_no_folder_and_auto_does() -> None:
    assert isinstance(open_weights(None, CONFIG, "dummy", seed=3), DummySource)
    with pytest.raises(ConfigError, match="no folder"):
        open_weights(None, CONFIG, "auto")
