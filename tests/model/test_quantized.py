"""Quantized checkpoints in safetensors: every published layout, written out by hand, is read as what it stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_quantized import CHECKPOINTS, write_tiny_mxfp4, write_tiny_quantized
from torch import Tensor

from kunserve.errors import ConfigError
from kunserve.model.card import check_model
from kunserve.model.checkpoint import QuantizedSource, open_weights
from kunserve.model.hf_config import load_hf_config
from kunserve.model.layout import weight_units
from kunserve.model.quant.linear import StoredRows


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_matrix_is_what_it_stands_for_as_numbers_and_as_blocks(kind: str, family: str, tmp_path: Path) -> None:
    folder = write_tiny_quantized(kind, tmp_path, family)
    check_model(str(folder))
    config, expected = load_hf_config(folder), load_file(tmp_path / "dequantized" / "model.safetensors")
    source = open_weights(folder, config, "auto")
    assert isinstance(source, QuantizedSource) and source.num_bytes > 0
    kept = set()
    for unit in weight_units(config, "float32"):
        for spec in unit.tensors:
            numbers = torch.empty(spec.shape)
            source.copy_into(spec.name, numbers)
            assert torch.equal(numbers, expected[spec.name]), spec.name
            if spec.blocks is not None:
                stored = torch.empty(spec.stored_shape, dtype=torch.uint8)
                source.copy_into(spec.name, stored)
                assert torch.equal(StoredRows(stored, spec.blocks).dense(), numbers), spec.name
                kept.add(spec.blocks.name)
    name = CHECKPOINTS[kind][2]
    assert kept == ({name} if name else set())


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("qwen3-moe", {"moe_intermediate_size": 128}), ("mixtral", {"intermediate_size": 128})],
)
@pytest.mark.parametrize("kind", ["awq", "fp8 of blocks", "gptq act-order"])
def test_experts_are_kept_as_they_are_stored(kind: str, family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    folder = write_tiny_quantized(kind, tmp_path, family, **overrides)
    config, expected = load_hf_config(folder), load_file(tmp_path / "dequantized" / "model.safetensors")
    source, num_kept = open_weights(folder, config, "auto"), 0
    for spec in (spec for unit in weight_units(config, "float32") for spec in unit.tensors):
        numbers = torch.empty(spec.shape)
        source.copy_into(spec.name, numbers)
        assert torch.equal(numbers, expected[spec.name]), spec.name
        num_kept += ".experts." in spec.name and spec.blocks is not None
    num_layers = 3 if family == "mixtral" else 2
    assert num_kept == (0 if kind == "gptq act-order" else num_layers * 8 * 3)


def test_experts_that_are_not_stored_alike_are_numbers(tmp_path: Path) -> None:
    """One operation reads all of a kind: of layer 1, `down` of one expert is not quantized."""
    of = "model.layers.1.block_sparse_moe.experts"
    folder = write_tiny_quantized("awq", tmp_path, "mixtral", f"{of}.3.w2", intermediate_size=128)
    config, expected = load_hf_config(folder), load_file(tmp_path / "dequantized" / "model.safetensors")
    assert config.formats.of(f"{of}.2.w1.weight") and config.formats.of(f"{of.replace('1', '2')}.3.w2.weight")
    source = open_weights(folder, config, "auto")
    for expert in range(8):
        name, out = f"{of}.{expert}.w2.weight", torch.empty(256, 128)
        assert config.formats.of(name) is None
        source.copy_into(name, out)
        assert torch.equal(out, expected[name])


def test_mxfp4_is_what_transformers_makes_of_it_as_numbers_and_as_blocks(tmp_path: Path) -> None:
    folder = write_tiny_mxfp4(tmp_path)
    check_model(str(folder))
    config, plain = load_hf_config(folder), load_hf_config(tmp_path / "dequantized")
    source, reference = open_weights(folder, config, "auto"), open_weights(tmp_path / "dequantized", plain, "auto")
    kept = []
    for spec in (spec for unit in weight_units(config, "float32") for spec in unit.tensors):
        numbers, expected = torch.empty(spec.shape), torch.empty(spec.shape)
        source.copy_into(spec.name, numbers)
        reference.copy_into(spec.name, expected)
        assert torch.equal(numbers, expected), spec.name
        if spec.blocks is not None:
            stored = torch.empty(spec.stored_shape, dtype=torch.uint8)
            source.copy_into(spec.name, stored)
            assert torch.equal(StoredRows(stored.flatten(0, 1), spec.blocks).dense(), expected.flatten(0, 1))
            assert spec.blocks.name == "MXFP4" and stored.nbytes * 32 == 17 * expected.numel()
            kept.append(spec.name.rpartition(".")[2])
    assert sorted(kept) == ["down_proj"] * 3 + ["gate_up_proj"] * 3


Damage = Callable[[Tensor], Tensor | None]  # of a tensor of a file; None: it is left out


@pytest.mark.parametrize(
    ("ending", "damage", "message"),
    [
        ("_blocks", lambda tensor: None, "_blocks"),
        ("_scales", lambda tensor: None, "_scales"),
        ("_blocks", lambda tensor: tensor[..., :8], "_blocks has shape"),
        ("_scales", lambda tensor: tensor[:, :-1], "_scales has shape"),
        ("_blocks", lambda tensor: tensor.float(), "_blocks is float32, not uint8"),
        ("_scales", lambda tensor: torch.full_like(tensor, 255), "_scales holds 255, which stands for no number"),
    ],
)
def test_damaged_mxfp4_is_named(ending: str, damage: Damage, message: str, tmp_path: Path) -> None:
    folder, name = write_tiny_mxfp4(tmp_path), "model.layers.1.mlp.experts.gate_up_proj"
    path, config = folder / "model.safetensors", load_hf_config(folder)
    tensors = load_file(path)
    damaged = damage(tensors.pop(name + ending))
    save_file(tensors if damaged is None else tensors | {name + ending: damaged.contiguous()}, path)
    with pytest.raises(ConfigError, match=rf"{name}{message}") as error:
        QuantizedSource(folder, config).copy_into(name, torch.empty(8, 192, 34, dtype=torch.uint8))
    assert "\n" not in error.value.message


def test_a_cut_file_of_mxfp4_is_named(tmp_path: Path) -> None:
    folder = write_tiny_mxfp4(tmp_path)
    path, config = folder / "model.safetensors", load_hf_config(folder)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"cannot read .*model\.safetensors: .*(damaged|complete)"):
        QuantizedSource(folder, config)


def test_experts_that_a_checkpoint_of_mxfp4_names_are_numbers(tmp_path: Path) -> None:
    folder = write_tiny_mxfp4(tmp_path)
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"]["modules_to_not_convert"] = ["model.layers.*.mlp.experts"]
    (folder / "config.json").write_text(json.dumps(values))
    assert not load_hf_config(folder).formats.by_name


def test_matrices_that_are_not_quantized_are_numbers(tmp_path: Path) -> None:
    config = load_hf_config(write_tiny_quantized("awq", tmp_path, skipped="down_proj"))
    source, expected = QuantizedSource(tmp_path / "quantized", config), tmp_path / "dequantized"
    name = "model.layers.1.mlp.down_proj.weight"
    out = torch.empty(256, 384)
    source.copy_into(name, out)
    assert torch.equal(out, load_file(expected / "model.safetensors")[name])
    assert config.formats.of(name) is None and config.formats.of(name.replace("down", "up")) is not None


def test_the_decoder_of_a_model_that_also_sees_is_found_under_its_longer_names(tmp_path: Path) -> None:
    """As of Gemma 3: what is quantized has them too."""
    folder = write_tiny_quantized("awq", tmp_path)
    path, config = folder / "model.safetensors", load_hf_config(folder)
    name, short, long = "model.layers.1.mlp.down_proj.weight", torch.empty(256, 384), torch.empty(256, 384)
    QuantizedSource(folder, config).copy_into(name, short)
    save_file({f"language_model.{other}": tensor for other, tensor in load_file(path).items()}, path)
    QuantizedSource(folder, config).copy_into(name, long)
    assert torch.equal(short, long) and short.count_nonzero()


@pytest.mark.parametrize("kind", ["awq", "gptq", "w4a16", "compressed fp8", "fp8 of blocks"])
def test_what_is_missing_or_of_another_shape_is_named(kind: str, tmp_path: Path) -> None:
    folder = write_tiny_quantized(kind, tmp_path)
    path, config = folder / "model.safetensors", load_hf_config(folder)
    whole = load_file(path)
    prefix, out = "model.layers.0.mlp.up_proj.", torch.empty(384, 256)
    for name in sorted(name for name in whole if name.startswith(prefix)):
        ending = name.removeprefix(prefix)
        if ending in ("input_scale", "g_idx", "weight_shape"):
            continue
        save_file({other: tensor for other, tensor in whole.items() if other != name}, path)
        with pytest.raises(ConfigError, match=rf"{prefix}{ending}") as error:
            QuantizedSource(folder, config).copy_into(f"{prefix}weight", out)
        assert "\n" not in error.value.message
        save_file(whole | {name: torch.cat([whole[name], whole[name]]).contiguous()}, path)
        with pytest.raises(ConfigError, match=rf"{prefix}{ending} has shape"):
            QuantizedSource(folder, config).copy_into(f"{prefix}weight", out)


def test_another_method_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = write_tiny_quantized("gptq", tmp_path)
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] |= {"bits": 3}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"config\.json: field quantization_config: weights of 3 bits are not served"):
        check_model(str(folder))
