"""Make numbers of a recording, the load generator's third step. All functions are pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from kunserve.loadgen.client import Recording, Stream
from kunserve.percentiles import percentiles


def longest_gap(token_s: Sequence[float], ended_s: float | None = None) -> float:
    """Return the longest time between two chunks of a stream, its end included; 0 for one without a chunk.

    The end counts because a client cannot tell a stalled stream from one that forgot to close.
    """
    times = [*token_s, ended_s] if token_s and ended_s is not None else token_s
    return max((later - earlier for earlier, later in pairwise(times)), default=0.0)


def time_to_first_token(stream: Stream) -> float | None:
    """Return the seconds from sending the request to its first chunk; None if none came."""
    return stream.token_s[0] - stream.sent_s if stream.token_s and stream.sent_s is not None else None


def time_per_output_token(stream: Stream) -> float | None:
    """Return the mean seconds per token after the first; None unless the stream completed with two or more."""
    if stream.status != "completed" or stream.num_output_tokens < 2 or len(stream.token_s) < 2:
        return None
    return (stream.token_s[-1] - stream.token_s[0]) / (stream.num_output_tokens - 1)


def summarize(recording: Recording) -> dict[str, Any]:
    """Return all numbers of a run: times in seconds, rates per second of the whole run."""
    streams, elapsed_s = recording.streams, recording.elapsed_s
    by_status = Counter(stream.status for stream in streams)
    num_output_tokens = sum(stream.num_output_tokens for stream in streams)
    gaps = [longest_gap(stream.token_s, stream.ended_s) for stream in streams]
    sent = [stream for stream in streams if stream.sent_s is not None]
    done = [stream for stream in streams if stream.status == "completed"]
    return {
        "requests": len(streams),
        "completed": by_status["completed"],
        "failed": by_status["failed"],
        "cancelled": by_status["cancelled"],
        "unfinished": len(streams) - sum(by_status[s] for s in ("completed", "failed", "cancelled")),
        "failures": dict(Counter(s.failure for s in streams if s.status == "failed").most_common()),
        "short_outputs": sum(s.num_output_tokens < s.job.num_output_tokens for s in done),
        "elapsed_s": elapsed_s,
        "requests_per_s": len(done) / elapsed_s if elapsed_s else 0.0,
        "prompt_tokens": sum(s.num_prompt_tokens or s.job.num_prompt_tokens for s in sent),
        "output_tokens": num_output_tokens,
        "output_tokens_per_s": num_output_tokens / elapsed_s if elapsed_s else 0.0,
        "ttft_s": percentiles([t for s in streams if (t := time_to_first_token(s)) is not None]),
        "tpot_s": percentiles([t for s in streams if (t := time_per_output_token(s)) is not None]),
        "longest_gap_s": max(gaps, default=0.0),
        "longest_gap_request": int(np.argmax(gaps)) if gaps else None,
        "stream_gap_s": percentiles([g for g, s in zip(gaps, streams, strict=True) if s.token_s]),
        "cached_prompt_tokens": sum(s.num_cached_tokens or 0 for s in sent),
        "ttft_p50_by_turn_s": _by_turn(streams),
        "latest_send_s": max((s.sent_s - s.job.at_s for s in sent if s.sent_s is not None), default=0.0),
    }


def _by_turn(streams: Sequence[Stream]) -> list[float | None]:
    """Return the median time to the first token of each turn of a chat; of requests that are none: the one there is."""
    num_turns = 1 + max((stream.job.turn for stream in streams), default=0)
    times: list[list[float]] = [[] for _ in range(num_turns)]
    for stream in streams:
        if (seconds := time_to_first_token(stream)) is not None:
            times[stream.job.turn].append(seconds)
    return [float(np.median(of_turn)) if of_turn else None for of_turn in times]


def details(recording: Recording) -> dict[str, Any]:
    """Return what --json holds beside the summary: every request, chunks per second, and the metrics."""
    chunks = [at_s for stream in recording.streams for at_s in stream.token_s]
    num_seconds = int(recording.elapsed_s) + 1
    per_second, _ = np.histogram(chunks, bins=num_seconds, range=(0, num_seconds))
    return {
        "requests": [_request(stream) for stream in recording.streams],
        "chunks_per_s": per_second.tolist(),
        "metrics": [{"url": s.url, "at_s": s.at_s, **s.values} for s in recording.series],
    }


def lines(summary: dict[str, Any]) -> list[str]:
    """Return the lines that tell people the summary."""
    counts = ", ".join(f"{summary[key]} {key}" for key in ("completed", "failed", "cancelled", "unfinished"))
    gap = summary["longest_gap_s"]
    return [
        f"requests   {summary['requests']}: {counts}",
        f"time       {summary['elapsed_s']:.2f} s, {summary['requests_per_s']:.2f} completed requests/s",
        f"output     {summary['output_tokens']} tokens, {summary['output_tokens_per_s']:.1f} tokens/s",
        f"TTFT       {_row(summary['ttft_s'])}",
        *_turn_lines(summary),
        f"per token  {_row(summary['tpot_s'])}",
        f"longest gap inside a stream  {gap:.3f} s (request {summary['longest_gap_request']})",
        *(f"failed     {count} x {reason}" for reason, count in list(summary["failures"].items())[:10]),
    ]


def _turn_lines(summary: dict[str, Any]) -> list[str]:
    by_turn = summary["ttft_p50_by_turn_s"]
    cached, prompts = summary["cached_prompt_tokens"], summary["prompt_tokens"]
    lines = [f"  by turn  {'  '.join(map(_time, by_turn))} (p50)"] if len(by_turn) > 1 else []
    return [*lines, f"cached     {cached} of {prompts} prompt tokens"] if cached else lines


def _row(values: dict[str, float | None]) -> str:
    return "  ".join(f"{name} {_time(value)}" for name, value in values.items())


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _request(stream: Stream) -> dict[str, Any]:
    return {
        "at_s": stream.job.at_s,
        "sent_s": stream.sent_s,
        "ended_s": stream.ended_s,
        "url": stream.url,
        "status": stream.status,
        "failure": stream.failure,
        "prompt_tokens": stream.num_prompt_tokens or stream.job.num_prompt_tokens,
        "cached_tokens": stream.num_cached_tokens,
        "chat": stream.job.chat,
        "turn": stream.job.turn,
        "max_tokens": stream.job.num_output_tokens,
        "output_tokens": stream.num_output_tokens,
        "ttft_s": time_to_first_token(stream),
        "tpot_s": time_per_output_token(stream),
        "longest_gap_s": longest_gap(stream.token_s, stream.ended_s),
    }
