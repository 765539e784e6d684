"""The outlook of a cluster under a load: what policies do there, simulated, and in words what a drop gains and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kunserve.sim.plan.capacity import Capacity, Lengths, RequestRates
from kunserve.sim.policies import PLENTY
from kunserve.sim.traces import TraceRow

DROP = "drop"
BASELINES = ("recompute", "swap")
MORE_GPUS = "more GPUs"  # one copy more, with recompute
ROWS = (DROP, *BASELINES, MORE_GPUS, PLENTY)
WIDER = "drop, KV in 16 bits"  # beside KV in 8 bits
LEAST_NEED = 0.95  # of the KV that is mapped: a drop begins there
CEILING = 1.2  # unlimited memory that brings P99 TTFT down by less is not what is missing


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one policy makes of the load. Times in seconds."""

    ttft_p50: float
    ttft_p99: float
    longest_gap: float
    tokens_per_s: float  # of output, to the last answer
    num_preempted: int
    num_drops: int
    num_failed: int

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Outcome:
        """Take what is wanted from a simulation's report."""
        kinds = [transition["kind"] for transition in report["transitions"] if transition["outcome"] == "done"]
        return cls(
            report["ttft_s"]["p50"] or 0.0,
            report["ttft_s"]["p99"] or 0.0,
            report["longest_gap_s"],
            report["output_tokens_per_s"],
            report["preemptions"] + report["swaps"],
            kinds.count("drop"),
            report["requests"] - report["finished"],
        )


@dataclass(frozen=True, slots=True)
class Outlook:
    """All that is known of a cluster under a load. `need`: peak demand for KV over what is mapped without a drop."""

    capacity: Capacity
    lengths: Lengths
    rates: RequestRates
    rate: float  # requests a second, on average over `seconds`
    seconds: float  # of the load that was simulated
    num_cut: int  # requests with prompts longer than can be served: they are cut
    need: float
    outcomes: Mapping[str, Outcome]
    wider: Capacity | None = None  # what there would be with KV in 16 bits, if it has 8

    @property
    def room(self) -> float:
        """Return the KV tokens after the largest drop, over those before."""
        return self.capacity.dropped_kv_tokens / self.capacity.kv_tokens

    def verdict(self) -> str:
        """Say in a few sentences whether a drop gains much, little or nothing here, and why."""
        best = min(BASELINES, key=lambda name: self.outcomes[name].ttft_p99)
        drop, other, plenty = (self.outcomes[name].ttft_p99 for name in (DROP, best, PLENTY))
        need, room = f"{self.need:.2f} times the KV memory", f"{self.room:.2f} times"
        if self.need < LEAST_NEED:
            found = f"Nothing to gain: at its peak this load needs {need}, so nobody waits for memory"
            if self.rate > self.rates.compute:
                return (
                    f"{found}. But compute carries {self.rates.compute:.1f} requests a second, and {self.rate:.1f} "
                    f"come: P99 TTFT is {_s(other)}. More GPUs help, or shorter prompts and answers."
                )
            carried = min(self.rates.kv, self.rates.compute)
            return f"{found} (P99 TTFT {_s(other)}). For long, {carried:.1f} requests a second are carried."
        if self.capacity.num_copies == 1:
            return (
                f"Nothing to drop: the GPUs hold one copy of the weights, and at the peak this load needs {need}. "
                f"With one copy more P99 TTFT is {_s(self.outcomes[MORE_GPUS].ttft_p99)}, with {best} {_s(other)}."
            )
        if other <= CEILING * plenty:
            return (
                f"Little to gain: KV runs out (the load needs {need}), but compute is what requests wait for. With "
                f"endless memory P99 TTFT would be {_s(plenty)}, with {best} it is {_s(other)}, with drops "
                f"{_s(drop)}. More GPUs help, or shorter answers."
            )
        if drop >= other:
            return (
                f"Nothing gained: the load needs {need} and a drop gives up to {room}, but longer chains cost more "
                f"than that brings: P99 TTFT {_s(drop)} with drops, {_s(other)} with {best}."
            )
        share = (other - drop) / (other - plenty)
        gained = (
            f"P99 TTFT {_s(drop)} with drops instead of {_s(other)} with {best}; endless memory would give "
            f"{_s(plenty)}, so drops bring {100 * min(share, 1.0):.0f} % of what memory can."
        )
        if self.need <= self.room:
            return f"Much to gain: at the peak the load needs {need}, and a drop gives up to {room}. {gained}"
        return (
            f"Something to gain, not all: at the peak the load needs {need}, more than the {room} that the largest "
            f"drop gives; the rest waits. {gained}"
        )


def busiest(rows: Sequence[TraceRow], duration_s: float, most_requests: int) -> list[TraceRow]:
    """Return the part of a trace that lasts so long and has most tokens, from its first request on.

    It ends earlier, at `most_requests`, rather than that a simulation of it took minutes.
    """
    best, total, first, found = 0, 0, 0, (0, len(rows))
    for last, row in enumerate(rows):
        total += row.num_prompt_tokens + row.num_output_tokens
        while row.at_s - rows[first].at_s > duration_s or last - first >= most_requests:
            total -= rows[first].num_prompt_tokens + rows[first].num_output_tokens
            first += 1
        if total > best:
            best, found = total, (first, last + 1)
    return list(rows[slice(*found)])


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
