"""Trace files: arrival times and lengths, in the formats that are public.

CSV, whose columns tell which format it is: Azure 2023 and 2024, BurstGPT (requests that failed have an empty answer and
are left out), lengths of ShareGPT conversations (no times). JSON lines: Mooncake, in milliseconds, with ids that tell
which prompts begin alike.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.random import Generator

TIME_COLUMNS = ("TIMESTAMP", "arrived_at", "Timestamp")
INPUT_COLUMNS = ("ContextTokens", "num_prefill_tokens", "Request tokens")
OUTPUT_COLUMNS = ("GeneratedTokens", "num_decode_tokens", "Response tokens")
BURSTGPT_OUTPUT = "Response tokens"
HASHED_TOKENS = 512  # tokens that one hash id of Mooncake's stands for
MOST_HASH_ID = (1 << 32) - 1
MOONCAKE_KEYS = ("timestamp", "input_length", "output_length")


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One line of a trace: seconds after its first row (0 where the file has no times), lengths in tokens."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()  # of the prompt's tokens, `HASHED_TOKENS` each: equal ids are equal tokens


def read_rows(path: Path, *, needs_times: bool) -> list[TraceRow]:
    """Read the rows of a CSV, or of JSON lines if the file is called `.jsonl`, in the order of their times.

    Raises ValueError with file, line and column when something is missing or malformed.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            is_json = path.suffix == ".jsonl"
            rows = list(_parse_json(path, file) if is_json else _parse(path, csv.DictReader(file), needs_times))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot read {path}: {reason}") from error
    if not rows:
        raise ValueError(f"{path} has no rows")
    first_s = min(row.at_s for row in rows)
    rows = [replace(row, at_s=row.at_s - first_s) for row in rows]
    return sorted(rows, key=lambda row: row.at_s)


def cut(row: TraceRow, max_model_len: int) -> TraceRow:
    """Cut a row to what can be served: at least a token of prompt and of output, at most `max_model_len` in all."""
    num_prompt = min(max(1, row.num_prompt_tokens), max_model_len - 2)
    num_output = min(max(1, row.num_output_tokens), max_model_len - num_prompt - 1)
    return replace(row, num_prompt_tokens=num_prompt, num_output_tokens=num_output)


def pick_rows(
    rows: Sequence[TraceRow], window: tuple[float, float], limit: int | None, rng: Generator
) -> list[TraceRow]:
    """Return the rows of seconds `[start, end)`, with times from `start` on; at most `limit` of them, drawn at random.

    Taking rows at random thins the trace and keeps the shape of its bursts.
    """
    start_s, end_s = window
    rows = [replace(row, at_s=row.at_s - start_s) for row in rows if start_s <= row.at_s < end_s]
    if not rows:
        raise ValueError(f"the trace has no rows from second {start_s:g} to {end_s:g}")
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(rng.choice(len(rows), size=limit, replace=False))]


def upscale(rows: Sequence[TraceRow], scale: float, rng: Generator) -> list[TraceRow]:
    """Return `scale` times as many rows, bursts kept; a scale below 1 thins the trace.

    Each row comes ceil(scale) times, every copy with probability scale / ceil(scale), as in KunServe's artifact (after
    TraceUpscaler). Copies are of other prompts: the second copies of two rows begin alike as these rows do, but a row
    and its copy do not.
    """
    copies = math.ceil(scale)
    kept = rng.random((len(rows), copies)) < scale / copies
    numbers = kept.sum(axis=1).tolist()
    num_ids = 1 + max((max(row.hash_ids, default=0) for row in rows), default=0)
    return [_copy(row, i * num_ids) for row, number in zip(rows, numbers, strict=True) for i in range(number)]


def _copy(row: TraceRow, id_offset: int) -> TraceRow:
    return replace(row, hash_ids=tuple(hash_id + id_offset for hash_id in row.hash_ids)) if row.hash_ids else row


def stretch(rows: Sequence[TraceRow], factor: float) -> list[TraceRow]:
    """Multiply the times of all rows by `factor`: 2 halves the rate."""
    return [replace(row, at_s=row.at_s * factor) for row in rows]


def sample_lengths(rows: Sequence[TraceRow], count: int, rng: Generator) -> list[tuple[int, int]]:
    """Draw pairs of prompt and output length of random rows, with repetition."""
    return [(rows[i].num_prompt_tokens, rows[i].num_output_tokens) for i in rng.integers(len(rows), size=count)]


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
        num_output = _count(row[output], f"{where}, {output}")
        if num_output == 0 and output == BURSTGPT_OUTPUT:
            continue
        yield TraceRow(at_s, _count(row[prompt], f"{where}, {prompt}"), num_output)


def _parse_json(path: Path, file: TextIO) -> Iterator[TraceRow]:
    for number, line in enumerate(file, 1):
        where = f"{path}, line {number}"
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError:
            raise ValueError(f"{where}: not JSON") from None
        if not isinstance(row, dict) or (missing := [key for key in MOONCAKE_KEYS if key not in row]):
            raise ValueError(f"{where}: no {missing[0] if isinstance(row, dict) else MOONCAKE_KEYS[0]}")
        at, prompt, output = (row[key] for key in MOONCAKE_KEYS)
        yield TraceRow(
            _seconds(str(at), f"{where}, timestamp") / 1e3,
            _count(str(prompt), f"{where}, input_length"),
            _count(str(output), f"{where}, output_length"),
            _hash_ids(row.get("hash_ids", []), where),
        )


def _hash_ids(values: Any, where: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(v) is int and 0 <= v <= MOST_HASH_ID for v in values):
        raise ValueError(f"{where}: hash_ids is not a list of numbers from 0 to {MOST_HASH_ID}")
    return tuple(values)


def _count(text: str | None, where: str) -> int:
    try:
        count = int(text or "")
    except ValueError:
        count = -1
    if count < 0:
        raise ValueError(f"{where}: '{text or ''}' is not a number of tokens")
    return count


def _seconds(text: str | None, where: str) -> float:
    """Read a number of seconds, or a date and time."""
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
