"""Command lines of the server and of the tools (`loadgen`, `top`, `sim`): a wrong one ends in one line."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import NoReturn, TypeVar

T = TypeVar("T")
N = TypeVar("N", int, float)


class OneLineParser(argparse.ArgumentParser):
    """Parses arguments, and says what is wrong with them without the usage, which would hide it."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see --help)\n")


def checked(parse: Callable[[str], T], what: str | None = None) -> Callable[[str], T]:
    """Return `parse` with its ValueError turned into the message that argparse shows; `what`: what was expected."""

    def parse_checked(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error} (expected {what})" if what else str(error)) from None

    return parse_checked


def number_from(convert: Callable[[str], N], low: N, high: N) -> Callable[[str], N]:
    """Return a parser of numbers from `low` to `high`, both included; NaN and infinity are outside of every bound."""

    def parse_number(text: str) -> N:
        with contextlib.suppress(ValueError):
            if low <= (value := convert(text)) <= high:
                return value
        kind = "whole number" if convert is int else "number"
        raise argparse.ArgumentTypeError(f"'{text}' is not a {kind} from {low:,} to {high:,}")

    return parse_number


def or_auto(parse: Callable[[str], T]) -> Callable[[str], T | None]:
    """Return what `parse` does, and None of "auto"."""

    def parse_or_auto(text: str) -> T | None:
        return None if text == "auto" else parse(text)

    return parse_or_auto


def check_matplotlib() -> None:
    """Raise ValueError if matplotlib is missing; to be called before the run, which would be in vain."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'kunserve[plot]'") from error
