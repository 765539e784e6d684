"""Load generator, first step: which requests are sent when. Everything follows from the seed or from a trace file."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.random import Generator, default_rng

TIME_COLUMNS = ("TIMESTAMP", "arrived_at")
INPUT_COLUMNS = ("ContextTokens", "num_prefill_tokens")
OUTPUT_COLUMNS = ("GeneratedTokens", "num_decode_tokens")


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send `at_s` seconds after the start; lengths in tokens."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    cancel_after: int | None = None  # close the connection when this many tokens have come


@dataclass(frozen=True, slots=True)
class Span:
    """Integers from `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Span:
        """`64` or `64:256`."""
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


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One line of a trace: seconds after its first row (0 where the file has no times), lengths in tokens."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int


def parse_segments(text: str) -> tuple[Segment, ...]:
    """`30:4,10:16,30:4`: seconds:rate, one after the other."""
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
    """Random numbers for one purpose, so that changing lengths does not move arrivals."""
    return default_rng([seed, *purpose])


def fixed_arrivals(rate: float, num_requests: int) -> list[float]:
    """One every 1 / rate seconds, from 0."""
    return [i / rate for i in range(num_requests)]


def poisson_arrivals(rate: float, num_requests: int, rng: Generator) -> list[float]:
    """Independent arrivals, `rate` per second on average."""
    times: list[float] = (rng.exponential(size=num_requests).cumsum() / rate).tolist()
    return times


def burst_arrivals(segments: Sequence[Segment], limit: int | None, rng: Generator) -> list[float]:
    """Poisson arrivals whose rate changes from segment to segment; ends with the last one, or after `limit`."""
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


def read_rows(path: Path, *, needs_times: bool) -> list[TraceRow]:
    """Rows in the order of their times, of a CSV in the format of Azure's LLM traces or of ShareGPT lengths.

    Raises ValueError with file, line and column when something is missing or malformed.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(_parse(path, csv.DictReader(file), needs_times))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no rows")
    first_s = min(row.at_s for row in rows)
    rows = [TraceRow(r.at_s - first_s, r.num_prompt_tokens, r.num_output_tokens) for r in rows]
    return sorted(rows, key=lambda row: row.at_s)


def pick_rows(
    rows: Sequence[TraceRow], window: tuple[float, float], limit: int | None, rng: Generator
) -> list[TraceRow]:
    """Rows of seconds `[start, end)` of the trace, counted from `start`; of these a random `limit`, in order.

    Taking rows at random thins the trace and keeps the shape of its bursts.
    """
    start_s, end_s = window
    rows = [
        TraceRow(r.at_s - start_s, r.num_prompt_tokens, r.num_output_tokens) for r in rows if start_s <= r.at_s < end_s
    ]
    if not rows:
        raise ValueError(f"the trace has no rows from second {start_s:g} to {end_s:g}")
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(rng.choice(len(rows), size=limit, replace=False))]


def draw_lengths(prompt: Span, output: Span, count: int, rng: Generator) -> list[tuple[int, int]]:
    """Pairs of prompt and output length, uniform over the spans."""
    prompts = rng.integers(prompt.low, prompt.high, size=count, endpoint=True).tolist()
    outputs = rng.integers(output.low, output.high, size=count, endpoint=True).tolist()
    return list(zip(prompts, outputs, strict=True))


def sample_lengths(rows: Sequence[TraceRow], count: int, rng: Generator) -> list[tuple[int, int]]:
    """Pairs of prompt and output length of random rows, with repetition."""
    return [(rows[i].num_prompt_tokens, rows[i].num_output_tokens) for i in rng.integers(len(rows), size=count)]


def make_jobs(
    times: Sequence[float],
    lengths: Sequence[tuple[int, int]],
    max_lengths: tuple[int | None, int | None],
    cancel_fraction: float,
    rng: Generator,
) -> list[Job]:
    """Jobs with lengths clipped to 1..max; that share of them, rounded, leaves after a random token."""
    leaving = set(rng.permutation(len(times))[: round(cancel_fraction * len(times))].tolist())
    jobs = []
    for i, (at_s, (num_prompt, num_output)) in enumerate(zip(times, lengths, strict=True)):
        num_prompt = min(max(num_prompt, 1), max_lengths[0] or num_prompt)
        num_output = min(max(num_output, 1), max_lengths[1] or num_output)
        cancel_after = int(rng.integers(1, max(num_output, 2))) if i in leaving else None
        jobs.append(Job(at_s, num_prompt, num_output, cancel_after))
    return jobs


def _parse(path: Path, reader: csv.DictReader[str], needs_times: bool) -> Iterator[TraceRow]:
    names = reader.fieldnames or []

    def find(columns: tuple[str, ...]) -> str | None:
        return next((name for name in columns if name in names), None)

    at, prompt, output = find(TIME_COLUMNS), find(INPUT_COLUMNS), find(OUTPUT_COLUMNS)
    wanted_of = {TIME_COLUMNS: at or not needs_times, INPUT_COLUMNS: prompt, OUTPUT_COLUMNS: output}
    for wanted, is_there in wanted_of.items():
        if not is_there:
            raise ValueError(f"{path} has no column {' or '.join(wanted)}")
    assert prompt is not None and output is not None
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        at_s = _seconds(row[at], f"{where}, {at}") if at else 0.0
        yield TraceRow(at_s, _count(row[prompt], f"{where}, {prompt}"), _count(row[output], f"{where}, {output}"))


def _count(text: str | None, where: str) -> int:
    try:
        count = int(text or "")
    except ValueError:
        count = -1
    if count < 0:
        raise ValueError(f"{where}: '{text or ''}' is not a number of tokens")
    return count


def _seconds(text: str | None, where: str) -> float:
    """A number of seconds, or a date and time."""
    text = (text or "").strip()
    try:
        value = float(text)
    except ValueError:
        try:
            value = datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
        except ValueError:
            value = math.nan
    if not np.isfinite(value):
        raise ValueError(f"{where}: '{text}' is not a time")
    return value
