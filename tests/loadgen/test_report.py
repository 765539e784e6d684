from __future__ import annotations

from array import array
from pathlib import Path

import pytest

from kunserve.loadgen import report
from kunserve.loadgen.client import Recording, Status, Stream
from kunserve.loadgen.metrics import MetricSeries, parse_metrics
from kunserve.loadgen.plot import plot
from kunserve.loadgen.workload import Job


def test_metrics_get_common_names() -> None:
    page = """# HELP vllm:num_requests_running x
vllm:num_requests_running{engine="0",model_name="a b"} 3.0
vllm:num_requests_running{engine="1",model_name="a b"} 4.0 1700000000
vllm:num_requests_waiting{engine="0"} 7
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:kv_cache_usage_perc{engine="1"} 0.7
sglang:token_usage_other 9
vllm:request_success_total 1
kunserve:device_kv_bytes{device="cpu:0"} 1e9
kunserve:drops_total 2.0
kunserve:drops_created 1.7e9
kunserve:drop_seconds_bucket{le="0.1"} 2

"""
    sample = parse_metrics(page)
    assert sample == {
        "running": 7.0,
        "waiting": 7.0,
        "kv_usage": pytest.approx(0.6),
        'kunserve:device_kv_bytes{device="cpu:0"}': 1e9,
        "kunserve:drops_total": 2.0,
    }
    assert parse_metrics("<html>no metrics here</html>") == {}


def test_series_have_a_value_for_every_poll() -> None:
    series = MetricSeries("http://x")
    for at_s, sample in enumerate([{"running": 1.0}, {"running": 2.0, "waiting": 5.0}, {"waiting": 6.0}]):
        series.append(float(at_s), sample)
    assert series.values == {"running": [1.0, 2.0, None], "waiting": [None, 5.0, 6.0]}


@pytest.mark.parametrize(
    ("token_s", "ended_s", "gap"),
    [
        ([], None, 0.0),
        ([], 9.0, 0.0),  # waiting for the first token is TTFT, not a gap
        ([1.0], 1.0, 0.0),
        ([1.0], 3.0, 2.0),
        ([1.0, 1.5, 4.0, 4.25], 4.25, 2.5),
        ([1.0, 1.5], 9.0, 7.5),  # stalled, then ended
        ([1.0, 4.0], None, 3.0),
    ],
)
def test_longest_gap(token_s: list[float], ended_s: float | None, gap: float) -> None:
    assert report.longest_gap(array("d", token_s), ended_s) == gap


def make_stream(
    status: Status, sent_s: float | None, token_s: list[float], ended_s: float | None, num_output: int
) -> Stream:
    stream = Stream(Job(0.0, 10, 4), "http://x", status, None, sent_s, ended_s, array("d", token_s))
    stream.num_output_tokens = num_output
    return stream


def synthetic_recording() -> Recording:
    streams = [
        make_stream("completed", 1.0, [2.0, 2.5, 5.0], 5.0, 4),  # four tokens in three chunks
        make_stream("completed", 1.0, [1.5], 1.5, 1),
        make_stream("failed", 2.0, [3.0, 9.0], 10.0, 2),
        make_stream("failed", 2.0, [], 2.5, 0),
        make_stream("pending", None, [], None, 0),
    ]
    streams[2].failure = streams[3].failure = "HTTP 500: x"
    series = MetricSeries(
        "http://x", [0.0, 1.0], {"running": [1.0, None], "waiting": [0.0, 2.0], "kv_usage": [0.1, 0.9]}
    )
    return Recording(streams, [series], elapsed_s=10.0)


def test_summary_of_known_times() -> None:
    summary = report.summarize(synthetic_recording())
    assert summary["requests"] == 5 and summary["unfinished"] == 1 and summary["failures"] == {"HTTP 500: x": 2}
    assert summary["output_tokens"] == 7 and summary["output_tokens_per_s"] == 0.7
    assert summary["prompt_tokens"] == 40 and summary["requests_per_s"] == 0.2
    assert (summary["ttft_s"]["p50"], summary["ttft_s"]["max"]) == (1.0, 1.0)
    assert summary["tpot_s"]["mean"] == summary["tpot_s"]["max"] == 1.0  # 3 s for the three tokens after the first
    assert (summary["longest_gap_s"], summary["longest_gap_request"]) == (6.0, 2)
    assert summary["short_outputs"] == 1 and summary["latest_send_s"] == 2.0


def test_details_and_lines() -> None:
    recording = synthetic_recording()
    details = report.details(recording)
    assert details["chunks_per_s"] == [0, 1, 2, 1, 0, 1, 0, 0, 0, 1, 0]
    assert details["metrics"][0]["waiting"] == [0.0, 2.0]
    assert details["requests"][2]["longest_gap_s"] == 6.0 and details["requests"][4]["ttft_s"] is None
    text = "\n".join(report.lines(report.summarize(recording)))
    assert "2 completed, 2 failed, 0 cancelled, 1 unfinished" in text and "6.000 s (request 2)" in text
    assert "2 x HTTP 500: x" in text
    assert "-" in "\n".join(report.lines(report.summarize(Recording([], []))))


def test_plot_draws_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    details = report.details(synthetic_recording())
    plot(details["requests"], details["metrics"], tmp_path / "run.png")
    plot([], [], tmp_path / "empty.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("run.png", "empty.png"))
