"""The GPU check's own code, on devices that are not there: every part runs, and its report says what was measured."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch
from cuda_parts import FakeGraph
from fake_cuda import FakeCuda
from gpucheck import forward, memory, report, serving
from gpucheck.bench import Bench, llama_1b
from hypothesis import given
from hypothesis import strategies as st

from kunserve.config import DeviceSpec
from kunserve.gpu.cuda_driver import Driver
from kunserve.model import cuda_decoder
from kunserve.model.config import ModelConfig
from kunserve.model.cuda_attention import ReferenceAttention, StepBuffers
from kunserve.model.cuda_graphs import DecodeGraphs

TINY = ModelConfig("llama", 100, 32, 48, 8, 2, 1, 16, 2048)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A GPU without a GPU: reference attention for half types too, and graphs that run again."""

    def load_attention(config: ModelConfig, block_size: int, dtype: torch.dtype, buffers: StepBuffers) -> Any:
        return ReferenceAttention(block_size, buffers), "reference"

    make = cuda_decoder.cuda_decoder

    def with_graphs(config: ModelConfig, *args: Any, enforce_eager: bool, dtype: torch.dtype, **kwargs: Any) -> Any:
        decoder, note = make(config, *args, enforce_eager=enforce_eager, dtype=dtype, **kwargs)
        if not enforce_eager:
            device = torch.device("cpu")
            decoder.graphs = DecodeGraphs(args[3].max_num_seqs, config.hidden_size, dtype, device, FakeGraph)
        return decoder, note

    monkeypatch.setattr(cuda_decoder, "load_attention", load_attention)
    monkeypatch.setattr("gpucheck.bench.cuda_decoder", with_graphs)
    monkeypatch.setattr(forward, "BATCHES", (1, 3))

    def open_driver(ordinal: int) -> Driver:
        driver: Driver = FakeCuda(ordinal, total_bytes=2 << 30)
        return driver

    return Bench(is_quick=True, open_driver=open_driver)


def test_memory_parts(bench: Bench) -> None:
    assert memory.contract(bench) == {"ok": True}
    calls = memory.driver_calls(bench)
    assert set(calls) == {"2 MiB", "16 MiB", "32 MiB", "64 MiB"} and all(v > 0 for v in calls["16 MiB"].values())
    remap = memory.remap(bench, TINY)
    assert remap["layers"] == 4 and remap["gib"] > 0 and len(remap["drop_ms_all"]) == 5


def test_numbers(bench: Bench) -> None:
    errors = forward.logits(bench, TINY)
    assert 0 < errors["relative_error_graphs"] < 0.02 and 0 < errors["relative_error_eager"] < 0.02
    assert forward.graphs(bench, TINY) == {
        "captures": [2, 2],
        "captures_after_drop_and_restore": [2, 2],
        "same_in_chain": True,
        "same_after_restore": True,
    }


def test_figures(bench: Bench) -> None:
    decode = forward.decode(bench, TINY)
    assert set(decode) == {"bandwidth_gb_per_s", "1", "3"} and decode["3"]["floor_ms"] > decode["1"]["floor_ms"]
    assert all(math.isfinite(v) and v >= 0 for v in decode["3"].values())
    assert forward.prefill(bench, TINY)["tokens"] == 256
    assert forward.kernels(bench)["rms_norm"] == 0  # torch against itself


def test_the_1b_shape_has_about_as_many_weights() -> None:
    config = llama_1b()
    layer = (
        2 * config.hidden_size * (config.q_size + config.kv_size) + 3 * config.hidden_size * config.intermediate_size
    )
    assert 1.0e9 < config.num_layers * layer + config.vocab_size * config.hidden_size < 1.4e9


async def test_serving_parts_on_cpu_devices() -> None:
    """The engine is the same; only the devices are others."""
    config = serving.engine_config(
        DeviceSpec("cpu", (0, 1)), "smollm2-135m", num_blocks=40, is_pinned=True, num_batched_tokens=64
    )
    result = await serving.regroup(replace(config, max_model_len=400), num_requests=2, num_tokens=24)
    assert result["same_tokens"] and not result["errors"]
    assert [t["kind"] for t in result["transitions"]] == ["drop", "restore"]


def test_a_part_that_fails_does_not_end_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    parts: dict[str, gpu_check.Part] = {"bad": lambda: {"x": 1 // 0}, "good": lambda: {"ok": True}}
    results = gpu_check.run_parts(parts, 100.0, lambda line: None)
    assert "ZeroDivisionError" in results["bad"]["failed"] and results["good"]["ok"]
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert "no time left" in gpu_check.run_parts(parts, -1.0, lambda line: None)["good"]["skipped"]


def sleep() -> dict[str, Any]:
    time.sleep(600)
    return {}


def test_a_part_that_takes_too_long_is_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    parts: dict[str, gpu_check.Part] = {
        "slow": sleep,
        "serving": lambda: asyncio.run(asyncio.sleep(600, {})),
        "good": lambda: {"ok": True},
    }
    results = gpu_check.run_parts(parts, 100.0, lambda line: None, limit_s=0.05)
    assert all("its time was over" in results[name]["failed"] for name in ("slow", "serving"))
    assert results["good"]["ok"] and capsys.readouterr().err.count("Traceback") >= 2


PARTS: dict[str, Any] = {
    "contract": {"ok": True},
    "logits": {"relative_error_eager": 0.01, "relative_error_graphs": 0.03},
    "graphs": {
        "captures": [8, 8],
        "captures_after_drop_and_restore": [8, 8],
        "same_in_chain": True,
        "same_after_restore": True,
    },
    "remap": {"drop_ms": 12.5},
    "decode": {"64": {"over_floor": 1.2, "exposed_host_share": 0.04}},
    "burst": {"recompute": {"ttft_p99_s": 12.0}, "drop": {"ttft_p99_s": 0.5}},
    "sanitizer": {"skipped": "not installed"},
    "steady": {"failed": "no"},
}


def test_targets() -> None:
    rows = {row["name"]: row for row in report.targets(PARTS)}
    met = {name: row["met"] for name, row in rows.items()}
    assert met["device contract"] and met["decode step over its floor, batch 64"]
    assert met["logits against float32, relative error"] is False
    assert met["compute-sanitizer"] is None and met["throughput dropped over undropped"] is None
    assert rows["TTFT p99 of recompute over drop"]["value"] == 24.0
    assert rows["graphs captured by drop and restore"] == {
        "name": "graphs captured by drop and restore",
        "target": "0",
        "value": 0,
        "met": True,
    }


@given(st.sets(st.sampled_from(sorted(PARTS))))
def test_every_report_can_be_written(names: set[str]) -> None:
    where = {
        "device": "X",
        "date": "2026-01-01",
        "memory_gib": 80,
        "compute_capability": "9.0",
        "torch": "2",
        "cuda": "13",
    }
    parts = {name: PARTS[name] for name in sorted(names)}
    result = {"environment": where, "quick": False, "parts": parts, "targets": report.targets(parts)}
    text = report.markdown(json.loads(json.dumps(result)))
    assert text.startswith("# X, 2026-01-01\n") and all(f"## {name}\n" in text for name in names)


def test_without_a_gpu_it_says_what_is_missing() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    script = Path(gpu_check.__file__)
    environment = os.environ | {"PYTHONPATH": str(script.parent.parent)}
    done = subprocess.run([sys.executable, script], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stderr.startswith("gpu_check: --devices cuda") and done.stderr.count("\n") == 1
