"""Tiny quantized checkpoints in the layouts that are published, written out by hand, and what they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model
from torch import Tensor

from kunserve.sizes import ceil_div

SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "num_hidden_layers": 3}
Written = tuple[dict[str, Tensor], Tensor]  # tensors of a matrix by their endings, and the matrix they stand for
MATRICES = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
AWQ_PLACES = [0, 2, 4, 6, 1, 3, 5, 7]  # the column that each place of eight holds


def _random(name: str, *shape: int, high: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(len(name) + sum(shape)))


def _scales(N: int, G: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.rand(N, G, generator=torch.Generator().manual_seed(N + G)) * 0.02 + 0.01).to(dtype)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes along the last dimension in integers of 32 bits, the first lowest."""
    per = 32 // bits
    groups = codes.long().reshape(*codes.shape[:-1], -1, per)
    total = sum(groups[..., i] << (bits * i) for i in range(per))
    assert isinstance(total, Tensor)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def awq(name: str, N: int, K: int, group: int) -> Written:
    q, z, s = _random(name, N, K, high=16), _random(name, N, K // group, high=16), _scales(N, K // group)

    def columns(codes: Tensor) -> Tensor:  # (N, X) -> (X, N / 8)
        return _packed(codes.T.reshape(codes.shape[1], -1, 8)[..., AWQ_PLACES].flatten(1), 4)

    wide = [x.repeat_interleave(group, 1) for x in (z, s.float())]
    tensors = {"qweight": columns(q), "qzeros": columns(z), "scales": s.T.contiguous()}
    return tensors, (q - wide[0]) * wide[1]


def gptq(name: str, N: int, K: int, group: int, bits: int = 4, *, is_ordered: bool = True, shift: int = 1) -> Written:
    top = 1 << bits
    G = ceil_div(K, group)
    q, s = _random(name, N, K, high=top), _scales(N, G)
    z = _random(name, N, G, high=top - 1) + 1
    of = torch.arange(K) // group
    if not is_ordered:
        of = of[torch.randperm(K, generator=torch.Generator().manual_seed(K))]
    tensors = {
        "qweight": _packed(q.T.reshape(-1, 32 // bits, N).transpose(1, 2), bits)[..., 0],
        "qzeros": _packed((z - shift).T, bits),
        "scales": s.T.contiguous(),
        "g_idx": of.to(torch.int32),
    }
    return tensors, (q - z[:, of]) * s.float()[:, of]


def gptq_of_rows(name: str, N: int, K: int) -> Written:
    return gptq(name, N, K, K)


def pack_quantized(
    name: str, N: int, K: int, group: int, bits: int = 4, *, is_symmetric: bool = True, is_ordered: bool = True
) -> Written:
    half, G = 1 << (bits - 1), ceil_div(K, group)
    q, s = _random(name, N, K, high=2 * half) - half, _scales(N, G, torch.bfloat16)
    tensors = {
        "weight_packed": _packed(q + half, bits),
        "weight_scale": s,
        "weight_shape": torch.tensor([N, K]),
    }
    of, z = torch.arange(K) // group, torch.zeros(N, G, dtype=torch.long)
    if not is_ordered:
        of = of[torch.randperm(K, generator=torch.Generator().manual_seed(K))]
        tensors["weight_g_idx"] = of.to(torch.int32)
    if not is_symmetric:
        z = _random(name + "zeros", N, G, high=2 * half) - half
        tensors["weight_zero_point"] = _packed((z + half).T, bits).T  # along the rows
    return tensors, (q - z[:, of]) * s.float()[:, of]


def int_quantized(name: str, N: int, K: int, *, is_symmetric: bool = True) -> Written:
    q, s = _random(name, N, K, high=255) - 127, _scales(N, 1, torch.bfloat16) / 16
    tensors = {"weight": q.to(torch.int8), "weight_scale": s}
    if is_symmetric:
        return tensors, q * s.float()
    z = _random(name + "zeros", N, 1, high=255) - 127
    return tensors | {"weight_zero_point": z.to(torch.int8)}, (q - z) * s.float()


def _floats8(name: str, N: int, K: int) -> Tensor:
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(len(name) + N))
    return values.to(torch.float8_e4m3fn)


def float_quantized(name: str, N: int, K: int) -> Written:
    q, s = _floats8(name, N, K), _scales(N, 1, torch.float32) * 10
    return {"weight": q, "weight_scale": s, "input_scale": torch.ones(1)}, q.float() * s


def fp8_of_blocks(
    name: str, N: int, K: int, rows: int = 128, columns: int = 128, scale: str = "weight_scale_inv"
) -> Written:
    q, s = _floats8(name, N, K), _scales(ceil_div(N, rows), ceil_div(K, columns), torch.float32) * 10
    wide = s.repeat_interleave(rows, 0)[:N].repeat_interleave(columns, 1)[:, :K]
    return {"weight": q, scale: s}, q.float() * wide


def fp8_of_one_scale(name: str, N: int, K: int) -> Written:
    q = _floats8(name, N, K)
    return {"weight": q, "weight_scale": torch.tensor(0.12), "input_scale": torch.tensor(1.0)}, q.float() * 0.12


def _compressed(layout: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"symmetric": True} | weights}},
        "ignore": ["lm_head"],
    }


def _gptq_config(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": False, **more}


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
# The config of each, who writes a matrix, and the name of the blocks that a matrix of 256 columns is kept in.
CHECKPOINTS: dict[str, tuple[dict[str, Any], Callable[[str, int, int], Written], str | None]] = {
    "awq": (AWQ_CONFIG, partial(awq, group=64), "A4_64"),
    "gptq": (_gptq_config(4, 128), partial(gptq, group=128), "A4_128"),
    "gptq of rows": (_gptq_config(4, -1), gptq_of_rows, "A4_128"),
    "gptq 8 bits": (_gptq_config(8, 32), partial(gptq, group=32, bits=8), "A8_32"),
    "gptq v2": (
        _gptq_config(4, 64, checkpoint_format="gptq_v2"),
        partial(gptq, group=64, shift=0),
        "A4_64",
    ),
    "gptq act-order": (
        _gptq_config(4, 128) | {"desc_act": True},
        partial(gptq, group=128, is_ordered=False),
        None,
    ),
    "w4a16": (
        _compressed("pack-quantized", num_bits=4, strategy="group", group_size=128),
        partial(pack_quantized, group=128),
        "A4_128",
    ),
    "w8a16": (
        _compressed("pack-quantized", num_bits=8, strategy="group", group_size=64),
        partial(pack_quantized, group=64, bits=8),
        "A8_64",
    ),
    "w8a8": (_compressed("int-quantized", num_bits=8, strategy="channel"), int_quantized, "A8_128"),
    "w4a16 asymmetric": (
        _compressed("pack-quantized", num_bits=4, strategy="group", group_size=64, symmetric=False),
        partial(pack_quantized, group=64, is_symmetric=False),
        "A4_64",
    ),
    "w4a16 act-order": (
        _compressed("pack-quantized", num_bits=4, strategy="group", group_size=64, actorder="group"),
        partial(pack_quantized, group=64, is_ordered=False),
        None,
    ),
    "w8a8 asymmetric": (
        _compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False),
        partial(int_quantized, is_symmetric=False),
        "A8_128",
    ),
    "compressed fp8 of blocks": (
        _compressed("float-quantized", num_bits=8, strategy="block", block_structure=[64, 128]),
        partial(fp8_of_blocks, rows=64, scale="weight_scale"),
        "F8_128",
    ),
    "compressed fp8": (_compressed("float-quantized", num_bits=8, strategy="channel"), float_quantized, "F8_128"),
    "fp8 of blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, fp8_of_blocks, "F8_128"),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_of_one_scale, "F8_128"),
}


def write_tiny_quantized(kind: str, folder: Path, family: str = "qwen2", skipped: str = "", **overrides: Any) -> Path:
    """Write `folder`/quantized, and the model that it stands for in `folder`/dequantized; the first is returned.

    skipped: a part of a name; matrices with it are not quantized. `overrides` change the model's config.
    """
    config, write, _ = CHECKPOINTS[kind]
    reference = make_tiny_model(family, folder / "dequantized", **SHAPE | overrides)
    quantized = make_tiny_model(family, folder / "quantized", **SHAPE | overrides)
    tensors, stored = load_file(reference / "model.safetensors"), {}
    for name, weight in tensors.items():
        if not name.endswith(MATRICES) or (skipped and skipped in name):
            stored[name] = weight
            continue
        parts, tensors[name] = write(name, *weight.shape)
        stored |= {f"{name.removesuffix('weight')}{ending}": part.contiguous() for ending, part in parts.items()}
    save_file({name: weight.contiguous() for name, weight in tensors.items()}, reference / "model.safetensors")
    save_file(stored, quantized / "model.safetensors")
    values = json.loads((quantized / "config.json").read_text())
    if skipped:
        config = config | {"modules_to_not_convert": [skipped]}
    (quantized / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    return quantized


MXFP4_CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def write_tiny_mxfp4(folder: Path) -> Path:
    """Write `folder`/quantized as gpt-oss is published, and what transformers makes of it in `folder`/dequantized."""
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    reference, quantized = (make_tiny_model("gpt-oss", folder / name) for name in ("dequantized", "quantized"))
    tensors, stored = load_file(reference / "model.safetensors"), {}
    for name, weight in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = weight
            continue
        num, columns, rows = weight.shape  # of all experts; a row of what is stored is a column here
        blocks = _random(name, num, rows, columns // 32, 16, high=256).to(torch.uint8)
        scales = (_random(name, num, rows, columns // 32, high=4) + 122).to(torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = _convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file({name: weight.contiguous() for name, weight in tensors.items()}, reference / "model.safetensors")
    save_file(stored, quantized / "model.safetensors")
    values = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(values | {"quantization_config": MXFP4_CONFIG}))
    return quantized
