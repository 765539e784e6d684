"""Matrices in planes, as GPUs keep them, stand for the same numbers as in blocks, whatever file they come from."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from tiny_gguf import write_tiny_gguf
from tiny_quantized import CHECKPOINTS, write_tiny_quantized
from torch import Tensor

from kunserve.errors import ConfigError
from kunserve.model.checkpoint import WeightSource, open_weights
from kunserve.model.config import ModelConfig
from kunserve.model.gguf.file import read_gguf
from kunserve.model.gguf.shape import gguf_config
from kunserve.model.gguf.source import GgufSource
from kunserve.model.hf_config import load_hf_config
from kunserve.model.layout import weight_units
from kunserve.model.quant.linear import Linear, StoredRows
from kunserve.model.quant.plane_codes import scales_plane
from kunserve.model.quant.planes import OF_GGML, SCALES, Planes


def in_planes(config: ModelConfig) -> ModelConfig:
    return replace(config, formats=config.formats.as_planes())


def stored(config: ModelConfig, source: WeightSource) -> dict[str, StoredRows]:
    """Read all matrices that are in planes; each must be what its numbers are."""
    parts = {}
    specs = {spec.name: spec for unit in weight_units(config, "float32") for spec in unit.tensors}
    for name, spec in specs.items():
        if not isinstance(spec.blocks, Planes):
            continue
        codes = torch.empty(spec.stored_shape, dtype=torch.uint8)
        scales = torch.empty(specs[name + SCALES].shape, dtype=getattr(torch, spec.blocks.scale_dtype))
        source.copy_into(name, codes)
        source.copy_into(name + SCALES, scales)
        again = torch.empty_like(scales)
        source.copy_into(name + SCALES, again)  # by itself, too
        assert torch.equal(scales, again)
        numbers = torch.empty(spec.shape)
        source.copy_into(name, numbers)
        parts[name] = StoredRows(codes, spec.blocks, scales)
        assert torch.equal(parts[name].dense(), numbers), name
        assert Linear((parts[name],)).shape == spec.shape
    return parts


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_in_planes_is_what_it_stands_for(kind: str, tmp_path: Path) -> None:
    folder = write_tiny_quantized(kind, tmp_path)
    config = load_hf_config(folder)
    parts = stored(in_planes(config), open_weights(folder, in_planes(config), "auto"))
    is_kept = CHECKPOINTS[kind][2] is not None and kind != "gptq 8 bits"  # which has groups of 32
    assert parts.keys() == (config.formats.by_name.keys() if is_kept else set())
    if kind in ("compressed fp8", "fp8", "w8a8", "gptq of rows"):  # one scale for a row
        assert {part.scales.shape[1] for part in parts.values() if part.scales is not None} <= {1, 2}


@pytest.mark.parametrize("kind", ["gptq", "w4a16"])
def test_the_last_group_of_a_row_may_be_a_part_of_one(kind: str, tmp_path: Path) -> None:
    """576 columns in groups of 128."""
    folder, name = write_tiny_quantized(kind, tmp_path, intermediate_size=576), "model.layers.1.mlp.down_proj.weight"
    config, expected = load_hf_config(folder), load_file(tmp_path / "dequantized" / "model.safetensors")[name]
    numbers = torch.empty(256, 576)
    open_weights(folder, config, "auto").copy_into(name, numbers)
    assert torch.equal(numbers, expected)
    blocks = config.formats.by_name[name]
    rows = torch.empty(256, 576 // blocks.num_values * blocks.num_bytes, dtype=torch.uint8)
    open_weights(folder, config, "auto").copy_into(name, rows)
    planes = stored(planar := in_planes(config), open_weights(folder, planar, "auto"))[name]
    assert torch.equal(StoredRows(rows, blocks).dense(), expected) and torch.equal(planes.dense(), expected)
    assert planes.scales is not None and planes.scales.shape == (256, 10)


@pytest.mark.parametrize(
    "kind", [kind for kind in Kind if kind.name in (*OF_GGML, "Q5_K", "F16")], ids=lambda k: k.name
)
def test_a_gguf_file_in_planes_is_what_it_stands_for(kind: Kind, tmp_path: Path) -> None:
    file = read_gguf(write_tiny_gguf(tmp_path, kind, intermediate_size=512, hidden_size=256, head_dim=64))
    config = gguf_config(file)
    planes = in_planes(config)
    parts = stored(planes, GgufSource(file, planes))
    if kind.name not in OF_GGML:
        assert config.formats.by_name and not parts
        return
    assert parts.keys() == config.formats.by_name.keys()
    for name, part in parts.items():
        rows = torch.tensor([3, 0, 3])
        assert torch.equal(Linear((part,)).rows(rows), part.dense()[rows]), name


def test_a_model_in_planes_takes_as_many_bytes_as_are_said(tmp_path: Path) -> None:
    config = load_hf_config(write_tiny_quantized("awq", tmp_path))
    layer = {unit.name: unit for unit in weight_units(in_planes(config), "bfloat16")}["layers.1"]
    specs = {spec.name.removeprefix("model.layers.1."): spec for spec in layer.tensors}
    o = specs["self_attn.o_proj.weight"]
    assert o.num_bytes == math.prod(o.shape) // 2
    assert specs["self_attn.o_proj.weight.scales"].num_bytes == math.prod(o.shape) // 64 * 8
    q, k, v = (specs[f"self_attn.{i}_proj.weight"] for i in "qkv")
    assert q.end == k.offset and k.end == v.offset  # one matrix
    scales = [specs[f"self_attn.{i}_proj.weight.scales"] for i in "qkv"]
    assert scales[0].end == scales[1].offset and scales[1].end == scales[2].offset
    ends = [spec.end for spec in layer.tensors]
    assert all(spec.offset >= end for spec, end in zip(layer.tensors[1:], ends, strict=False))
    assert layer.num_bytes == ends[-1]


def test_scales_that_16_bits_do_not_hold_are_refused() -> None:
    planes, scale = OF_GGML["Q8_0"], torch.tensor([[600.0]])
    with pytest.raises(ConfigError, match="has scales that float16 does not hold"):
        scales_plane(scale, -128 * scale, planes)
    kept: Tensor = scales_plane(scale / 2, -128 * scale / 2, planes)
    assert kept.tolist() == [[300.0, -38400.0]]


def test_a_file_with_such_scales_is_named(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path, Kind.Q8_0)
    name = "blk.0.ffn_down.weight"
    offset = next(t.data_offset for t in gguf.GGUFReader(path).tensors if t.name == name)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(torch.tensor([600.0]).half().numpy().tobytes())
    config = in_planes(gguf_config(read_gguf(path)))
    source, full = GgufSource(read_gguf(path), config), "model.layers.0.mlp.down_proj.weight"
    spec = next(s for unit in weight_units(config, "float32") for s in unit.tensors if s.name == full + SCALES)
    with pytest.raises(ConfigError, match=rf"{full} in .*tiny\.gguf has scales that float16 does not hold"):
        source.copy_into(full + SCALES, torch.empty(spec.shape, dtype=torch.float16))
