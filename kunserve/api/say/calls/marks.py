"""Marks in a text that comes in pieces: where one is, and what may still become one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def held_back(text: str, marks: Iterable[str]) -> int:
    """Return the length of the longest end of `text` that may become one of `marks`."""
    return max((_held_back(text, mark) for mark in marks), default=0)


def _held_back(text: str, mark: str) -> int:
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


def first_mark(text: str, marks: Iterable[str]) -> tuple[int, str]:
    """Return where the first of `marks` is in `text`, and which; its length and "" if none is."""
    found = [(index, mark) for mark in marks if (index := text.find(mark)) >= 0]
    return min(found, default=(len(text), ""))


def mark_at(text: str, index: int, marks: Sequence[str]) -> str | None:
    """Return which of `marks` is at `index`, "" if none is, None if more text is needed to tell."""
    if text.startswith(tuple(marks), index):
        return next(mark for mark in marks if text.startswith(mark, index))
    rest = len(text) - index
    return None if any(rest < len(mark) and mark.startswith(text[index:]) for mark in marks) else ""
