"""`kunserve plan`: what it says of capacity follows from sizes, its words from figures, and its figures from runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

from kunserve import cli
from kunserve.model.card import find_config
from kunserve.sim.cluster import Instances, parse_cluster
from kunserve.sim.plan.capacity import Capacity, Lengths, RequestRates
from kunserve.sim.plan.outlook import BASELINES, DROP, MORE_GPUS, ROWS, Outcome, Outlook, busiest
from kunserve.sim.policies import PLENTY
from kunserve.sim.traces import TraceRow

MODEL = find_config("qwen2.5-14b")
KV_BYTES = 2 * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_dim * 2  # of one token


def capacity(gpus: str) -> Capacity:
    return Capacity.of(MODEL, parse_cluster(gpus), 64)


@pytest.mark.parametrize(
    ("gpus", "num_copies", "gpus_per_copy"), [("4xL40S", 4, 1), ("4x4090", 2, 2), ("1xH200", 1, 1)]
)
def test_memory_is_shared_by_copies_and_kv(gpus: str, num_copies: int, gpus_per_copy: int) -> None:
    found, cluster = capacity(gpus), parse_cluster(gpus)
    assert (found.num_copies, found.gpus_per_copy) == (num_copies, gpus_per_copy)
    usable = 0.9 * cluster.memory_bytes * cluster.num_gpus
    assert found.kv_tokens * KV_BYTES == pytest.approx(usable - num_copies * found.weight_bytes, rel=0.05)
    freed = found.dropped_kv_tokens - found.kv_tokens
    assert freed * KV_BYTES == pytest.approx((num_copies - 1) * found.weight_bytes, rel=0.15, abs=1 << 30)
    assert sum(length for length, _ in found.chains) == num_copies


def test_rates_say_what_runs_out_first() -> None:
    found = capacity("4xL40S")
    cost = Instances.of(MODEL, parse_cluster("4xL40S")).cost(MODEL)
    long_answers = RequestRates.of(found, cost, MODEL.num_layers, Lengths(500, 1500))
    assert long_answers.kv < long_answers.dropped_kv < long_answers.compute
    long_prompts = RequestRates.of(found, cost, MODEL.num_layers, Lengths(4000, 10))
    assert long_prompts.kv / long_prompts.compute > 0.9 > long_answers.kv / long_answers.compute
    twice = RequestRates.of(capacity("8xL40S"), cost, MODEL.num_layers, Lengths(500, 1500))
    assert twice.kv == pytest.approx(2 * long_answers.kv) and twice.compute == pytest.approx(2 * long_answers.compute)


def outlook(need: float, rate: float = 5.0, num_copies: int = 4, **ttft_p99: float) -> Outlook:
    """Return an outlook of a cluster that can drop up to twice its KV, and carries 10 requests a second."""
    times = {DROP: 2.0, "recompute": 30.0, "swap": 20.0, MORE_GPUS: 10.0, PLENTY: 1.0} | ttft_p99
    outcomes = {name: Outcome(0.1, times[name], 0.5, 1000.0, 0, 0, 0) for name in ROWS}
    has = Capacity(1, num_copies, 1, 1000, 2, 1000, ((num_copies, 1000 if num_copies == 1 else 2000),))
    return Outlook(has, Lengths(100, 100), RequestRates(6.0, 8.0, 10.0), rate, 60.0, 0, need, outcomes)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (outlook(0.9), "Nothing to gain.*nobody waits for memory.*6.0 requests a second"),
        (outlook(0.9, rate=12.0), "Nothing to gain.*compute carries 10.0.*12.0 come"),
        (outlook(1.5, num_copies=1), "Nothing to drop.*one copy.*10 s, with swap 20 s"),
        (outlook(1.5, plenty=19.0), "Little to gain.*compute is what requests wait for"),
        (outlook(1.5, drop=25.0), "Nothing gained.*25 s with drops, 20 s with swap"),
        (outlook(1.5), "Much to gain.*1.50 times.*2.00 times.*2.00 s with drops instead of 20 s.*95 %"),
        (outlook(2.5), "Something to gain, not all.*2.50 times.*2.00 times"),
    ],
)
def test_words_follow_from_figures(found: Outlook, said: str) -> None:
    assert re.search(said, found.verdict()), found.verdict()


def test_the_busiest_part_of_a_trace_is_taken() -> None:
    rows = [TraceRow(float(i), 10 if 40 <= i < 60 else 1, 1) for i in range(100)]
    assert [row.at_s for row in busiest(rows, 19.0, 1000)] == [float(i) for i in range(40, 60)]
    assert len(busiest(rows, 19.0, 5)) == 5
    assert busiest(rows, 1e9, 1000) == rows and busiest([], 10.0, 10) == []


def test_a_plan_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"{i * 0.2},1500,400" for i in range(60)]
    trace.write_text("\n".join(["arrived_at,num_prefill_tokens,num_decode_tokens", *rows]))
    flags = ["plan", "--gpus", "2xL40S", "--model", "qwen2.5-14b", "--memory", "40", "--trace", str(trace)]
    cli.main([*flags, "--json", "--plot", str(tmp_path / "plan.png")])
    found = json.loads(capsys.readouterr().out)
    assert found["copies"] == 2 and found["outcomes"].keys() == set(ROWS)
    assert found["need"] > 1 and found["outcomes"][DROP]["num_drops"] >= 1
    best = min(found["outcomes"][name]["ttft_p99"] for name in BASELINES)
    assert found["outcomes"][DROP]["ttft_p99"] < best
    assert "to gain" in found["verdict"] and (tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpus", "4xH100", "--model", "qwen2.5-14b"], "how much load is it"),
        (["--gpus", "4xABC", "--model", "qwen2.5-14b", "--rate", "1"], "known GPUs are"),
        (["--gpus", "4xH100", "--model", "qwen", "--rate", "1"], "no model 'qwen'"),
        (["--gpus", "1x4090", "--model", "llama-70b", "--rate", "1"], "one instance of the model needs"),
        (["--gpus", "4xH100", "--model", "qwen2.5-14b", "--trace", "nowhere.csv"], "nowhere.csv: No such file"),
        (
            ["--gpus", "1xH100", "--model", "llama-8b", "--trace", "a.csv", "--workload", "sharegpt"],
            "has its own lengths",
        ),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *flags])
    line = ended.value.code if isinstance(ended.value.code, str) else capsys.readouterr().err
    assert said in line and len(line.splitlines()) == 1


def test_every_policy_gets_the_same_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "longbench"  # also the name of a workload
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,400000,20\n1,0,0\n")
    cli.main(["plan", "--gpus", "1xH100", "--model", "qwen2.5-14b", "--trace", str(trace), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["num_cut"] == 1 and found["mean_lengths"]["prompt"] < MODEL.max_position_embeddings
    assert len({outcome["ttft_p99"] for name, outcome in found["outcomes"].items() if name != MORE_GPUS}) == 1


def test_a_folder_needs_no_weights(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "tiny")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert find_config(str(folder)).num_layers > 0
