"""Faults that are injected into devices on purpose, as values: which device, what goes wrong, and when.

Tests and `--inject-faults` write them as "1:lost@5s,2:hang@drop.remap". What they do is in `engine/launch/faults.py`.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

ANY_EXCHANGE = "exchange"  # of whichever transition
PHASES = (
    *("drop.boundary", "drop.remap", "drop.exchange"),
    *("restore.shrink", "restore.remap", "restore.load", "restore.split", "restore.exchange"),
    *("rebalance.boundary", "rebalance.shrink", "rebalance.remap"),
    *("lose.remap", "lose.load", "add.remap", "add.load"),
    ANY_EXCHANGE,
)


class FaultKind(enum.StrEnum):
    """What goes wrong with a device, from the moment at which the fault is due."""

    RAISE = "raise"  # the next work on the compute queue, once
    RAISE_ALWAYS = "raise-always"  # all work, and all copies
    HANG = "hang"  # both queues
    HANG_THEN_RETURN = "hang-then-return"  # both queues, for a while
    SLOW = "slow"  # the compute queue
    LOST = "lost"  # every call fails
    COPY_FAILS = "copy-fails"
    MAP_FAILS = "map-fails"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of one device. `when`: seconds after the first request, or one of `PHASES`."""

    device: int
    kind: FaultKind
    when: float | str

    def __str__(self) -> str:
        when = self.when if isinstance(self.when, str) else f"{self.when:g}s"
        return f"{self.device}:{self.kind}@{when}"


def parse_faults(text: str) -> tuple[Fault, ...]:
    """Return the faults of "1:lost@5s,2:hang@drop.remap"; ValueError, in one sentence, for anything else."""
    return tuple(_parse_fault(item.strip()) for item in text.split(","))


def _parse_fault(item: str) -> Fault:
    match = re.fullmatch(r"([0-9]+):([^:@]+)@([^:@]+)", item)
    if match is None:
        raise ValueError(f"not a fault: {item!r} (write DEVICE:FAULT@WHEN, for instance 1:lost@5s)")
    device, kind, when = match.groups()
    if kind not in list(FaultKind):
        raise ValueError(f"no such fault: {kind!r} in {item!r} (possible are {', '.join(FaultKind)})")
    return Fault(int(device), FaultKind(kind), _parse_when(when, item))


def _parse_when(when: str, item: str) -> float | str:
    if when in PHASES:
        return when
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?s", when):
        return float(when[:-1])
    raise ValueError(
        f"no such moment: {when!r} in {item!r} (possible are seconds, for instance 5s, and {', '.join(PHASES)})"
    )
