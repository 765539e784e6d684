"""Quantized checkpoints in safetensors: every published layout, written out by hand, is read as what it stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_quantized import CHECKPOINTS, write_tiny_quantized

from kunserve.errors import ConfigError
from kunserve.model.card import check_model
from kunserve.model.checkpoint import QuantizedSource, open_weights
from kunserve.model.hf_config import load_hf_config
from kunserve.model.layout import weight_units
from kunserve.model.quant.linear import Part


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
                assert torch.equal(Part(stored, spec.blocks).dense(), numbers), spec.name
                kept.add(spec.blocks.name)
    name = CHECKPOINTS[kind][2]
    assert kept == ({name} if name else set())


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
