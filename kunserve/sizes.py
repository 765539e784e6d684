"""Sizes of memory as people write and read them."""

from __future__ import annotations

import re
from typing import Any, Protocol, TypeVar

from kunserve.errors import ConfigError

_SIZES = {
    "": 1,
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
}


class _Divisible(Protocol):
    """An integer, or an array or tensor of integers."""

    def __neg__(self) -> Any: ...

    def __floordiv__(self, divisor: int, /) -> Any: ...


Amount = TypeVar("Amount", bound=_Divisible)


def parse_size(text: str, plain_unit: str = "") -> int:
    """Read the bytes of "730MiB", "18GiB", "500MB" or a number of `plain_unit` (bytes); ConfigError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match and _SIZES.get((match[2] or plain_unit).lower())
    if not match or not unit:
        raise ConfigError(f"not a size: {text!r} (write for instance 730MiB or 18GiB)")
    return int(float(match[1]) * unit)


def format_size(num_bytes: int) -> str:
    """Return bytes as people read them, rounded down: GiB from ten of them on, else MiB ("730 MiB", "131.4 GiB")."""
    return f"{num_bytes >> 20} MiB" if num_bytes < 10 << 30 else f"{num_bytes * 10 // (1 << 30) / 10:.1f} GiB"


def ceil_div(amount: Amount, size: int) -> Amount:
    """Return how many pieces of `size` hold `amount`, or each amount of an array: the quotient, rounded up."""
    pieces: Amount = -(-amount // size)
    return pieces
