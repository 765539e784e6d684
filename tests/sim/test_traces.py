"""Trace files in every public format, and what becomes of them when they are scaled."""

from __future__ import annotations

from pathlib import Path

import pytest
from numpy.random import default_rng

from kunserve.sim.traces import TraceRow, pick_rows, read_rows, stretch, upscale

FILES = {
    "azure2023.csv": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:05.4799600,3180,8\n",
        [(0.0, 4808, 10), (1.5, 3180, 8)],
    ),
    "azure2024.csv": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:00.509930+00:00,2399,6\n",
        [(0.0, 2162, 5), (0.5, 2399, 6)],
    ),
    "burstgpt.csv": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,0,1087,API log\n118,ChatGPT,417,276,693,API log\n",
        [(0.0, 472, 18), (113.0, 417, 276)],  # the one without an answer failed
    ),
    "mooncake.jsonl": (
        '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46]}\n'
        '{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46, 47]}\n',
        [(0.0, 6955, 52), (3.053, 6472, 26)],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_public_formats(name: str, tmp_path: Path) -> None:
    text, expected = FILES[name]
    path = tmp_path / name
    path.write_text(text)
    rows = read_rows(path, needs_times=True)
    assert [(r.num_prompt_tokens, r.num_output_tokens) for r in rows] == [row[1:] for row in expected]
    assert [r.at_s for r in rows] == pytest.approx([row[0] for row in expected], abs=1e-6)


def test_hash_ids_stay_with_their_rows_and_copies_have_their_own(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    path.write_text(FILES["mooncake.jsonl"][0])
    rows = read_rows(path, needs_times=True)
    assert [row.hash_ids for row in rows] == [(46,), (46, 47)]
    assert [row.hash_ids for row in stretch(rows, 2.0)] == [(46,), (46, 47)]
    assert [row.hash_ids for row in pick_rows(rows, (1.0, 9.0), None, default_rng(0))] == [(46, 47)]
    assert [row.hash_ids for row in upscale(rows, 2.0, default_rng(0))] == [(46,), (94,), (46, 47), (94, 95)]


def test_lengths_need_no_times(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n74,918\n")
    assert read_rows(path, needs_times=False) == [TraceRow(0.0, 74, 918)]
    with pytest.raises(ValueError, match="no column TIMESTAMP"):
        read_rows(path, needs_times=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "line 1: no timestamp"),
        ('{"timestamp": 1, "input_length": 3}', "line 1: no output_length"),
        ('{"timestamp": 1, "input_length": "many", "output_length": 1}', "line 1, input_length: 'many'"),
        ('{"timestamp": 1, "input_length": 3, "output_length": 1, "hash_ids": [-1]}', "line 1: hash_ids is not a list"),
        ('{"timestamp": 1, "input_length": 3, "output_length": 1, "hash_ids": 7}', "line 1: hash_ids is not a list"),
    ],
)
def test_a_malformed_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_rows(path, needs_times=True)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.5])
def test_scaling_keeps_times_and_order(scale: float) -> None:
    rows = [TraceRow(float(i), i, 1) for i in range(4000)]
    scaled = upscale(rows, scale, default_rng(0))
    assert len(scaled) == pytest.approx(4000 * scale, rel=0.05)
    assert [row.at_s for row in scaled] == sorted(row.at_s for row in scaled)
    assert set(scaled) <= set(rows)
    assert scaled == upscale(rows, scale, default_rng(0))


def test_stretching_changes_the_rate_only() -> None:
    assert stretch([TraceRow(2.0, 3, 4)], 2.5) == [TraceRow(5.0, 3, 4)]
