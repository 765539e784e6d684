"""In a structure's process: regexes that schemas bring and the library does not know, in a syntax that it does."""

from __future__ import annotations

import re
from functools import cache

from llguidance import LLMatcher

# What has to be looked at first: looking around, backreferences, word boundaries, anchors that are not at the ends.
_DOUBTFUL = re.compile(r"\(\?|\\[bBAZzGk1-9]|.\^|\$.", re.DOTALL)
_CLASS = r"\[(?:\\.|[^\]\\])+\]|\\[dswDSW]"
_NONE_BUT = re.compile(rf"\^?({_CLASS})[*+]\$")
# How pydantic writes a Decimal of so many digits.
_DIGITS = re.compile(r"\(\?=\[\\d\.\]\{1,(\d+)\}0\*\$\)\\d(\*|\{0,\d+\})\\\.\\d(\*|\{0,\d+\})0\*\$")
_ANY = r"[\s\S]"
_MAX_DIGITS = 64

# Of names that are written so: what has one of them as `format` must match it.
FORMATS = {
    "date": r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])$",  # every such day is in every month
    "date-time": r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])T([01]\d|2[0-3]):[0-5]\d:[0-5]\dZ$",
    "time": r"^([01]\d|2[0-3]):[0-5]\d:[0-5]\dZ$",
    "duration": r"^P(\d{1,4}D|(\d{1,4}D)?T\d{1,4}[HMS])$",
    "uuid": r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
    "email": r"^[a-z0-9][a-z0-9._-]{0,60}@[a-z0-9]{1,60}(\.[a-z]{2,20}){1,3}$",
    "ipv4": r"^((25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)$",
}
# What the library knows of them itself; any other `format` is an annotation, as the standard has it.
KNOWN_FORMATS = frozenset({*FORMATS, "hostname", "ipv6", "uri", "unknown"})


@cache
def plain_patterns(pattern: str) -> tuple[str, ...] | None:
    """Return regexes in the library's syntax that stand for a pattern together; None if there are none.

    A string that matches all of them matches the pattern; some strings that match it may not match them.
    """
    if not _DOUBTFUL.search(pattern):
        return (pattern,)
    found: list[str] = []
    rest = _DIGITS.sub(_plain_digits, pattern)
    while (looked := _leading_look(rest)) is not None:
        is_wanted, ahead, rest = looked
        if is_wanted:
            found.append(f"^(?:{ahead.removeprefix('^')})")
        elif ahead == "$":
            found.append(f"^{_ANY}")
        elif (only := _NONE_BUT.fullmatch(ahead)) is not None:
            found.append(_other_than(only.group(1)))
        else:
            return None
    found.append(rest)
    return tuple(found) if all(map(_is_known, found)) else None


def _leading_look(pattern: str) -> tuple[bool, str, str] | None:
    """Split the lookahead off that a pattern begins with: whether it is to match, it, the pattern without it."""
    start = len(pattern) - len(pattern.removeprefix("^"))
    if start == 0 or pattern[start : start + 3] not in ("(?=", "(?!"):
        return None
    depth, at, in_class = 0, start, False
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char == "(":
            depth += 1
        elif char == ")":
            depth -= 1
            if depth == 0:
                return pattern[start + 2] == "=", pattern[start + 3 : at], "^" + pattern[at + 1 :]
        at += 1
    return None


def _other_than(characters: str) -> str:
    """Return a regex for a character that is none of a class."""
    if characters.startswith("["):
        inner = characters[1:-1]
        return f"[{inner[1:]}]" if inner.startswith("^") else f"[^{inner}]"
    return characters.swapcase()  # \d and \D are each other's opposites


def _plain_digits(found: re.Match[str]) -> str:
    """Return a regex for a decimal: at most so many characters of digits and a point, then zeros."""
    most = min(int(found.group(1)), _MAX_DIGITS) - 1
    before = _most_digits(found.group(2), most)
    after = _most_digits(found.group(3), most)
    options = (rf"\d{{0,{n}}}\.\d{{0,{min(after, most - n)}}}0*$" for n in range(before, -1, -1) if n <= most)
    if before + after <= most:
        return next(options)
    return f"(?:{'|'.join(options)})"


def _most_digits(count: str, most: int) -> int:
    return most if count == "*" else int(count[3:-1])


def _is_known(pattern: str) -> bool:
    """Return whether the library can read a pattern."""
    if re.search(r"\(\?(?:[=!]|<[=!])", pattern):
        return False
    grammar = LLMatcher.grammar_from_json_schema({"type": "string", "pattern": pattern})
    return not LLMatcher.validate_grammar(grammar)
