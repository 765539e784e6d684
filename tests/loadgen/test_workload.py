from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kunserve.loadgen import command
from kunserve.loadgen.arguments import build_parser
from kunserve.loadgen.client import Target, request_body
from kunserve.loadgen.workload import (
    Job,
    Segment,
    Span,
    burst_arrivals,
    make_jobs,
    parse_segments,
    poisson_arrivals,
    stream_of,
)
from kunserve.sim.traces import pick_rows, read_rows

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:05.4799600,3180,8
2023-11-16 18:17:04.4799600,110,27
"""
SHAREGPT = """num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio
74,918,992,0.0806100217864923
290,905,1195,0.3204419889502762
"""


def test_arrivals_follow_from_the_seed() -> None:
    def times(seed: int) -> list[float]:
        return poisson_arrivals(2.0, 2000, stream_of(seed, 0))

    assert times(1) == times(1) != times(2)
    assert times(1) == sorted(times(1))
    assert times(1)[-1] / 2000 == pytest.approx(0.5, rel=0.1)


def test_a_burst_has_each_segments_rate() -> None:
    segments = parse_segments("100:2,10:50,20:0,100:2")
    assert segments[1] == Segment(10.0, 50.0)
    times = np.asarray(burst_arrivals(segments, None, stream_of(3, 0)))
    counts, _ = np.histogram(times, bins=[0, 100, 110, 130, 230])
    assert counts.sum() == len(times) and (np.diff(times) > 0).all()
    assert counts.tolist() == [pytest.approx(200, rel=0.2), pytest.approx(500, rel=0.2), 0, pytest.approx(200, rel=0.2)]
    assert burst_arrivals(segments, 17, stream_of(3, 0)) == times[:17].tolist()


@pytest.mark.parametrize("text", ["", "30", "30:x", "0:4", "-1:4", "30:-1", "30:0", "30:4,", "inf:1", "nan:1"])
def test_malformed_segments(text: str) -> None:
    with pytest.raises(ValueError, match="'"):
        parse_segments(text)


def test_spans() -> None:
    assert Span.parse("64") == Span(64, 64)
    assert Span.parse("64:256") == Span(64, 256)
    for text in ("", "a", "0", "5:4", "1:2:3", "-3"):
        with pytest.raises(ValueError, match="'"):
            Span.parse(text)


def test_azure_rows_come_in_order_from_second_zero(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    rows = read_rows(path, needs_times=True)
    assert [(round(r.at_s, 6), r.num_prompt_tokens, r.num_output_tokens) for r in rows] == [
        (0.0, 4808, 10),
        (0.5, 110, 27),
        (1.5, 3180, 8),
    ]


def test_sharegpt_lengths_have_no_times(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text(SHAREGPT)
    assert [(r.num_prompt_tokens, r.num_output_tokens) for r in read_rows(path, needs_times=False)] == [
        (74, 918),
        (290, 905),
    ]
    with pytest.raises(ValueError, match=r"lengths.csv has no column TIMESTAMP or arrived_at"):
        read_rows(path, needs_times=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TIMESTAMP,x\n1,2\n", "no column ContextTokens or num_prefill_tokens"),
        ("TIMESTAMP,ContextTokens\n1,2\n", "no column GeneratedTokens or num_decode_tokens"),
        (AZURE.splitlines()[0], "has no rows"),
        (AZURE + "2023-11-16 18:17:05,12,many\n", "line 5, GeneratedTokens: 'many' is not a number of tokens"),
        (AZURE + "2023-11-16 18:17:05,-12,3\n", "line 5, ContextTokens: '-12'"),
        (AZURE + "2023-11-16 18:17:05,12\n", "line 5, GeneratedTokens: ''"),
        (AZURE + "yesterday,12,3\n", "line 5, TIMESTAMP: 'yesterday' is not a time"),
        (AZURE + "inf,12,3\n", "line 5, TIMESTAMP: 'inf' is not a time"),
    ],
)
def test_a_malformed_trace_names_file_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"trace\.csv") as caught:
        read_rows(path, needs_times=True)
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.csv", "binary.csv"):
        with pytest.raises(ValueError, match=f"cannot read .*{name}"):
            read_rows(tmp_path / name, needs_times=False)
    with pytest.raises(ValueError, match=f"^cannot read {tmp_path}: Is a directory$"):  # its path once
        read_rows(tmp_path, needs_times=False)


def test_rows_are_windowed_and_thinned(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(f"{i},{i + 1},1\n" for i in range(100))
    )
    rows = read_rows(path, needs_times=True)
    part = pick_rows(rows, (10.0, 60.0), None, stream_of(0, 0))
    assert [r.num_prompt_tokens for r in part] == list(range(11, 61)) and part[0].at_s == 0.0
    thin = pick_rows(rows, (10.0, 60.0), 7, stream_of(0, 0))
    assert (
        thin == pick_rows(rows, (10.0, 60.0), 7, stream_of(0, 0)) != pick_rows(rows, (10.0, 60.0), 7, stream_of(1, 0))
    )
    assert len(thin) == 7 and set(thin) <= set(part) and thin == sorted(thin, key=lambda r: r.at_s)
    with pytest.raises(ValueError, match="no rows from second 200 to 300"):
        pick_rows(rows, (200.0, 300.0), None, stream_of(0, 0))


def test_jobs_are_clipped_and_a_share_of_them_leaves() -> None:
    jobs = make_jobs([0.0] * 100, [(0, 50), (900, 1)] * 50, (500, 20), 0.33, stream_of(0, 2))
    assert {(j.num_prompt_tokens, j.num_output_tokens) for j in jobs} == {(1, 20), (500, 1)}
    leaving = [j for j in jobs if j.cancel_after is not None]
    assert len(leaving) == 33
    assert all(1 <= j.cancel_after < max(j.num_output_tokens, 2) for j in leaving if j.cancel_after is not None)


def workload(*argv: str) -> list[Job]:
    return command.make_workload(build_parser("", "").parse_args(argv))


def test_workload_from_flags(tmp_path: Path) -> None:
    trace, lengths = tmp_path / "azure.csv", tmp_path / "lengths.csv"
    trace.write_text(AZURE)
    lengths.write_text(SHAREGPT)
    assert [j.at_s for j in workload("--arrival", "fixed", "--rate", "4", "--num-requests", "3")] == [0.0, 0.25, 0.5]
    assert [j.at_s for j in workload("--num-requests", "2")] == [0.0, 0.0]
    scaled = workload("--trace", str(trace), "--time-scale", "10", "--max-input", "1000")
    assert [round(j.at_s, 6) for j in scaled] == [0.0, 5.0, 15.0]
    assert [j.num_prompt_tokens for j in scaled] == [1000, 110, 1000]
    drawn = workload("--rate", "1", "--lengths-csv", str(lengths), "--num-requests", "40")
    assert {(j.num_prompt_tokens, j.num_output_tokens) for j in drawn} == {(74, 918), (290, 905)}
    spans = workload("--num-requests", "200", "--input-len", "2:4", "--output-len", "7")
    assert {j.num_prompt_tokens for j in spans} == {2, 3, 4} and {j.num_output_tokens for j in spans} == {7}
    assert workload("--rate", "1", "--seed", "5") == workload("--rate", "1", "--seed", "5") != workload("--rate", "1")
    longer = workload("--rate", "1", "--input-len", "9:99")
    assert [j.at_s for j in longer] == [j.at_s for j in workload("--rate", "1")]


def test_chats_have_turns_and_share_system_prompts() -> None:
    asked = ("--prompt-mode", "chat", "--num-requests", "3", "--turns", "2", "--system-len", "40", "--num-systems", "2")
    jobs = workload(*asked)
    assert [(j.chat, j.turn, j.system) for j in jobs] == [
        (0, 0, 0),
        (0, 1, 0),
        (1, 0, 1),
        (1, 1, 1),
        (2, 0, 0),
        (2, 1, 0),
    ]
    assert {j.num_system_tokens for j in jobs} == {40}
    with pytest.raises(ValueError, match="need --prompt-mode chat"):
        workload("--turns", "2")


@pytest.mark.parametrize("kind", ["trace", "burst", "fixed", "poisson"])
def test_an_arrival_without_its_flag(kind: str) -> None:
    with pytest.raises(ValueError, match=f"--arrival {kind} needs --"):
        workload("--arrival", kind)


def test_prompts_of_a_mooncake_trace_begin_alike_as_its_hash_ids_say(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    rows = [(1000, [7, 8]), (1300, [7, 8, 9]), (600, [7, 5]), (900, [6])]
    path.write_text(
        "\n".join(
            json.dumps({"timestamp": i, "input_length": length, "output_length": 4, "hash_ids": ids})
            for i, (length, ids) in enumerate(rows)
        )
    )
    args = build_parser("loadgen", "").parse_args(["--trace", str(path)])
    jobs = command.make_workload(args)
    assert [job.hash_ids for job in jobs] == [tuple(ids) for _, ids in rows]
    for mode, in_words in (("ids", False), ("text", True)):
        target = Target(("http://x",), "m", mode, seed=3)  # type: ignore[arg-type]
        prompts = [json.loads(request_body(target, job, i))["prompt"] for i, job in enumerate(jobs)]
        first, second, third, fourth = (prompt.split() if in_words else prompt for prompt in prompts)
        assert list(map(len, (first, second, third, fourth))) == [1000, 1300, 600, 900]
        assert first == second[:1000] and first[:512] == third[:512] and first[512:600] != third[512:]
        assert fourth[:512] != first[:512]
        other = json.loads(request_body(target, jobs[3], 9))["prompt"]
        other = other.split() if in_words else other
        assert fourth[:512] == other[:512] and fourth[512:] != other[512:]  # what no id covers is nobody else's


def test_prompts_are_exact_and_follow_from_seed_and_index() -> None:
    job = Job(0.0, 300, 8)
    target = Target(("http://x",), "m", vocabulary=Span(10, 12), extra_body={"min_tokens": 8, "temperature": 1})
    body = json.loads(request_body(target, job, 4))
    assert len(body["prompt"]) == 300 and set(body["prompt"]) == {10, 11, 12}
    assert body["ignore_eos"] is True and body["stream_options"] == {"include_usage": True}
    assert (body["max_tokens"], body["min_tokens"], body["temperature"]) == (8, 8, 1)
    assert request_body(target, job, 4) == request_body(target, job, 4) != request_body(target, job, 5)
    text = json.loads(request_body(Target(("http://x",), "m", "text"), job, 0))["prompt"]
    chat = json.loads(request_body(Target(("http://x",), "m", "chat"), job, 0))["messages"]
    assert len(text.split()) == 300 and chat == [{"role": "user", "content": text}]
