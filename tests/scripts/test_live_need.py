"""What scripts/live_need.py sends, and how much memory makes it the need that was asked for."""

from __future__ import annotations

import argparse
from pathlib import Path

import live_need
import pytest

from kunserve.loadgen.workload import Job


def arguments(**values: object) -> argparse.Namespace:
    default = {"trace": None, "lengths": None, "requests": 3, "seconds": 10.0, "seed": 0}
    return argparse.Namespace(**default | {"shrink": (8, 1), "longest": (100, 50)} | values)


def test_a_trace_is_shrunk_and_its_times_fill_the_seconds(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n5,80,4\n10,8000,60\n25,16,1\n")
    jobs = live_need.jobs_of(arguments(trace=trace))
    assert [job.at_s for job in jobs] == [0.0, 2.5, 10.0]
    assert [(job.num_prompt_tokens, job.num_output_tokens) for job in jobs] == [(10, 4), (100, 50), (2, 1)]


def test_lengths_come_at_random_times(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("num_prefill_tokens,num_decode_tokens\n80,4\n")
    jobs = live_need.jobs_of(arguments(lengths=lengths, requests=50))
    assert len(jobs) == 50 and {(job.num_prompt_tokens, job.num_output_tokens) for job in jobs} == {(10, 4)}
    assert 5.0 < jobs[-1].at_s < 20.0


def test_memory_follows_from_the_need() -> None:
    jobs = [Job(0.0, 60, 20)]  # five blocks of sixteen tokens
    assert live_need.blocks_for(4.0, 80, jobs, 2) == 10
    with pytest.raises(SystemExit, match="a need of 8 leaves 5 blocks to a device, the longest request needs 5"):
        live_need.blocks_for(8.0, 80, jobs, 2)


@pytest.mark.parametrize("text", ["8", "8,x", "0,1", "1,2,3"])
def test_a_pair_is_two_numbers_above_zero(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"two numbers|above zero"):
        live_need.pair(text)
