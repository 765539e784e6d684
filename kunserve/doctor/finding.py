"""What one check found; imports nothing that may be broken."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CPU, CUDA = "cpu", "cuda"  # the kinds of `--devices`
BOTH = frozenset({CPU, CUDA})


class Status(enum.StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"  # a server starts; something will be slow, or fail later
    MISSING = "missing"  # something is not installed or not there
    PROBLEM = "problem"  # something is there and cannot be used


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the screen and one entry of the JSON."""

    status: Status
    found: str
    consequence: str = ""  # what will therefore fail or be slow; said unless all is well
    remedy: str = ""  # the command or flag that mends it
    prevents: frozenset[str] = frozenset()  # kinds of devices on which no server can start because of this
    details: Mapping[str, Any] = field(default_factory=dict)  # for the JSON alone

    def __post_init__(self) -> None:
        assert (self.status is Status.OK) == (not self.consequence) == (not self.remedy), self


def ok(found: str, **details: Any) -> Finding:
    """Return a finding that needs nothing."""
    return Finding(Status.OK, found, details=details)


def first_line(error: object) -> str:
    """Return the first line of an error, or its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
