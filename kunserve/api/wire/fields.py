"""Reading what is declared as an object of any fields: each checked, and named in the error with what came.

A null counts as absent. A wrong type is InvalidRequestError as a wrong value is: clients expect 400 for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import orjson

from kunserve.errors import InvalidRequestError

T = TypeVar("T")

PIECE = 1 << 15
INT64_MAX = 2**63 - 1


def show(value: object) -> str:
    """Return a JSON value as it came, cut to what an error message can bear (and a large body can cost)."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return orjson.dumps(value[:40] if isinstance(value, str) else value).decode()


def wrong_type(param: str, expected: str, value: object) -> NoReturn:
    """Raise the error for a field of the wrong type."""
    raise InvalidRequestError(f"`{param}` must be {expected}, not {show(value)}.", param=param)


def wrong_value(param: str, expected: str, value: object) -> NoReturn:
    """Raise the error for a field out of range."""
    raise InvalidRequestError(f"`{param}` must be {expected}, not {show(value)}.", param=param)


def pieces(values: Sequence[T], size: int = PIECE) -> Iterator[Sequence[T]]:
    """Return slices that C code works through in a millisecond; between them other threads get their turn."""
    return (values[i : i + size] for i in range(0, len(values), size))


class Fields:
    """One JSON object. Each reader returns the field's value, or `default` when it is absent."""

    __slots__ = ("_prefix", "_values")

    def __init__(self, values: dict[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def any(self, name: str) -> Any:
        """Return the value as it came."""
        return self._values.get(name)

    def required(self, name: str) -> Any:
        """Return the value as it came; raise InvalidRequestError if it is absent."""
        value = self._values.get(name)
        if value is None:
            param = self._prefix + name
            raise InvalidRequestError(f"`{param}` is required.", param=param)
        return value

    def string(self, name: str, default: T) -> str | T:
        """Return a string, or `default` where there is none; InvalidRequestError for anything else."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            wrong_type(self._prefix + name, "a string", value)
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        """Return true or false, or `default` where there is neither; InvalidRequestError for anything else."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            wrong_type(self._prefix + name, "true or false", value)
        return value

    def object(self, name: str) -> Fields:
        """Return the fields of an object within this one; absent counts as empty."""
        return Fields(self.mapping(name), f"{self._prefix}{name}.")

    def mapping(self, name: str) -> dict[str, Any]:
        """Return an object whose fields are free."""
        value = self._values.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            wrong_type(self._prefix + name, "an object", value)
        return value

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """Return one of some words, the first if it is absent."""
        value = self.string(name, choices[0])
        if value not in choices:
            wrong_value(self._prefix + name, f"{', '.join(choices[:-1])} or {choices[-1]}", value)
        return value
