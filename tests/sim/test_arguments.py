"""What the simulator's command line refuses, each in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kunserve.sim.__main__ import parse_arguments
from kunserve.sim.options import Options, rows_of, simulate

TRACE = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
NUMBERS = [
    "--seed",
    "--duration",
    "--rate",
    "--scale",
    "--time-scale",
    "--burst-height",
    "--burst-length",
    "--memory",
    "--block-size",
    "--max-num-batched-tokens",
    "--max-num-seqs",
    "--watermark",
    "--host-step",
    "--host-token",
    "--restore-hold",
    "--nodes",
    "--pod-start",
    "--scale-at",
    "--most-nodes",
]


@pytest.mark.parametrize("flag", NUMBERS)
def test_every_number_is_checked_in_one_line(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("-3", "nan", "inf", "1e300", "many"):
        with pytest.raises(SystemExit, match="2"):
            parse_arguments([f"{flag}={value}"])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"kunserve simulate: argument {flag}: '{value}' is not a ")


@pytest.mark.parametrize("flag", ["--duration", "--rate", "--scale", "--time-scale", "--memory", "--block-size"])
def test_what_is_divided_by_is_not_zero(flag: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_arguments([flag, "0"])


def test_more_requests_than_a_run_can_end_with_are_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE + "0,5,3\n")
    for options in (Options(rate=1e6, duration_s=1e6), Options(workload=str(trace), scale=1e7)):
        with pytest.raises(ValueError, match="requests would come, more than 1,000,000"):
            rows_of(options)


def test_a_trace_of_one_request_has_a_report(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE + "0,5,3\n")
    assert simulate(replace(Options(cluster="2xA800"), workload=str(trace)))["finished"] == 1
