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


@pytest.mark.parametrize(
    "said",
    [
        {"modules_to_not_convert": ["down_proj"]},
        {"dynamic": {r"-:.*\.down_proj": {}}},
        {"dynamic": {r"+:.*\.mlp\.up_proj": {"bits": 4}, r"-:model\.layers\.\d\.mlp\.(down|up)_proj$": {}}},
    ],
)
def test_what_gptq_leaves_out_is_read_as_numbers(said: dict[str, Any], tmp_path: Path) -> None:
    folder = write_tiny_quantized("gptq", tmp_path, skipped="down_proj")
    configure(folder, {"modules_to_not_convert": None} | said)
    config, name = load_hf_config(folder), "model.layers.1.mlp.down_proj.weight"
    source, out = QuantizedSource(folder, config), torch.empty(256, 384)
    source.copy_into(name, out)
    assert torch.equal(out, load_file(tmp_path / "dequantized" / "model.safetensors")[name])
    source.copy_into(f"{UP}weight", torch.empty(UP_SHAPE))
    assert config.formats.of(name) is None and config.formats.of(f"{UP}weight") is not None


@pytest.mark.parametrize(
    ("ignored", "targets"),
    [
        (["lm_head", r"re:.*mlp\.down_proj$"], ["Linear"]),
        ([f"model.layers.{i}.mlp.down_proj" for i in range(3)], ["Linear"]),
        ([], [r"re:.*\.(q|k|v|o|gate|up)_proj$"]),
        ([r"re:language_model\.model\.layers\.\d\.mlp\.down_proj$"], ["Linear"]),
        ([f"model.language_model.layers.{i}.mlp.down_proj" for i in range(3)], ["Linear"]),
        (
            ["re:.*down.*"],
            ["re:.*self_attn.*", *(f"model.layers.{i}.mlp.{n}_proj" for n in ("gate", "up") for i in range(3))],
        ),
    ],
)
def test_what_compressed_tensors_ignore_is_read_as_numbers(
    ignored: list[str], targets: list[str], tmp_path: Path
) -> None:
    folder = write_tiny_quantized("w4a16", tmp_path, skipped="down_proj")
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    groups["group_0"]["targets"] = targets
    configure(folder, {"modules_to_not_convert": None, "ignore": ignored, "config_groups": groups})
    config, expected = load_hf_config(folder), load_file(tmp_path / "dequantized" / "model.safetensors")
    source = QuantizedSource(folder, config)
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        out = torch.empty(expected[full := f"model.layers.1.{name}.weight"].shape)
        source.copy_into(full, out)
        assert torch.equal(out, expected[full])
        assert (config.formats.of(full) is None) == ("down" in name)


def test_an_expression_that_is_none_is_named(tmp_path: Path) -> None:
    folder = write_tiny_quantized("w4a16", tmp_path)
    configure(folder, {"ignore": ["re:*down"]})
    with pytest.raises(ConfigError, match=r"field ignore or targets: '-:\*down' is no expression") as error:
        load_hf_config(folder)
    assert "\n" not in error.value.message


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


UP, UP_SHAPE = "model.layers.0.mlp.up_proj.", (384, 256)


def put(*places: tuple[int, float]) -> Damage:
    """Write numbers at places of a tensor, as it lies; codes of 8 bits are written as they are."""

    def damage(tensor: Tensor) -> Tensor:
        flat = (tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor).flatten().clone()
        for place, value in places:
            flat[place] = value
        return flat.view(tensor.dtype).view(tensor.shape)

    return damage


@pytest.mark.parametrize(
    ("kind", "ending", "damage", "message"),
    [
        ("gptq", "g_idx", lambda tensor: tensor.flip(0), "g_idx has the columns in another order"),
        ("gptq", "g_idx", put((0, -1)), "g_idx holds -1, which is none of the 2 groups"),
        ("gptq act-order", "g_idx", put((3, -1)), "g_idx holds -1, which is none of the 2 groups"),
        ("gptq act-order", "g_idx", put((3, 2)), "g_idx holds 2, which is none of the 2 groups"),
        ("gptq act-order", "g_idx", lambda tensor: tensor.float(), "g_idx is float32, not int32 or int64"),
        ("gptq act-order", "g_idx", lambda tensor: None, "g_idx is missing"),
        ("gptq", "qweight", lambda tensor: tensor.float(), "qweight is float32, not int32"),
        ("gptq", "qzeros", lambda tensor: tensor.to(torch.int16), "qzeros is int16, not int32"),
        ("awq", "qweight", lambda tensor: tensor.long(), "qweight is int64, not int32"),
        ("awq", "scales", lambda tensor: tensor.view(torch.int16), "scales is int16, not float16"),
        ("awq", "scales", put((5, float("nan"))), "scales holds NaN or infinity"),
        ("w4a16", "weight_packed", lambda tensor: tensor.float(), "weight_packed is float32, not int32"),
        ("w4a16", "weight_scale", lambda tensor: tensor.T, r"weight_scale has shape \[2, 384\], not \[384, 2\]"),
        ("w4a16", "weight_scale", lambda tensor: tensor.flatten(), r"weight_scale has shape \[768\], not"),
        ("w4a16", "weight_scale", put((5, float("inf"))), "weight_scale holds NaN or infinity"),
        ("w8a8", "weight", lambda tensor: tensor.bfloat16(), "weight is bfloat16, not int8"),
        ("w8a8", "weight_scale", lambda tensor: tensor.T, r"weight_scale has shape \[1, 384\], not \[384, 1\]"),
        ("fp8", "weight_scale", lambda tensor: tensor.to(torch.uint8), "weight_scale is uint8, not float16"),
        ("fp8 of blocks", "weight_scale_inv", lambda tensor: tensor.to(torch.uint8), "weight_scale_inv is uint8"),
        ("fp8", "weight", put((300, 0x7F)), "weight holds NaN"),
        ("compressed fp8", "weight", put((300, 0xFF)), "weight holds NaN"),
        ("fp8 of blocks", "weight", put((300, 0xFF)), "weight holds NaN"),
    ],
)
def test_what_would_be_read_as_other_numbers_is_named(
    kind: str, ending: str, damage: Damage, message: str, tmp_path: Path
) -> None:
    folder = write_tiny_quantized(kind, tmp_path)
    config, tensors = load_hf_config(folder), load_file(folder / "model.safetensors")
    damaged = damage(tensors.pop(UP + ending))
    tensors |= {} if damaged is None else {UP + ending: damaged.contiguous()}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"^{UP}{message}.*: (fetch the model again|say so in)") as error:
        QuantizedSource(folder, config).copy_into(f"{UP}weight", torch.empty(UP_SHAPE))
    assert "\n" not in error.value.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_rows_may_lie_in_one_dimension_and_in_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    folder, out, expected = write_tiny_quantized("w8a8", tmp_path), torch.empty(UP_SHAPE), torch.empty(UP_SHAPE)
    path, config = folder / "model.safetensors", load_hf_config(folder)
    QuantizedSource(folder, config).copy_into(f"{UP}weight", expected)
    tensors = load_file(path)
    save_file(tensors | {f"{UP}weight_scale": tensors[f"{UP}weight_scale"].flatten().to(dtype)}, path)
    QuantizedSource(folder, config).copy_into(f"{UP}weight", out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", ["awq", "gptq", "w4a16", "w8a8", "compressed fp8", "fp8 of blocks"])
def test_a_config_of_another_size_is_refused(kind: str, tmp_path: Path) -> None:
    folder, path = write_tiny_quantized(kind, tmp_path), tmp_path / "quantized" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 388}))
    source = QuantizedSource(folder, load_hf_config(folder))
    for name, shape in ((f"{UP}weight", (388, 256)), ("model.layers.0.mlp.down_proj.weight", (256, 388))):
        with pytest.raises(ConfigError, match=rf"^{name.removesuffix('weight')}.*: fetch the model again") as error:
            source.copy_into(name, torch.empty(shape))
        assert "\n" not in error.value.message


def test_a_group_may_be_longer_than_a_row(tmp_path: Path) -> None:
    folder = write_tiny_quantized("compressed fp8", tmp_path)
    path, tensors = folder / "model.safetensors", load_file(folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    values["group_0"]["weights"] |= {"strategy": "group", "group_size": 512}
    configure(folder, {"config_groups": values})
    save_file(tensors | {f"{UP}weight_scale": torch.tensor([0.5])}, path)
    source, out = QuantizedSource(folder, config := load_hf_config(folder)), torch.empty(UP_SHAPE)
    source.copy_into(f"{UP}weight", out)
    assert torch.equal(out, tensors[f"{UP}weight"].float() * 0.5)
    blocks = config.formats.by_name[f"{UP}weight"]
    stored = torch.empty(384, 256 // blocks.num_values * blocks.num_bytes, dtype=torch.uint8)
    source.copy_into(f"{UP}weight", stored)
    assert torch.equal(StoredRows(stored, blocks).dense(), out)


def configure(folder: Path, change: dict[str, Any]) -> None:
    """Change what a checkpoint's config says of its quantization; None: it does not say it."""
    values = json.loads((folder / "config.json").read_text())
    merged = values["quantization_config"] | change
    values["quantization_config"] = {field: value for field, value in merged.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))


def weights(kind: str, **change: Any) -> dict[str, Any]:
    """Return the groups of a compressed checkpoint with other fields of its weights."""
    group: dict[str, Any] = CHECKPOINTS[kind][0]["config_groups"]["group_0"]
    return {"config_groups": {"group_0": group | {"weights": group["weights"] | change}}}


@pytest.mark.parametrize("said", [{"desc_act": None}, {"desc_act": False}, {"dynamic": {"+:.*": {"desc_act": True}}}])
def test_an_order_of_columns_that_the_config_does_not_say_is_refused(said: dict[str, Any], tmp_path: Path) -> None:
    folder = write_tiny_quantized("gptq act-order", tmp_path)
    configure(folder, {"desc_act": False} | said)
    config = load_hf_config(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    blocks = torch.empty(384, config.formats.by_name[name].num_bytes * 2, dtype=torch.uint8)
    for out in (torch.empty(UP_SHAPE), blocks):
        with pytest.raises(ConfigError, match=rf"^{UP}g_idx has .* desc_act does not say: say so in the"):
            QuantizedSource(folder, config).copy_into(name, out)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gptq", {"desc_act": "true"}, "field desc_act: expected true or false, not 'true'"),
        ("w4a16", {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, ".* transform_config .*take"),
        (
            "w4a16",
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            ".* stored as 'sparse-24-bitmask' are not served",
        ),
        ("w4a16", weights("w4a16", type="float"), "compressed-tensors of format pack-quantized with type 'float'"),
        ("compressed fp8", weights("compressed fp8", type="int"), ".* of format float-quantized with type 'int'"),
        ("compressed fp8", weights("compressed fp8", num_bits=4), "weights of 4 bits are not served, only of 8"),
        ("w8a8", weights("w8a8", type="float"), "compressed-tensors of format int-quantized with type 'float'"),
        ("gptq", {"dynamic": {"-:(": {}}}, r"field dynamic: '-:\(' is no expression"),
        ("w4a16", {"transform_config": [1]}, "field transform_config: expected an object"),
    ],
)
def test_what_a_config_says_otherwise_is_refused(
    kind: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_tiny_quantized(kind, tmp_path)
    configure(folder, change)
    with pytest.raises(ConfigError, match=rf"config\.json: field quantization_config: {message}") as error:
        check_model(str(folder))
    assert "\n" not in error.value.message


def test_no_rotations_and_no_sparsity_are_none(tmp_path: Path) -> None:
    folder = write_tiny_quantized("w4a16", tmp_path)
    empty: list[dict[str, Any]] = [{}, {"config_groups": {}}]
    for none in empty:
        configure(folder, {"transform_config": none, "sparsity_config": none | {"format": "dense"}})
        check_model(str(folder))
    configure(folder, {"sparsity_config": {}, **weights("w4a16", type="int")})
    check_model(str(folder))


def test_another_method_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = write_tiny_quantized("gptq", tmp_path)
    configure(folder, {"bits": 3})
    with pytest.raises(ConfigError, match=r"config\.json: field quantization_config: weights of 3 bits are not served"):
        check_model(str(folder))
