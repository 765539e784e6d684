"""What a simulation saw: every request's times, memory over time, and the figures that the paper shows. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from kunserve.percentiles import percentiles

DIGITS = 6  # of seconds, in reports
SLO_TTFT_S = 5.0  # a first token that comes later misses the objective


@dataclass(slots=True)
class Answer:
    """One request as its client sees it; times in simulated seconds."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int = 0
    first_s: float | None = None
    last_s: float = 0.0
    longest_gap_s: float = 0.0
    is_finished: bool = False
    failure: str | None = None

    def token(self, now: float) -> None:
        """Note the time of a token that came."""
        if self.first_s is None:
            self.first_s = now
        elif now - self.last_s > self.longest_gap_s:
            self.longest_gap_s = now - self.last_s
        self.last_s = now
        self.num_output_tokens += 1

    @property
    def ttft_s(self) -> float | None:
        """Return the seconds from the request's arrival to its first token; None if it has none."""
        return None if self.first_s is None else self.first_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Return the mean seconds of a token after the first; None with fewer than two tokens."""
        if self.first_s is None or self.num_output_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Sample:
    """A server at one moment, or several; blocks over all groups, of the KV that is mapped."""

    at_s: float
    num_blocks: int
    num_used: int
    num_waiting: int
    num_running: int
    num_groups: int
    num_tokens: int  # generated since the start

    def __add__(self, other: Sample) -> Sample:
        """Return both servers at the same moment, taken as one."""
        mine, others = astuple(self)[1:], astuple(other)[1:]
        return Sample(self.at_s, *(a + b for a, b in zip(mine, others, strict=True)))


@dataclass(slots=True)
class Record:
    """All that is kept of a run."""

    answers: list[Answer] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    elapsed_s: float = 0.0


def summarize(record: Record, block_size: int) -> dict[str, Any]:
    """Return the figures of a run that do not depend on who ran it. Times in seconds, rates per second."""
    answers = record.answers
    finished = [a for a in answers if a.is_finished]
    tokens = sum(a.num_output_tokens for a in answers)
    # Without the ramp at the end, in which the last requests finish one after the other.
    last_arrival = max((a.arrival_s for a in answers), default=0.0)
    arriving = [s for s in record.samples if 0 < s.at_s <= last_arrival]
    in_time = arriving[-1].num_tokens / arriving[-1].at_s if arriving else 0.0
    ttfts = [t for a in answers if (t := a.ttft_s) is not None]
    return {
        "requests": len(answers),
        "finished": len(finished),
        "failures": sorted({a.failure for a in answers if a.failure}),
        "elapsed_s": round(record.elapsed_s, DIGITS),
        "ttft_s": _rounded(ttfts),
        "ttft_shares": _shares(ttfts),
        "slo_attainment": _attainment(answers, SLO_TTFT_S),
        "tpot_s": _rounded([t for a in finished if (t := a.tpot_s) is not None]),
        "longest_gap_s": round(max((a.longest_gap_s for a in answers), default=0.0), DIGITS),
        "gap_s": _rounded([a.longest_gap_s for a in finished]),
        "output_tokens": tokens,
        "output_tokens_per_s": round(tokens / record.elapsed_s, 3) if record.elapsed_s else 0.0,
        "output_tokens_per_s_while_arriving": round(in_time, 3),
        "memory": _memory(record.samples, block_size),
    }


def by_answer(record: Record) -> dict[str, list[float | None]]:
    """Return what every request saw, in the order of arrival; None where there is none."""
    answers = sorted(record.answers, key=lambda answer: answer.arrival_s)

    def rounded(values: Iterable[float | None]) -> list[float | None]:
        return [None if value is None else round(value, DIGITS) for value in values]

    return {
        "arrival_s": rounded(a.arrival_s for a in answers),
        "ttft_s": rounded(a.ttft_s for a in answers),
        "tpot_s": rounded(a.tpot_s for a in answers),
    }


def _rounded(seconds: Sequence[float]) -> dict[str, float | None]:
    """Return the percentiles, to `DIGITS`, by names without dots: those that reports have always had."""
    found = {name.replace(".", ""): value for name, value in percentiles(seconds).items()}
    return {name: None if value is None else round(value, DIGITS) for name, value in found.items()}


def _attainment(answers: Sequence[Answer], slo_s: float) -> float:
    """Return the share of all requests whose first token came in time; who had none did not."""
    return round(sum(a.ttft_s is not None and a.ttft_s <= slo_s for a in answers) / max(1, len(answers)), 6)


def _shares(values: Sequence[float]) -> list[tuple[float, float]]:
    """Return (value, share of values above it), from small to large, at a hundred places: misses against scale."""
    ordered = sorted(values)
    indices = sorted({i * (len(ordered) - 1) // 99 for i in range(100)}) if ordered else []
    return [(round(ordered[i], DIGITS), round(1 - (i + 1) / len(ordered), 4)) for i in indices]


def _memory(samples: Sequence[Sample], block_size: int) -> dict[str, Any]:
    """Return capacity and use over time, in tokens, and what they come to."""
    if not samples:
        return {}
    first = samples[0].num_blocks
    return {
        "kv_tokens": first * block_size,
        "most_kv_tokens": max(s.num_blocks for s in samples) * block_size,
        "mean_usage_of_undropped": round(sum(s.num_used for s in samples) / len(samples) / first, 4),
        "peak_usage_of_undropped": round(max(s.num_used for s in samples) / first, 4),
        "most_waiting": max(s.num_waiting for s in samples),
        "over_time": {
            "at_s": [round(s.at_s, 3) for s in samples],
            "kv_tokens": [s.num_blocks * block_size for s in samples],
            "used_tokens": [s.num_used * block_size for s in samples],
            "waiting": [s.num_waiting for s in samples],
            "running": [s.num_running for s in samples],
            "groups": [s.num_groups for s in samples],
            "output_tokens": [s.num_tokens for s in samples],
        },
    }
