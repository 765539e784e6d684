"""Compile all Triton kernels as the decoder launches them, for GPUs that are not there: `compile_kernels.py`.

Every model card in each dtype, for each architecture. The kernels' own launching code runs, on tensors in host memory,
so that what is compiled is what a GPU would be asked for. Prints a line of JSON for each kernel that comes out
different: its registers, its spills (0, or the kernel is slow), its shared memory. Exit status 1 beyond the limits.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from kunserve.compute.cuda.ops import CHECKPOINT_DTYPES
from kunserve.compute.ops import ExpertWeights
from kunserve.gpu.kv_memory import E4M3
from kunserve.model.card import load_card
from kunserve.model.config import ModelConfig
from kunserve.model.quant.linear import Linear, StoredRows
from kunserve.model.quant.planes import every_planes

ARCHITECTURES = (80, 90, 100, 120)
MODELS = Path(__file__).parents[2] / "models"
MAX_REGISTERS = 128  # of a thread: then four warps of it fit into a multiprocessor four times
MAX_SHARED_BYTES = 48 << 10  # what a block gets without asking on any architecture
KERNELS = ("_rms_norm", "_act_and_mul", "_rotate_and_append", "expert_linear", "packed_product", "sum_parts")
FP8_KERNELS = ("quantize_rows",)  # where tensor cores multiply floats of 8 bits
FP8_SINCE = 89
PDL_KERNELS = ("_rms_norm", "_act_and_mul", "_rotate_and_append")  # launched before the one before has ended
PDL_SINCE = 90


class _Target:
    """The part of Triton's driver that compiling asks: a GPU of one architecture."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Compiled:
    """Takes the place of a kernel: launching it compiles. Each result once."""

    def __init__(self, kernel: Any, found: dict[str, Any]) -> None:
        self._kernel, self._found = kernel, found

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            compiled = self._kernel.warmup(*arguments, grid=grid, **constants)
            self._found.setdefault(compiled.hash, compiled)

        return launch


def shapes(names: tuple[str, ...]) -> Iterator[tuple[str, ModelConfig]]:
    """Yield the names of model cards with their shapes, each shape once."""
    seen = set()
    for name in names:
        config = load_card(name).config
        key = (
            config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads,
            config.head_dim, config.qk_norm, config.experts, config.rotary_dim, config.activation,
        )  # fmt: skip
        if key not in seen:
            seen.add(key)
            yield name, config


def launch_all(kernels: Any, config: ModelConfig, dtype: torch.dtype) -> None:
    """Launch each kernel as a layer of this model does, for some rows."""
    num_rows, block_size = 3, 16

    def made(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind)

    rows, norm = made(num_rows, config.hidden_size), made(config.hidden_size)
    kernels.rms_norm(rows, norm, 1e-5, config.norm_offset)
    kernels.add_and_norm(rows, rows, norm, 1e-5, config.norm_offset)
    if (experts := config.experts) is None:
        kernels.act_and_mul(made(num_rows, 2 * config.intermediate_size), config.activation)
    else:
        num, inner, hidden = experts.num_per_token, experts.intermediate_size, config.hidden_size  # as few as can be
        weights = ExpertWeights(
            Linear.of(torch.zeros(num, hidden, dtype=dtype)), None,
            made(num, 2 * inner, hidden), made(num, 2 * inner) if experts.has_bias else None,
            made(num, hidden, inner), made(num, hidden) if experts.has_bias else None,
            num, normalize=True, activation=config.activation,
        )  # fmt: skip
        kernels.moe(torch.zeros(num_rows, hidden, dtype=dtype), weights)
    norms = [made(config.head_dim) if config.qk_norm else None for _ in range(2)]
    for kv_dtype in (dtype, E4M3):
        kernels.rotate_and_append(
            made(num_rows, config.q_size + 2 * config.kv_size),
            made(64, config.rotary_dim),
            made(4, 2, config.num_kv_heads, block_size, config.head_dim, kind=kv_dtype),
            made(num_rows, kind=torch.int32),
            made(num_rows, kind=torch.int32),
            *norms,
            1e-5,
            config.norm_offset,
        )


def launch_packed(kernels: Any, dtype: torch.dtype) -> None:
    """Launch the products with packed matrices, of each form that a checkpoint may bring, for few rows and for many."""
    from kunserve.compute.cuda import packed  # imports Triton

    columns = 512
    for planes in every_planes():
        codes = torch.zeros(64, columns // planes.num_values, dtype=torch.uint8)
        scales = torch.ones(planes.scales_shape(64, columns), dtype=getattr(torch, planes.scale_dtype))
        for num_rows in (3, packed.FEW_ROWS + 1, packed.MAX_SHARED_ROWS + 1):
            x = torch.zeros(num_rows, columns, dtype=dtype)
            kernels.packed_linear(x, StoredRows(codes, planes, scales))


def compile_for(names: tuple[str, ...], is_quick: bool, architecture: int) -> list[dict[str, Any]]:
    """Compile for one architecture, in a process that has not imported Triton yet."""
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    from kunserve.compute.cuda import experts, packed
    from kunserve.compute.cuda import kernels as module

    triton.runtime.driver.set_active(_Target(architecture))
    found: dict[str, Any] = {}
    for name in (*KERNELS, *FP8_KERNELS):
        home = next(home for home in (experts, packed, module) if hasattr(home, name))
        setattr(home, name, _Compiled(getattr(home, name), found))
    rows, known = [], set[str]()
    dense = module.TritonKernels(has_pdl=architecture >= PDL_SINCE)
    works = [(name, partial(launch_all, dense, config)) for name, config in shapes(names)]
    made = module.TritonKernels(has_fp8=False), module.TritonKernels(has_fp8=True)
    works += [("packed", partial(launch_packed, kernels)) for kernels in made[: 1 + (architecture >= FP8_SINCE)]]
    for name, work in works:
        for dtype_name, dtype in CHECKPOINT_DTYPES.items():
            if is_quick and name == "packed" and dtype is not torch.bfloat16:
                continue
            work(dtype)
            rows += [
                resources(found[key]) | {"sm": architecture, "first": f"{name} {dtype_name}"}
                for key in found
                if key not in known
            ]
            known.update(found)
    return rows


def resources(compiled: Any) -> dict[str, Any]:
    """Return what a compiled kernel takes: registers of a thread, bytes of spills and of shared memory."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text.stdout)}
    return {
        "kernel": compiled.metadata.name,
        "kv": compiled.src.signature.get("kv"),
        "registers": usage["REG"],
        "spilled_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "early": early(compiled.asm["ptx"]),
    }


def early(ptx: str) -> list[str] | None:
    """Return what a kernel reads or writes before it has waited for the one before; None if it waits for none."""
    before, waits, _ = ptx.partition("griddepcontrol.wait")
    return re.findall(r"\b(?:ld|st|atom|red)\.global", before) if waits else None


def is_within_limits(row: dict[str, Any]) -> bool:
    """Tell whether a kernel spills nothing and leaves room for others on a multiprocessor."""
    registers, spilled, shared = (int(row[key]) for key in ("registers", "spilled_bytes", "shared_bytes"))
    return spilled == 0 and registers <= MAX_REGISTERS and shared <= MAX_SHARED_BYTES


def parse_arguments() -> SimpleNamespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(sorted(path.stem for path in MODELS.glob("*.toml"))))
    parser.add_argument("--sm", default=",".join(map(str, ARCHITECTURES)), help="architectures, with commas")
    parser.add_argument("--quick", action="store_true", help="packed products in bfloat16 only: a third of the time")
    found = parser.parse_args()
    return SimpleNamespace(
        models=tuple(found.models.split(",")), sm=[int(sm) for sm in found.sm.split(",")], quick=found.quick
    )


def main() -> None:
    args, begun = parse_arguments(), time.monotonic()
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(
        min(len(args.sm), os.cpu_count() or 1), get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        for some in pool.map(partial(compile_for, args.models, args.quick), args.sm):
            for row in some:
                print(json.dumps(row), flush=True)
            rows += some
    bad = [row for row in rows if not is_within_limits(row)]
    print(json.dumps({"compiled": len(rows), "beyond_limits": bad, "seconds": round(time.monotonic() - begun, 1)}))
    sys.exit(1 if bad or not rows else 0)


if __name__ == "__main__":
    main()
