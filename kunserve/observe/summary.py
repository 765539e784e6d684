"""The line of the log that operators know from vLLM: every ten seconds, and only while something happens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from kunserve.observe.gauges import EngineStats
from kunserve.observe.metrics import Metrics

log = structlog.get_logger()


class Summary:
    """Words the log's line about the last seconds; it remembers the counters of the line before."""

    def __init__(self, metrics: Metrics, stats: Callable[[], EngineStats]) -> None:
        """Begin with what `metrics` have counted so far; `stats` tells how the engine stands at a line."""
        self._metrics, self._stats = metrics, stats
        self._num_prompt = metrics.num_prompt_tokens
        self._num_generated = metrics.num_generation_tokens
        self._was_busy = False

    def line(self, seconds: float) -> str | None:
        """Return the line for the last `seconds`; None if nothing happened in them, nor in those before."""
        stats, metrics = self._stats(), self._metrics
        num_prompt = metrics.num_prompt_tokens - self._num_prompt
        num_generated = metrics.num_generation_tokens - self._num_generated
        self._num_prompt, self._num_generated = metrics.num_prompt_tokens, metrics.num_generation_tokens
        is_busy = bool(num_prompt or num_generated or stats.num_running or stats.num_waiting)
        was_busy, self._was_busy = self._was_busy, is_busy
        if not is_busy and not was_busy:
            return None
        hit_rate = metrics.recent.prefix_hit_rate or 0.0  # of the last 1,000 prompts, as vLLM says it
        usage = stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0
        groups = "+".join(str(group.num_stages) for group in stats.groups) or "0"
        return (
            f"Engine 000: Avg prompt throughput: {num_prompt / seconds:.1f} tokens/s, "
            f"Avg generation throughput: {num_generated / seconds:.1f} tokens/s, "
            f"Running: {stats.num_running} reqs, Waiting: {stats.num_waiting} reqs, "
            f"GPU KV cache usage: {usage:.1%}, Prefix cache hit rate: {hit_rate:.1%}, "
            f"Groups: {groups} devices, Weights dropped: {stats.weights_dropped_bytes >> 20} MiB"
        )


async def log_summary(summary: Summary, interval_s: float) -> None:
    """Write the line to the log every `interval_s`, until cancelled."""
    while True:
        await asyncio.sleep(interval_s)
        if (line := summary.line(interval_s)) is not None:
            log.info(line)
