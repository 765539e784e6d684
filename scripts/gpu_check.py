"""Everything that only a GPU can show, in under eight minutes: `python scripts/gpu_check.py` on a machine with one.

Runs part by part (`--parts` names some); a part that fails is reported and the rest goes on. After each it writes
dev/gpu/<device>-<date>.json and .md; the last line it prints is the whole result. See dev/gpu/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpucheck import forward, memory, packed, report, serving
from gpucheck.bench import GIB, Bench
from gpucheck.likelihood import likelihood
from gpucheck.worker import CheckPart, run_parts, serve

from kunserve.config import DeviceSpec
from kunserve.errors import ConfigError
from kunserve.gpu.cuda.device import open_drivers
from kunserve.gpu.kv_memory import E4M3
from kunserve.model.host_copy import HostCopy
from kunserve.policies import OverloadPolicy

BIG_GIB = 76  # a GPU that holds four replicas of the 8B model


def parts_of(bench: Bench) -> dict[str, CheckPart]:
    """Return all parts in the order in which they run: what is quick, and what the rest relies on, first."""
    return {
        "contract": partial(memory.contract, bench),
        "driver_calls": partial(memory.driver_calls, bench),
        "kernels": partial(forward.kernels, bench),
        "packed": partial(packed.products, bench),
        "logits": partial(forward.logits, bench),
        "logits_fp8_kv": partial(forward.logits, bench, kv_dtype=E4M3),
        "graphs": partial(forward.graphs, bench),
        "remap": partial(memory.remap, bench),
        "decode": partial(forward.decode, bench),
        "decode_packed": partial(packed.decode, bench),
        "prefill": partial(forward.prefill, bench),
        "regroup": partial(regroup, bench),
        "regroup_from_mates": partial(regroup, bench, HostCopy.NONE),
        "likelihood": partial(text_likelihood, bench),
        "host": partial(host, bench),
        "steady": partial(steady, bench),
        "burst_drop": partial(burst, bench, OverloadPolicy.DROP),
        "burst_recompute": partial(burst, bench, OverloadPolicy.RECOMPUTE),
        "sanitizer": partial(sanitizer, bench),
        "burst_queue": partial(burst, bench, OverloadPolicy.QUEUE),
        "burst_pipeline": partial(burst, bench, OverloadPolicy.RECOMPUTE, num_stages=4),
        "transformers": partial(forward.transformers, bench),
    }


def _devices(bench: Bench, count: int) -> DeviceSpec:
    return DeviceSpec("cuda", (bench.ordinal,) * count)


def regroup(bench: Bench, host_copy: HostCopy = HostCopy.AUTO) -> dict[str, Any]:
    """Check that a small float32 model makes the same tokens through drop, exchange and restore."""
    config = serving.engine_config(
        _devices(bench, 2), "smollm2-135m", num_blocks=512, dtype="float32", is_pinned=True, num_batched_tokens=256
    )
    return asyncio.run(serving.regroup(replace(config, host_copy=host_copy), num_requests=6, num_tokens=64))


def text_likelihood(bench: Bench) -> dict[str, Any]:
    """Compare the likelihood of each token of a text, in bf16, through drop, exchange and restore, and again."""
    config = serving.engine_config(
        _devices(bench, 2), "smollm2-135m", num_blocks=512, is_pinned=True, num_batched_tokens=256
    )
    return asyncio.run(likelihood(config, text_len=512, num_tokens=512))


def _large(bench: Bench) -> tuple[str, int]:
    """Return the model for serving parts, and the memory of one of four devices."""
    total = torch.cuda.get_device_properties(bench.ordinal).total_memory
    if total >= BIG_GIB * GIB and not bench.is_quick:
        return "llama-8b", (total * 92 // 100 - 4 * GIB) // 4
    return "smollm2-135m", GIB // 2


def host(bench: Bench) -> dict[str, Any]:
    """Measure what a decode step of the engine takes beyond the GPU's own time."""
    model, memory_bytes = _large(bench)
    config = serving.engine_config(_devices(bench, 1), model, memory_bytes=2 * memory_bytes, is_pinned=True)
    return asyncio.run(serving.host(bench, config, num_requests=64, prompt_len=128)) | {"model": model}


def steady(bench: Bench) -> dict[str, Any]:
    """Measure the throughput of a chain of two over that of two groups."""
    model, memory_bytes = _large(bench)
    config = serving.engine_config(_devices(bench, 2), model, memory_bytes=memory_bytes, is_pinned=True)
    return asyncio.run(serving.steady(config, num_requests=16, prompt_len=128)) | {"model": model}


def burst(bench: Bench, policy: OverloadPolicy, num_stages: int | None = None) -> dict[str, Any]:
    """Run the same burst for every policy, and for a static pipeline, on four logical devices.

    They get as much KV as the burst asks for too little, whatever the GPU has; and nearly all of its memory, as four
    replicas of the 8B model hardly fit into 80 GB.
    """
    model, _ = _large(bench)
    load = serving.Burst(num_requests=120, rate=30.0, prompt_len=768, num_tokens=192, limit_s=30.0)
    config = serving.engine_config(
        _devices(bench, 4),
        model,
        num_blocks=load.too_few_blocks(4),
        policy=policy,
        num_stages=num_stages,
        utilization=0.96,
    )
    return asyncio.run(serving.burst(config, load)) | {"model": model}


def sanitizer(bench: Bench) -> dict[str, Any]:
    """Run compute-sanitizer memcheck over the parts that touch memory, with small models."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not installed"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *worker_command(bench.ordinal, is_quick=True)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, input="contract\ngraphs\n")
    lines = done.stdout.splitlines()
    answers = [json.loads(line) for line in lines if line.startswith("{")]
    summary = [line.strip("= ") for line in lines if "ERROR SUMMARY" in line]
    if len(answers) < 2 or any("failed" in answer for answer in answers):
        raise RuntimeError(f"under memcheck: {answers or lines[-3:]}")
    return {"clean": done.returncode == 0, "summary": summary}


def environment(ordinal: int) -> dict[str, Any]:
    """Describe the machine that figures are of. ConfigError if that GPU or anything else is missing."""
    for driver in open_drivers((ordinal,)):
        driver.close()
    properties = torch.cuda.get_device_properties(ordinal)
    return {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / GIB, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def worker_command(ordinal: int, *, is_quick: bool) -> list[str]:
    """Return the command that runs the worker (gpucheck/worker.py)."""
    return [sys.executable, __file__, "--worker", "--ordinal", str(ordinal), *(["--quick"] if is_quick else [])]


def parse_arguments() -> argparse.Namespace:
    """Read the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help="which parts, with commas (default: all)")
    parser.add_argument("--ordinal", type=int, default=0, help="which GPU")
    parser.add_argument("--quick", action="store_true", help="small models: does it run at all")
    parser.add_argument("--budget", type=float, default=425.0, metavar="S", help="begin no part after so many seconds")
    parser.add_argument(
        "--part-limit", type=float, default=120.0, metavar="S", help="stop a part after so many seconds"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "dev" / "gpu")
    parser.add_argument("--no-write", action="store_true", help="write no files")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def write(folder: Path, result: dict[str, Any]) -> None:
    """Keep the result as <device>-<date>.json and .md."""
    where = result["environment"]
    stem = re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-") + f"-{where['date']}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(report.markdown(result))


def main() -> None:
    args = parse_arguments()
    parts = parts_of(Bench(args.ordinal, args.quick))
    if args.worker:
        if torch.cuda.is_available():
            torch.cuda.set_device(args.ordinal)  # Triton launches on the current GPU, wherever its tensors are
        serve(parts)
        return
    names = args.parts.split(",") if args.parts else list(parts)
    if unknown := [name for name in names if name not in parts]:
        raise SystemExit(f"no part {unknown[0]!r}; there are {', '.join(parts)}")
    try:
        where = environment(args.ordinal)
    except ConfigError as error:
        sys.exit(f"gpu_check: {error.message}")
    result: dict[str, Any] = {"environment": where, "quick": args.quick, "parts": {}}
    for name, figures in run_parts(
        names,
        worker_command(args.ordinal, is_quick=args.quick),
        budget_s=args.budget,
        limit_s=args.budget + 50.0,
        part_limit_s=args.part_limit,
    ):
        print(f"{name}: {json.dumps(figures)}", file=sys.stderr, flush=True)
        result["parts"][name] = figures
        result["targets"] = report.targets(result["parts"])
        if not args.no_write:
            write(args.out, result)
    print(json.dumps(result))
    has_failed = any("failed" in part for part in result["parts"].values())
    sys.exit(1 if has_failed or any(not t["met"] for t in result["targets"] if t["met"] is not None) else 0)


if __name__ == "__main__":
    main()
