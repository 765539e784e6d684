"""`--quantization`: 8-bit matrices of a checkpoint of numbers, made while it loads; and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from tiny_gguf import write_tiny_gguf
from tiny_models import make_tiny_model
from tiny_quantized import write_tiny_mxfp4, write_tiny_quantized
from torch import Tensor

from kunserve.errors import ConfigError
from kunserve.model.card import check_model, quantized_as
from kunserve.model.checkpoint import QuantizingSource, open_weights
from kunserve.model.config import ModelConfig
from kunserve.model.hf_config import load_hf_config
from kunserve.model.layout import weight_units
from kunserve.model.quant.linear import StoredRows

# A number of e4m3 has 3 bits behind its first: it is rounded by 2**-4 of itself, and by 2**-10 below 2**-6.
RELATIVE, ABSOLUTE = 2.0**-4, 2.0**-10


def read(folder: Path, config: ModelConfig, load_format: str = "auto") -> dict[str, Tensor]:
    source, tensors = open_weights(folder, config, load_format), {}
    for spec in (spec for unit in weight_units(config, "float32") for spec in unit.tensors):
        tensors[spec.name] = torch.empty(spec.shape)
        source.copy_into(spec.name, tensors[spec.name])
        if spec.blocks is not None:
            stored = torch.empty(spec.stored_shape, dtype=torch.uint8)
            source.copy_into(spec.name, stored)
            numbers = StoredRows(stored.flatten(0, -2), spec.blocks).dense().view(spec.shape)
            assert torch.equal(numbers, tensors[spec.name]), spec.name
    return tensors


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2-moe", "mixtral", "gpt-oss"])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_matrices_are_rounded_to_e4m3_with_a_scale_for_each_output(
    family: str, load_format: str, tmp_path: Path
) -> None:
    folder = make_tiny_model(family, tmp_path, dtype=torch.bfloat16, moe_intermediate_size=32)
    plain = load_hf_config(folder)
    config = quantized_as(plain, "fp8")
    before, after = read(folder, plain, load_format), read(folder, config, load_format)
    assert isinstance(open_weights(folder, config, load_format), QuantizingSource)
    for name, numbers in before.items():
        is_left = any(part in name for part in ("embed", "lm_head", "norm", "bias", "router", "gate.weight", "sinks"))
        is_left |= "shared_expert_gate" in name or "shared_expert.down" in name  # of 40 columns
        assert (name in config.formats.quantized) == (not is_left), name
        if is_left:
            assert torch.equal(after[name], numbers)
            continue
        scale = numbers.abs().amax(-1, keepdim=True) / 448
        error, bound = (after[name] - numbers).abs(), torch.maximum(RELATIVE * numbers.abs(), ABSOLUTE * scale)
        assert (error <= bound * (1 + 1e-6)).all() and error.max() > 0, name
        torch.testing.assert_close(after[name].abs().amax(-1), numbers.abs().amax(-1), rtol=1e-6, atol=0)


def test_a_row_of_zeros_stays_one(tmp_path: Path) -> None:
    from kunserve.model.quant.pack import fp8_of

    numbers = torch.zeros(2, 32)
    numbers[1, 3] = -7.0
    assert torch.equal(fp8_of(numbers).numbers(), numbers)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_named(value: float, tmp_path: Path) -> None:
    name, folder = "model.layers.1.mlp.up_proj.weight", make_tiny_model("llama", tmp_path)
    config, tensors = quantized_as(load_hf_config(folder), "fp8"), load_file(folder / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"^{name} holds NaN or infinity, which cannot be quantized: fetch"):
        open_weights(folder, config, "auto").copy_into(name, torch.empty(tensors[name].shape))


def test_what_makes_no_sense_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    plain = make_tiny_model("llama", tmp_path / "plain")
    awq, mxfp4 = write_tiny_quantized("awq", tmp_path / "awq"), write_tiny_mxfp4(tmp_path / "mxfp4")
    w4a16, fp8 = (write_tiny_quantized(kind, tmp_path / kind) for kind in ("w4a16", "fp8"))
    (tmp_path / "gguf").mkdir()
    gguf = write_tiny_gguf(tmp_path / "gguf", Kind.Q8_0)
    for model, method, message in (
        (awq, "fp8", "the checkpoint is quantized with awq, which is served as it is; leave the flag out"),
        (w4a16, "fp8", "the checkpoint is quantized with compressed-tensors, which"),
        (mxfp4, "gptq", "the checkpoint is quantized with mxfp4, which"),
        (gguf, "fp8", "it is a GGUF file, which is served as it is"),
        (plain, "awq", "the checkpoint is not quantized; only fp8 is made while it loads"),
    ):
        with pytest.raises(ConfigError, match=rf"^--quantization {method}: {message}") as error:
            check_model(str(model), quantization=method)
        assert "\n" not in error.value.message
    for model, name in (
        *[(awq, "awq"), (awq, "awq_marlin"), (w4a16, "compressed-tensors"), (mxfp4, "mxfp4"), (gguf, "gguf")],
        *[(fp8, "fp8"), (plain, "fp8"), (plain, None)],
    ):
        check_model(str(model), quantization=name)
