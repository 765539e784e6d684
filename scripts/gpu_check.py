"""Everything that only a GPU can show, in under eight minutes: `python scripts/gpu_check.py` on a machine with one.

Runs part by part (`--parts` names some); a part that fails is reported and the rest goes on. Writes
dev/gpu/<device>-<date>.json and .md, and prints one JSON line at the end. See dev/gpu/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpucheck import forward, memory, report, serving
from gpucheck.bench import GIB, Bench

from kunserve.config import DeviceSpec
from kunserve.engine.policy import OverloadPolicy
from kunserve.errors import ConfigError
from kunserve.gpu.cuda import open_drivers

Part = Callable[[], dict[str, Any]]

BIG_GIB = 76  # a GPU that holds four replicas of the 8B model


def parts_of(bench: Bench) -> dict[str, Part]:
    """All parts in the order in which they run: what is quick, and what the rest relies on, first."""
    return {
        "contract": partial(memory.contract, bench),
        "driver_calls": partial(memory.driver_calls, bench),
        "kernels": partial(forward.kernels, bench),
        "logits": partial(forward.logits, bench),
        "graphs": partial(forward.graphs, bench),
        "remap": partial(memory.remap, bench),
        "decode": partial(forward.decode, bench),
        "prefill": partial(forward.prefill, bench),
        "regroup": partial(regroup, bench),
        "steady": partial(steady, bench),
        "burst": partial(bursts, bench),
        "sanitizer": partial(sanitizer, bench),
        "transformers": partial(forward.transformers, bench),
    }


def _devices(bench: Bench, count: int) -> DeviceSpec:
    return DeviceSpec("cuda", (bench.ordinal,) * count)


def regroup(bench: Bench) -> dict[str, Any]:
    """Identical tokens in a small float32 model through drop, exchange and restore."""
    config = serving.engine_config(
        _devices(bench, 2), "smollm2-135m", num_blocks=512, dtype="float32", is_pinned=True, num_batched_tokens=256
    )
    return asyncio.run(serving.regroup(config, num_requests=6, num_tokens=64))


def _large(bench: Bench) -> tuple[str, int]:
    """The model for serving parts, and the memory of one of four devices."""
    total = torch.cuda.get_device_properties(bench.ordinal).total_memory
    if total >= BIG_GIB * GIB and not bench.is_quick:
        return "llama-8b", (total * 92 // 100 - 4 * GIB) // 4
    return "smollm2-135m", GIB // 2


def steady(bench: Bench) -> dict[str, Any]:
    """Throughput of a chain of two over that of two groups."""
    model, memory_bytes = _large(bench)
    config = serving.engine_config(_devices(bench, 2), model, memory_bytes=memory_bytes, is_pinned=True)
    return asyncio.run(serving.steady(config, num_requests=16, prompt_len=128)) | {"model": model}


def bursts(bench: Bench) -> dict[str, Any]:
    """The same burst under each policy, and on a static pipeline, on four logical devices."""
    model, memory_bytes = _large(bench)
    results: dict[str, Any] = {"model": model}
    for name, policy, num_stages in (
        ("drop", OverloadPolicy.DROP, None),
        ("recompute", OverloadPolicy.RECOMPUTE, None),
        ("queue", OverloadPolicy.QUEUE, None),
        ("pipeline", OverloadPolicy.RECOMPUTE, 4),
    ):
        config = serving.engine_config(
            _devices(bench, 4), model, memory_bytes=memory_bytes, policy=policy, num_stages=num_stages
        )
        results[name] = asyncio.run(
            serving.burst(config, num_requests=120, rate=30.0, prompt_len=768, num_tokens=192, limit_s=40.0)
        )
    return results


def sanitizer(bench: Bench) -> dict[str, Any]:
    """compute-sanitizer memcheck over the parts that touch memory, with small models."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not installed"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, __file__, "--quick", "--no-write"]
    done = subprocess.run(
        [*command, "--ordinal", str(bench.ordinal), "--parts", "contract,graphs"],
        check=False,
        capture_output=True,
        text=True,
        timeout=180,
    )
    summary = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    return {"clean": done.returncode == 0, "summary": summary[-1].strip() if summary else done.stdout[-300:]}


def _out_of_time(*_: object) -> None:
    raise TimeoutError("stopped: its time was over")


def run_parts(
    parts: dict[str, Part], budget_s: float, say: Callable[[str], None], limit_s: float = 470.0
) -> dict[str, Any]:
    """Run parts one after the other; what fails or finds no time is recorded as that.

    None begins after `budget_s`, and what still runs after `limit_s` is stopped.
    """
    before = signal.signal(signal.SIGALRM, _out_of_time)
    try:
        return _run_parts(parts, budget_s, limit_s, say)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _run_parts(
    parts: dict[str, Part], budget_s: float, limit_s: float, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    started = time.perf_counter()
    results: dict[str, dict[str, Any]] = {}
    for name, part in parts.items():
        begun = time.perf_counter()
        if begun - started > budget_s:
            results[name] = {"skipped": f"no time left: {budget_s:.0f} s are over"}
            continue
        say(f"{name} ...")
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, started + limit_s - begun))
        try:
            results[name] = part()
        except Exception as error:
            traceback.print_exc()
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        results[name]["seconds"] = round(time.perf_counter() - begun, 2)
        say(f"{name}: {json.dumps(results[name], default=str)}")
    return results


def environment(ordinal: int) -> dict[str, Any]:
    """What the figures are of."""
    properties = torch.cuda.get_device_properties(ordinal)
    return {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / GIB, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def parse_arguments() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help="which parts, with commas (default: all)")
    parser.add_argument("--ordinal", type=int, default=0, help="which GPU")
    parser.add_argument("--quick", action="store_true", help="small models: does it run at all")
    parser.add_argument("--budget", type=float, default=420.0, metavar="S", help="begin no part after so many seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "dev" / "gpu")
    parser.add_argument("--no-write", action="store_true", help="write no files")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    try:
        for driver in open_drivers((args.ordinal,)):
            driver.close()
    except ConfigError as error:
        sys.exit(f"gpu_check: {error.message}")
    bench = Bench(args.ordinal, args.quick)
    parts = parts_of(bench)
    if args.parts:
        unknown = [name for name in args.parts.split(",") if name not in parts]
        if unknown:
            raise SystemExit(f"no part {unknown[0]!r}; there are {', '.join(parts)}")
        parts = {name: parts[name] for name in args.parts.split(",")}
    result: dict[str, Any] = {"environment": environment(args.ordinal), "quick": args.quick}
    result["parts"] = run_parts(parts, args.budget, lambda line: print(line, file=sys.stderr, flush=True))
    result["targets"] = report.targets(result["parts"])
    if not args.no_write:
        where = result["environment"]
        stem = re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-") + f"-{where['date']}"
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{stem}.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
        (args.out / f"{stem}.md").write_text(report.markdown(result))
    print(json.dumps(result, default=str))
    has_failed = any("failed" in part for part in result["parts"].values())
    sys.exit(1 if has_failed or any(not t["met"] for t in result["targets"] if t["met"] is not None) else 0)


if __name__ == "__main__":
    main()
