"""How the results of benchmark clients are read, and what counts as a failure. The clients are stand-ins."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bench_clients
import pytest
from bench_clients import CLIENTS, Outcome, Target

VLLM = {"completed": 30, "failed": 0, "median_ttft_ms": 12.5, "output_throughput": 99.0}
AIPERF = {
    "request_count": {"avg": 30.0},
    "time_to_first_token": {"p50": 12.5},
    "output_token_throughput": {"avg": 99.0},
    "error_summary": [],
    "was_cancelled": False,
}


def guidellm(errored: int = 0, incomplete: int = 0) -> dict[str, Any]:
    totals = {"successful": 20 - errored - incomplete, "errored": errored, "incomplete": incomplete}
    metrics = {
        "request_totals": totals,
        "time_to_first_token_ms": {"successful": {"median": 12.5}},
        "output_token_count": {"successful": {"total_sum": 198.0}},
    }
    times = {"request_start_time": 10.0, "request_end_time": 12.0}
    return {"benchmarks": [{"metrics": metrics, "scheduler_metrics": times}]}


def run(tmp_path: Path, name: str, result: object, code: int = 0) -> Outcome:
    """The client of that name, which notes its arguments and leaves `result`."""
    client = CLIENTS[name]
    path = client.result.replace("*", "some")
    program = tmp_path / "bin" / client.program
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport os, sys, pathlib\npath = pathlib.Path({path!r})\n"
        f"path.parent.mkdir(parents=True, exist_ok=True)\npath.write_text({json.dumps(result)!r})\n"
        f"pathlib.Path({str(tmp_path / 'seen')!r}).write_text(repr((sys.argv[1:], 'PYTHONPATH' in os.environ)))\n"
        f"print('what went wrong')\nsys.exit({code})\n"
    )
    program.chmod(0o700)
    folder = tmp_path / "folder"
    folder.mkdir()
    return bench_clients.run_client(client, tmp_path, Target("http://h:1", "m", Path("/to kens")), folder)


@pytest.mark.parametrize(
    ("name", "result", "num"),
    [("vllm completions", VLLM, 30), ("vllm chat", VLLM, 30), ("aiperf", AIPERF, 30), ("guidellm", guidellm(), 20)],
)
def test_results(tmp_path: Path, name: str, result: object, num: int) -> None:
    assert run(tmp_path, name, result) == Outcome(num, 0, 12.5, 99.0)
    seen = (tmp_path / "seen").read_text()
    assert "http://h:1" in seen and "/to kens" in seen and seen.endswith(", False)")


@pytest.mark.parametrize(
    ("name", "result", "failed"),
    [
        ("vllm chat", {**VLLM, "completed": 28, "failed": 2}, 2),
        ("aiperf", {**AIPERF, "error_summary": [{"count": 30}], "request_count": {"avg": 0.0}}, 30),
        ("guidellm", guidellm(errored=1, incomplete=2), 3),
    ],
)
def test_failed_requests(tmp_path: Path, name: str, result: object, failed: int) -> None:
    assert run(tmp_path, name, result).failed == failed


def test_runs_that_did_not_come_to_their_end(tmp_path: Path) -> None:
    for number, (result, code, why) in enumerate(
        [
            ({**VLLM, "completed": 7}, 0, "only 7 requests"),
            (VLLM, 3, "exit code 3, 1 results: what went wrong"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert why in (run(folder, "vllm chat", result, code).problem or "")
    cancelled = tmp_path / "cancelled"
    cancelled.mkdir()
    assert run(cancelled, "aiperf", {**AIPERF, "was_cancelled": True}).problem
    missing = bench_clients.run_client(CLIENTS["aiperf"], tmp_path, Target("u", "m", Path("t")), tmp_path)
    assert "No such file" in (missing.problem or "")


@pytest.mark.parametrize(
    ("outcomes", "code"), [({}, 1), ({"a": Outcome(3)}, 0), ({"a": Outcome(3, 1)}, 1), ({"a": Outcome(problem="x")}, 1)]
)
def test_exit_codes(
    outcomes: dict[str, Outcome], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def measure(_: object) -> dict[str, Outcome]:
        return outcomes

    monkeypatch.setattr(bench_clients, "measure", measure)
    with pytest.raises(SystemExit) as caught:
        bench_clients.main(["m", "--venv", "aiperf=/x"])
    assert caught.value.code == code
    assert json.loads(capsys.readouterr().out)["ok"] is (code == 0)


def test_environments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_clients.parse_arguments(["m", "--venv", "vllm=/x"]).venv == [("vllm", Path("/x"))]
    with pytest.raises(SystemExit):
        bench_clients.parse_arguments(["m", "--venv", "other=/x"])
    assert "not CLIENT=FOLDER" in capsys.readouterr().err
