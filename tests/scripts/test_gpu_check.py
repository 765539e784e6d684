"""The GPU check's own code, on devices that are not there: every part runs, and its report says what was measured."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch
from fake_cuda import FakeCuda
from fake_gpus import Gpus
from gpucheck import forward, memory, packed, report, serving, worker
from gpucheck.bench import BLOCK_SIZE, Bench, llama_1b
from gpucheck.likelihood import likelihood
from gpucheck.worker import tell
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_tiny_model

from kunserve.compute.cuda import decoder as cuda_decoder
from kunserve.compute.cuda.arrays import StepBuffers
from kunserve.compute.cuda.attention import ReferenceAttention
from kunserve.compute.cuda.graphs import DecodeGraphs
from kunserve.config import DeviceSpec, EngineConfig
from kunserve.gpu.cuda.driver import Driver
from kunserve.gpu.kv_memory import E4M3, KVShape
from kunserve.model.config import ModelConfig
from kunserve.model.host_copy import HostCopy
from kunserve.policies import OverloadPolicy

TINY = ModelConfig("llama", 100, 32, 48, 8, 2, 1, 16, 2048)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A GPU without a GPU: reference attention for half types too, and graphs that run again."""

    def load_attention(config: ModelConfig, shape: KVShape, dtype: torch.dtype, buffers: StepBuffers, _: int) -> Any:
        return ReferenceAttention(shape.block_size, buffers), "reference"

    make = cuda_decoder.cuda_decoder

    def with_graphs(config: ModelConfig, *args: Any, enforce_eager: bool, dtype: torch.dtype, **kwargs: Any) -> Any:
        decoder, note = make(config, *args, enforce_eager=enforce_eager, dtype=dtype, **kwargs)
        if not enforce_eager:
            driver = kwargs["driver"]
            decoder.graphs = DecodeGraphs(
                args[3].max_num_seqs, config.hidden_size, dtype, driver.torch_device, driver.capture
            )
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
    rounded = forward.logits(bench, TINY, kv_dtype=E4M3)  # some keys and values come out a step apart
    assert rounded.keys() == errors.keys() and all(0 < error < 0.1 for error in rounded.values())
    assert rounded != errors
    assert forward.graphs(bench, TINY) == {
        "captures": [36, 36],  # two runs and their eight layers at three batch sizes, what is before and after them
        "captures_after_drop_and_restore": [36, 36],
        "same_tokens": True,
        "same_in_chain": True,
        "same_after_restore": True,
    }


def test_figures(bench: Bench) -> None:
    decode = forward.decode(bench, TINY)
    assert set(decode) == {"bandwidth_gb_per_s", "1", "3"} and decode["3"]["floor_ms"] > decode["1"]["floor_ms"]
    assert all(math.isfinite(v) and v >= 0 for v in decode["3"].values())
    assert forward.prefill(bench, TINY)["tokens"] == 256
    errors = forward.kernels(bench)  # torch against itself
    assert errors["rms_norm"] == 0 and errors["KV of 8 bits 128, bytes that differ"] == 0


def test_packed_figures(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "ROWS", (1, 3))
    figures = packed.products(bench)
    assert {name for name in figures if name != "kernels"} == {f"{form}, {n}" for form in packed.FORMS for n in (1, 3)}
    worst = max(packed.worst_error(figures, is_fp8=is_fp8) for is_fp8 in (False, True))
    assert 0 < worst < 5e-3 and all(figures[name]["us"] > 0 for name in figures if name != "kernels")
    targets = {row["name"]: row["met"] for row in report.targets({"packed": figures})}
    assert targets["packed products, relative error"] and targets["FP8 products, relative error"]
    wide = replace(TINY, hidden_size=128, intermediate_size=256, num_heads=2, head_dim=64)
    in_four_bits, in_16_bits = (  # what a step reads at least, in MB: the speed of memory is measured for each anew
        figures["1"]["floor_ms"] * figures["bandwidth_gb_per_s"]
        for figures in (packed.decode(bench, wide), forward.decode(bench, wide))
    )
    assert in_four_bits < in_16_bits


def test_the_1b_shape_has_about_as_many_weights() -> None:
    config = llama_1b()
    layer = (
        2 * config.hidden_size * (config.q_size + config.kv_size) + 3 * config.hidden_size * config.intermediate_size
    )
    assert 1.0e9 < config.num_layers * layer + config.vocab_size * config.hidden_size < 1.4e9


@pytest.mark.parametrize(("host_copy", "loaded_from"), [(HostCopy.MAPPED, "host"), (HostCopy.NONE, "mate")])
async def test_serving_parts_on_cpu_devices(host_copy: HostCopy, loaded_from: str) -> None:
    """The engine is the same; only the devices are others."""
    config = serving.engine_config(
        DeviceSpec("cpu", (0, 1)), "smollm2-135m", num_blocks=40, is_pinned=True, num_batched_tokens=64
    )
    config = replace(config, max_model_len=400, host_copy=host_copy)
    result = await serving.regroup(config, num_requests=2, num_tokens=24)
    assert result["same_tokens"] and not result["errors"]
    assert [t["kind"] for t in result["transitions"]] == ["drop", "restore"]
    assert [list(t["weight_sources"]) for t in result["transitions"]] == [[], [loaded_from]]


@pytest.mark.parametrize("has_transformers", [True, False])
async def test_a_text_is_as_likely_in_every_grouping(
    has_transformers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPU devices it is, to the last bit; and as likely as transformers finds it, where that is installed."""
    model = str(make_tiny_model("llama", tmp_path / "tiny", num_hidden_layers=4))
    if not has_transformers:
        monkeypatch.setitem(sys.modules, "transformers", None)
    config = serving.engine_config(
        DeviceSpec("cpu", (0, 1)), model, num_blocks=40, is_pinned=True, num_batched_tokens=64
    )
    config = replace(config, max_model_len=400, chunk_bytes=64 << 10)
    found = await likelihood(config, text_len=50, num_tokens=64)
    assert list(found) == ["reference", "launch", "drop", "restore", "second drop", "generated"]
    assert found["reference"].startswith("transformers " if has_transformers else "KunServe on a CPU device: no tran")
    states = [state for name, state in found.items() if name != "reference"]
    assert all(state["nll_per_token"] > 1 and state["change"]["max"] == 0 for state in states)
    assert all(state["change"]["num"] > 2 * 50 for state in states)  # others than the text's own are compared
    assert all(state["error"]["max"] == 0 or (has_transformers and state["error"]["max"] < 1e-4) for state in states)
    rows = [row for row in report.targets({"likelihood": found}) if row["value"] is not None]
    assert len(rows) == 2 and all(row["name"].startswith("likelihood") and row["met"] for row in rows)


async def test_the_embedded_model_finds_a_text_as_likely_as_transformers_does() -> None:
    devices = DeviceSpec("cpu", (0, 1))
    config = serving.engine_config(devices, "smollm2-135m", num_blocks=40, is_pinned=True, num_batched_tokens=64)
    found = await likelihood(replace(config, max_model_len=400, dtype="float32"), text_len=24, num_tokens=24)
    assert found.pop("reference").startswith("transformers ")
    assert all(state["change"]["max"] == 0 and state["error"]["max"] < 1e-3 for state in found.values())


async def test_host_time_and_throughput_on_a_gpu_that_is_not_there(
    bench: Bench, gpus: Gpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(serving, "STEADY_S", 0.3)
    model = str(make_tiny_model("llama", tmp_path / "tiny", num_hidden_layers=4, max_position_embeddings=4096))

    def config(num_devices: int) -> EngineConfig:
        devices = DeviceSpec("cuda", (0,) * num_devices)
        found = serving.engine_config(
            devices, model, memory_bytes=24 << 20, dtype="float32", is_pinned=True, num_batched_tokens=64
        )
        return replace(found, max_model_len=None)

    figures = await serving.host(bench, config(1), num_requests=3, prompt_len=20)
    assert figures["batch"] == 3 and figures["context"] > 20
    assert figures["gpu_ms"] > 0 and figures["step_ms"] > 0 and 0 <= figures["exposed_share"] < 1
    assert 0 <= figures["hidden_share"] <= 1
    figures = await serving.steady(config(2), num_requests=2, prompt_len=20)
    assert figures["share"] == figures["tokens_per_s_dropped"] / figures["tokens_per_s"] > 0
    assert figures["drop"]["outcome"] == "done"


@pytest.mark.parametrize(("policy", "num_stages"), [(OverloadPolicy.DROP, None), (OverloadPolicy.RECOMPUTE, 4)])
async def test_a_burst_on_four_cpu_devices(tmp_path: Path, policy: OverloadPolicy, num_stages: int | None) -> None:
    model = str(make_tiny_model("llama", tmp_path / "tiny", num_hidden_layers=4))
    config = serving.engine_config(
        DeviceSpec("cpu", (0, 1, 2, 3)), model, num_blocks=24, policy=policy, num_stages=num_stages
    )
    config = replace(config, max_model_len=200, chunk_bytes=64 << 10)
    load = serving.Burst(num_requests=48, rate=1e3, prompt_len=40, num_tokens=8, limit_s=60.0)
    figures = await serving.burst(config, load)
    assert figures["demand_tokens"] == 48 * 48
    assert (0 < figures["kv_tokens"] < figures["demand_tokens"]) == (num_stages is None)
    assert not figures["errors"] and not figures["unfinished"]
    assert 0 < figures["ttft_p50_s"] <= figures["ttft_p99_s"] and figures["tokens_per_s"] > 0


@pytest.mark.parametrize("num_devices", [1, 4, 7])
def test_a_burst_overloads_whatever_the_gpu_has(num_devices: int) -> None:
    load = serving.Burst(num_requests=120, rate=30.0, prompt_len=768, num_tokens=192, limit_s=30.0)
    held = load.too_few_blocks(num_devices) * num_devices * BLOCK_SIZE
    assert 0.5 * load.demand_tokens < held < 0.7 * load.demand_tokens


async def test_a_burst_that_fits_measures_nothing(tmp_path: Path) -> None:
    model = str(make_tiny_model("llama", tmp_path / "tiny", num_hidden_layers=4))
    config = replace(serving.engine_config(DeviceSpec("cpu", (0,)), model, num_blocks=400), chunk_bytes=64 << 10)
    load = serving.Burst(num_requests=2, rate=1e3, prompt_len=40, num_tokens=8, limit_s=20.0)
    with pytest.raises(RuntimeError, match=r"no overload: .* for a demand of 96"):
        await serving.burst(replace(config, max_model_len=200), load)


WORKER = """
import os, time
from gpucheck.worker import serve, tell
def ok():
    print("not an answer")
    return {"pid": os.getpid()}
def late():
    tell({"first": 1})
    tell({"second": 2})
    os.abort()  # as when a device is closed
serve({"late": late, "ok": ok, "bad": lambda: 1 // 0, "gone": lambda: os._exit(7), "slow": lambda: time.sleep(600)})
"""


def run_parts(*names: str, budget_s: float = 60.0, part_limit_s: float = 30.0) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-c", WORKER]
    found = worker.run_parts(names, command, budget_s=budget_s, limit_s=60.0, part_limit_s=part_limit_s)
    return {f"{i} {name}": result for i, (name, result) in enumerate(found)}


def test_parts_that_fail_or_take_their_process_with_them_do_not_end_the_rest(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(gpu_check.__file__).parent))
    results = run_parts("ok", "ok", "bad", "ok", "gone", "ok")
    pids = [result["pid"] for result in results.values() if "pid" in result]
    assert len(pids) == 4 and pids[0] == pids[1] and len(set(pids)) == 3  # anew after each that failed
    assert results["2 bad"]["failed"].startswith("ZeroDivisionError") and results["2 bad"]["seconds"] >= 0
    assert results["4 gone"] == {"failed": "its process ended with status 7"}
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_what_a_part_has_told_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(gpu_check.__file__).parent))
    [result] = run_parts("late").values()
    assert result == {"first": 1, "second": 2, "failed": "its process ended with status -6"}
    assert tell({"a": 3}) == {"a": 3}  # elsewhere nobody is told


def test_a_part_that_hangs_is_stopped_and_one_without_time_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(gpu_check.__file__).parent))
    assert run_parts("slow", part_limit_s=0.1) == {"0 slow": {"failed": "stopped after 0 s"}}
    assert "no time left" in run_parts("ok", budget_s=-1.0)["0 ok"]["skipped"]


WHERE = {"date": "2026-01-02"} | dict.fromkeys(("memory_gib", "compute_capability", "torch", "cuda"), "?")


def test_what_is_kept_has_device_and_date(tmp_path: Path) -> None:
    where = WHERE | {"device": "NVIDIA H100 80GB HBM3"}
    gpu_check.write(tmp_path, {"environment": where, "quick": False, "parts": PARTS, "targets": report.targets(PARTS)})
    names = ["nvidia-h100-80gb-hbm3-2026-01-02.json", "nvidia-h100-80gb-hbm3-2026-01-02.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert json.loads((tmp_path / names[0]).read_text())["environment"] == where


def test_the_whole_script(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    serve = "from gpucheck.worker import serve; serve({'contract': lambda: {'ok': True}, 'remap': lambda: 1 // 0})"
    where = WHERE | {"device": "X"}
    monkeypatch.setenv("PYTHONPATH", str(Path(gpu_check.__file__).parent))
    monkeypatch.setattr(gpu_check, "environment", lambda ordinal: where)
    monkeypatch.setattr(gpu_check, "worker_command", lambda ordinal, is_quick: [sys.executable, "-c", serve])
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--parts", "remap,contract", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_status:
        gpu_check.main()
    assert exit_status.value.code == 1  # a part has failed
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "x-2026-01-02.json").read_text())
    assert result["environment"] == where and result["parts"]["contract"]["ok"]
    assert "ZeroDivisionError" in result["parts"]["remap"]["failed"]
    assert (tmp_path / "x-2026-01-02.md").read_text().count("| device contract | passes | True | yes |")


def test_every_target_is_of_a_part_that_exists(bench: Bench) -> None:
    parts = gpu_check.parts_of(bench)

    class Asked(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            asked.add(name)
            raise KeyError(name)

    asked: set[str] = set()
    report.targets(Asked())
    assert asked and asked <= set(parts)


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
    "host": {"exposed_share": 0.06},
    "burst_recompute": {"ttft_p99_s": 12.0},
    "burst_drop": {"ttft_p99_s": 0.5},
    "sanitizer": {"skipped": "not installed"},
    "steady": {"failed": "no"},
}


def test_targets() -> None:
    rows = {row["name"]: row for row in report.targets(PARTS)}
    met = {name: row["met"] for name, row in rows.items()}
    assert met["device contract"] and met["decode step over its floor, batch 64"]
    assert met["logits against float32, relative error"] is False
    assert met["host time not hidden, share of a step"] is False
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


def test_a_worker_launches_on_the_gpu_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the GPU that is current: parts that launch by themselves would meet tensors of another one."""
    current, served = list[int](), list[int]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(gpu_check, "serve", lambda parts: served.append(current[-1] if current else 0))
    for ordinal in (1, 0, 3):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--worker", "--ordinal", str(ordinal)])
        gpu_check.main()
    assert served == [1, 0, 3]
