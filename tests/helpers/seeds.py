"""Seeds of tests that draw their cases: the same in every run, or others where a run asks for them."""

from __future__ import annotations

import os

VARIABLE = "KUNSERVE_SEED"  # `make test-random` sets it


def asked_seed() -> int | None:
    """Return the seed that this run was given; None in runs that draw the same cases as ever."""
    text = os.environ.get(VARIABLE)
    return None if text is None else int(text)


def seeds(count: int) -> range:
    """Return so many seeds, to parametrize a test with: from 0 on, or from the one that this run was given."""
    first = asked_seed() or 0
    return range(first, first + count)
