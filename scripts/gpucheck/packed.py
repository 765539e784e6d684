"""GPU check: products with packed matrices are right, and what they take against the same matrix in 16 bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from gpucheck import forward
from gpucheck.bench import Bench, llama_1b, llama_8b
from gpucheck.worker import tell
from kunserve.compute.cuda.ops import load_kernels
from kunserve.model.config import ModelConfig
from kunserve.model.layout import weight_units
from kunserve.model.quant.formats import Formats
from kunserve.model.quant.linear import StoredRows
from kunserve.model.quant.plane_codes import codes_plane, scales_plane
from kunserve.model.quant.planes import Planes

FORMS = {
    "4 bits, groups of 128": Planes.of("A4", 128, 128),  # AWQ, GPTQ, compressed-tensors
    "4 bits, groups of 32": Planes.of("A4", 32, 32, "float16"),  # GGUF
    "8 bits, rows": Planes.of("A8", 128, None),
    "fp8, groups of 128": Planes.of("F8", 128, 128),  # unpacked on any GPU
    "fp8, rows": Planes.of("F8", 128, None),  # multiplied as it is, where the GPU can
}
ROWS = (1, 16, 64, 129, 2048)


def random_part(planes: Planes, num_rows: int, num_columns: int, device: str | torch.device = "cpu") -> StoredRows:
    """Return random rows in planes, of values about as large as those of a normal distribution."""
    random = torch.Generator(device).manual_seed(num_rows + num_columns)
    groups = num_columns // (planes.group or num_columns)
    scale = torch.rand(num_rows, groups, generator=random, device=device) + 0.5
    codes = torch.randint(256, (num_rows, num_columns), generator=random, device=device).to(torch.uint8)
    offset: Tensor | None = None
    if planes.kind == "F8":
        codes = codes & 0xBF  # below 2, and no NaN
    else:
        top = 16 if planes.kind == "A4" else 256
        codes, scale = codes & (top - 1), (scale * 4 / top).half().float()
        offset = -scale * (top // 2)
    return StoredRows(codes_plane(codes, planes), planes, scales_plane(scale, offset, planes))


def products(bench: Bench) -> dict[str, Any]:
    """Measure the error of products and their time beside those of the same matrix in bfloat16, in microseconds."""
    kernels, note = load_kernels(bench.torch_device)
    N, K = (64, 256) if bench.is_quick else (28672, 4096)
    figures: dict[str, Any] = {"kernels": note}
    for name, planes in FORMS.items():
        part = random_part(planes, N, K, bench.torch_device)
        assert part.scales is not None
        matrix = part.dense().to(torch.bfloat16)
        num_bytes = part.data.nbytes + part.scales.nbytes
        for num_rows in ROWS:
            x = torch.randn(num_rows, K, device=bench.torch_device).to(torch.bfloat16)
            found, expected = kernels.packed_linear(x, part).float(), x.float() @ matrix.float().t()
            ours = bench.seconds(lambda x=x, part=part: kernels.packed_linear(x, part), 20)  # type: ignore[misc]
            theirs = bench.seconds(lambda x=x, matrix=matrix: F.linear(x, matrix), 20)  # type: ignore[misc]
            figures[f"{name}, {num_rows}"] = {
                "error": float((found - expected).norm() / expected.norm()),
                "us": ours * 1e6,
                "us_16_bits": theirs * 1e6,
                "gb_per_s": num_bytes / ours / 1e9,
            }
            tell(figures)
    return figures


def in_four_bits(config: ModelConfig) -> ModelConfig:
    """Return the model with the matrices of its layers as an AWQ checkpoint has them."""
    specs = [spec for unit in weight_units(config, "bfloat16") for spec in unit.tensors]
    names = [spec.name for spec in specs if spec.name.endswith("_proj.weight")]
    return replace(config, formats=Formats(dict.fromkeys(names, FORMS["4 bits, groups of 128"])))


def decode(bench: Bench, config: ModelConfig | None = None) -> dict[str, Any]:
    """Measure as `forward.decode` does, with the layers' matrices in 4 bits: their floor is a quarter as far away."""
    return forward.decode(bench, in_four_bits(config or (llama_1b() if bench.is_quick else llama_8b())))


def worst_error(figures: dict[str, Any], *, is_fp8: bool) -> float:
    """Return the largest error of products whose activations are in 16 bits, or (is_fp8) may be in 8."""
    errors = [f["error"] for name, f in figures.items() if name != "kernels" and name.startswith("fp8, rows") == is_fp8]
    return float(max(errors))
