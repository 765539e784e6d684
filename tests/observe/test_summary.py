from __future__ import annotations

from kunserve.observe.gauges import EngineStats, GroupStats
from kunserve.observe.metrics import Metrics
from kunserve.observe.summary import Summary

IDLE = EngineStats(0, 0, 100, 0, 16)


def test_the_line_comes_only_while_something_happens() -> None:
    stats = IDLE
    metrics = Metrics("tiny", 64, lambda: stats)
    metrics.prompt_tokens(5)
    summary = Summary(metrics, lambda: stats)
    assert summary.line(10.0) is None  # what was before does not count
    metrics.prompt_tokens(1000)
    metrics.generation_tokens(25)
    metrics.prefix_cache(200, 150)
    metrics.prefix_cache(200, 100)
    stats = EngineStats(3, 2, 200, 50, 16, groups=(GroupStats(0, 2), GroupStats(1, 1)), weights_dropped_bytes=260 << 20)
    assert summary.line(10.0) == (
        "Engine 000: Avg prompt throughput: 100.0 tokens/s, Avg generation throughput: 2.5 tokens/s, "
        "Running: 3 reqs, Waiting: 2 reqs, GPU KV cache usage: 25.0%, Prefix cache hit rate: 62.5%, "
        "Groups: 2+1 devices, Weights dropped: 260 MiB"
    )
    stats = IDLE
    line = summary.line(10.0)  # once more, to say that it is over
    assert line is not None and "Running: 0 reqs" in line
    assert summary.line(10.0) is None
