"""KV of 8 bits, simulated: how many tokens fit, how long reading them takes, and what is refused, as by a server."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_model

from kunserve import cli
from kunserve.config import EngineConfig, parse_devices
from kunserve.engine.launch.cuda_machine import CudaOptions
from kunserve.errors import ConfigError
from kunserve.gpu.kv_memory import E4M3
from kunserve.model.card import find_config
from kunserve.model.costs import device_rates
from kunserve.sim.cluster import GIB, parse_cluster
from kunserve.sim.machine import DTYPE, SimMachine
from kunserve.sim.options import Options, simulate
from kunserve.sim.plan.capacity import Capacity
from kunserve.sim.plan.command import figures, look, parse_arguments, show
from kunserve.sim.plan.outlook import DROP, WIDER

BLOCK = 64
LAYERS, KV_HEADS, HEAD_DIM = 48, 8, 128  # of qwen2.5-14b, by its card
MODEL = find_config("qwen2.5-14b")
LAYER_BYTES = 2 * (
    5120 * (2 * 5120 + 2 * 1024) + 3 * 5120 * 13824 + 5120 + 2 * 1024 + 2 * 5120
)  # with biases and norms
EMBED_BYTES, HEAD_BYTES = 2 * 152064 * 5120, 2 * (152064 * 5120 + 5120)
NAMES = [("fp8", 1), ("fp8_e4m3", 1), ("bfloat16", 2), ("auto", 2)]


def blocks_of(num_chunks: int, num_layers: int, chunk_bytes: int, number_bytes: int) -> int:
    """Blocks that `num_chunks` hold of so many layers, each layer in chunks of its own."""
    return num_chunks // num_layers * chunk_bytes // (2 * KV_HEADS * BLOCK * HEAD_DIM * number_bytes)


@pytest.mark.parametrize(("dtype", "number_bytes"), [(E4M3, 1), (DTYPE, 2)])
def test_tokens_that_fit_follow_from_bytes(dtype: torch.dtype, number_bytes: int) -> None:
    cluster = replace(parse_cluster("2xL40S"), memory_bytes=40 * GIB)
    found = Capacity.of(MODEL, cluster, BLOCK, dtype)
    chunk = SimMachine.of_gpus(MODEL, cluster, BLOCK, kv_dtype=dtype).chunk_bytes
    budget = int(40 * GIB * 0.9) // chunk
    layer, embed, head = (-(-num_bytes // chunk) for num_bytes in (LAYER_BYTES, EMBED_BYTES, HEAD_BYTES))
    assert found.kv_token_bytes == 2 * LAYERS * KV_HEADS * HEAD_DIM * number_bytes
    assert found.weight_bytes == (LAYERS * layer + embed + head) * chunk  # weights stay in 16 bits
    left = budget - LAYERS * layer - embed - head
    assert found.kv_tokens == 2 * BLOCK * blocks_of(left, LAYERS, chunk, number_bytes)
    chain = max(
        min(
            blocks_of(budget - first * layer - embed, first, chunk, number_bytes),
            blocks_of(budget - (LAYERS - first) * layer - head, LAYERS - first, chunk, number_bytes),
        )
        for first in range(1, LAYERS)
    )
    assert found.chains == ((2, chain * BLOCK),)


@pytest.mark.parametrize(("name", "number_bytes"), NAMES)
def test_reading_kv_takes_the_time_of_its_bytes(name: str, number_bytes: int, tmp_path: Path) -> None:
    """One request alone: each step reads the KV of all its tokens so far, in every layer."""
    trace = tmp_path / "trace.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,1000,500\n")
    options = Options(cluster="1xA800", workload=str(trace), policy="recompute")
    plain, report = simulate(options), simulate(replace(options, kv_cache_dtype=name))
    rates = device_rates()["a800"]
    num_keys = sum(range(1000, 1000 + 500))  # of the prompt, which is one step, and of 499 tokens after the first
    saved_bytes = num_keys * 2 * LAYERS * KV_HEADS * HEAD_DIM * (2 - number_bytes)
    saved_s = saved_bytes / (rates.bytes_per_s * rates.memory_share)
    assert plain["elapsed_s"] - report["elapsed_s"] == pytest.approx(saved_s, abs=2e-6)
    assert saved_s == 0 or saved_s > 0.03
    if name == "auto":
        assert json.dumps(report) == json.dumps(plain) and "kv_cache_dtype" not in report
    else:
        assert report["kv_cache_dtype"] == name
        assert report["kv_token_bytes"] == 2 * LAYERS * KV_HEADS * HEAD_DIM * number_bytes


def test_a_burst_needs_no_drop_in_half_the_bytes() -> None:
    burst = Options(cluster="2xL40S", memory_gib=40.0, workload="sharegpt", rate=5.0, duration_s=30.0)
    plain, eight = (simulate(replace(burst, kv_cache_dtype=name)) for name in ("bfloat16", "fp8"))
    assert [transition["kind"] for transition in plain["transitions"]][:1] == ["drop"]
    assert eight["transitions"] == [] and eight["finished"] == eight["requests"] == plain["requests"]
    assert eight["memory"]["kv_tokens"] == 2 * plain["memory"]["kv_tokens"]
    assert eight["tpot_s"]["p50"] < plain["tpot_s"]["p50"]


def server_refuses(folder: str, name: str) -> str:
    """What a server on GPUs says to the flag."""
    config = EngineConfig(folder, parse_devices("cuda"), kv_cache_dtype=name, dtype="bfloat16")

    def start() -> None:
        config.check()
        CudaOptions.of(find_config(folder), config)

    with pytest.raises(ConfigError) as error:
        start()
    return error.value.message


@pytest.mark.parametrize(
    ("head_dim", "name"), [(64, "int8"), (64, "fp8_e5m2"), (64, "float16"), (96, "fp8"), (192, "fp8_e4m3")]
)
def test_what_a_server_refuses_is_refused_in_its_words(
    head_dim: int, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(make_tiny_model("llama", tmp_path / "tiny", head_dim=head_dim))
    said = server_refuses(folder, name)
    for start, command in (
        ("error: ", ["simulate", "--cluster", "2xA800", "--rate", "1", "--duration", "2"]),
        ("kunserve plan: ", ["plan", "--gpus", "2xA100-40", "--rate", "1", "--duration", "2"]),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, "--model", folder, "--kv-cache-dtype", name])
        assert ended.value.code == start + said and "\n" not in said
    assert capsys.readouterr().out == ""


def test_heads_that_a_server_takes_are_simulated(tmp_path: Path) -> None:
    folder = str(make_tiny_model("llama", tmp_path / "tiny", head_dim=64))
    options = Options(cluster="1xA800", model=folder, rate=4.0, duration_s=2.0, kv_cache_dtype="fp8")
    assert simulate(options)["kv_cache_dtype"] == "fp8"


def test_a_plan_compares_both(capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--workload", "sharegpt", "--rate", "5", "--duration", "8"]
    flags = ["--gpus", "2xL40S", "--model", "qwen2.5-14b", "--memory", "40", *load]
    cli.main(["plan", *flags, "--json"])
    plain: dict[str, Any] = json.loads(capsys.readouterr().out)
    values = parse_arguments([*flags, "--kv-cache-dtype", "fp8"])
    outlook, _ = look(values)
    eight = figures(values, outlook)
    assert not {"kv_cache_dtype", "kv_token_bytes", "kv_in_16_bits"} & plain.keys() and WIDER not in plain["outcomes"]
    assert (eight["kv_cache_dtype"], eight["kv_token_bytes"]) == ("fp8", 98_304)
    same = {name: plain[name] for name in ("kv_tokens", "dropped_kv_tokens")}
    assert eight["kv_in_16_bits"] == {"kv_token_bytes": 196_608} | same
    assert eight["outcomes"][WIDER] == plain["outcomes"][DROP] != eight["outcomes"][DROP]
    assert eight["kv_tokens"] == 2 * plain["kv_tokens"] and eight["need"] < 0.6 * plain["need"]
    assert eight["rates"]["compute"] > plain["rates"]["compute"]
    show(values, outlook)
    assert (
        "A token of KV takes 98,304 bytes (fp8); in 16 bits it takes 196,608, and there would be 90,112 tokens, "
        "236,544 after the largest drop." in re.sub(r"\s+", " ", capsys.readouterr().out)
    )
