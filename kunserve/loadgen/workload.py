"""Decide which requests are sent when, the load generator's first step: by the seed, or by a trace file.

Trace files are read by kunserve/sim/traces.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from numpy.random import Generator, default_rng


@dataclass(frozen=True, slots=True)
class Job:
    """One request, sent `at_s` seconds after the start; its lengths are in tokens."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    cancel_after: int | None = None  # close the connection when this many tokens have come
    chat: int | None = None  # of several turns: the one that it belongs to
    turn: int = 0  # it is sent with all turns before it and their answers, as soon as the last has come
    num_system_tokens: int = 0  # of the prompt that the chat begins with
    system: int = 0  # which of the system prompts that is
    hash_ids: tuple[int, ...] = ()  # of a trace: equal ids stand for equal tokens of prompts, 512 each


@dataclass(frozen=True, slots=True)
class Span:
    """A range of integers: from `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Span:
        """Read a span: `64` or `64:256`."""
        low, _, high = text.partition(":")
        try:
            span = cls(int(low), int(high or low))
        except ValueError:
            raise ValueError(f"'{text}' is not a number or low:high") from None
        if not 1 <= span.low <= span.high:
            raise ValueError(f"'{text}' must be positive and not fall")
        return span


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of time with a steady rate of requests per second."""

    duration_s: float
    rate: float


def parse_segments(text: str) -> tuple[Segment, ...]:
    """Read segments, `seconds:rate` one after the other: `30:4,10:16,30:4`."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        segments = tuple(Segment(float(duration), float(rate)) for duration, rate in pairs)
    except ValueError:
        raise ValueError(f"'{text}' is not seconds:rate,seconds:rate,...") from None
    if not all(0 < s.duration_s < math.inf and 0 <= s.rate < math.inf for s in segments):
        raise ValueError(f"'{text}' has a duration or rate that is not positive")
    if all(s.rate == 0 for s in segments):
        raise ValueError(f"'{text}' sends nothing")
    return segments


def stream_of(seed: int, *purpose: int) -> Generator:
    """Return random numbers for one purpose, so that changing lengths does not move arrivals."""
    return default_rng([seed, *purpose])


def fixed_arrivals(rate: float, num_requests: int) -> list[float]:
    """Return the times of arrivals at equal distance, `rate` per second, the first at 0."""
    return [i / rate for i in range(num_requests)]


def poisson_arrivals(rate: float, num_requests: int, rng: Generator) -> list[float]:
    """Return the times of independent arrivals, `rate` per second on average."""
    times: list[float] = (rng.exponential(size=num_requests).cumsum() / rate).tolist()
    return times


def burst_arrivals(segments: Sequence[Segment], limit: int | None, rng: Generator) -> list[float]:
    """Return the times of Poisson arrivals whose rate changes with the segments; of these the first `limit`."""
    times: list[float] = []
    start_s = 0.0
    for segment in segments:
        at_s = start_s
        while segment.rate > 0:
            at_s += rng.exponential() / segment.rate
            if at_s >= start_s + segment.duration_s:
                break  # what is left of a gap may be redrawn at the new rate: the process has no memory
            times.append(at_s)
        start_s += segment.duration_s
    return times[:limit]


def draw_lengths(prompt: Span, output: Span, count: int, rng: Generator) -> list[tuple[int, int]]:
    """Draw pairs of prompt and output length, uniform over the spans."""
    prompts = rng.integers(prompt.low, prompt.high, size=count, endpoint=True).tolist()
    outputs = rng.integers(output.low, output.high, size=count, endpoint=True).tolist()
    return list(zip(prompts, outputs, strict=True))


def in_turns(jobs: Sequence[Job], num_turns: int, num_system_tokens: int, num_systems: int) -> list[Job]:
    """Return the jobs of chats that begin as `jobs` say: each has so many turns, and one of so many system prompts."""
    return [
        replace(job, chat=chat, turn=turn, num_system_tokens=num_system_tokens, system=chat % num_systems)
        for chat, job in enumerate(jobs)
        for turn in range(num_turns)
    ]


def make_jobs(
    times: Sequence[float],
    lengths: Sequence[tuple[int, int]],
    max_lengths: tuple[int | None, int | None],
    cancel_fraction: float,
    rng: Generator,
    hash_ids: Sequence[tuple[int, ...]] = (),
) -> list[Job]:
    """Return the jobs, their lengths clipped to 1..max; the share that cancels, rounded, leaves at a random token.

    `hash_ids`: of each job's prompt, or none at all.
    """
    leaving = set(rng.permutation(len(times))[: round(cancel_fraction * len(times))].tolist())
    jobs = []
    for i, (at_s, (num_prompt, num_output)) in enumerate(zip(times, lengths, strict=True)):
        num_prompt = min(max(num_prompt, 1), max_lengths[0] or num_prompt)
        num_output = min(max(num_output, 1), max_lengths[1] or num_output)
        cancel_after = int(rng.integers(1, max(num_output, 2))) if i in leaving else None
        jobs.append(Job(at_s, num_prompt, num_output, cancel_after, hash_ids=hash_ids[i] if hash_ids else ()))
    return jobs
