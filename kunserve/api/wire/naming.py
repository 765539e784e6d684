"""Errors in the words of the caller: a body that was translated is complained about by the names it came with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from kunserve.errors import KunServeError

_QUOTED = re.compile(r"`([^`\s]+)`")
_END_OF_PATH = re.compile(r"[.\[]")


class FieldNames:
    """Turns paths in the translated body (`tools[0].function.parameters`) into those that the client wrote."""

    def __init__(self, names: dict[str, str] | None = None) -> None:
        """Take a client's names; a path stands for everything below it, unless that has a name of its own."""
        self._names = dict(names or {})
        self._whole: set[str] = set()

    def add(self, path: str, own: str, is_whole: bool = False) -> None:
        """Add a client's name. `is_whole`: what is below it has no counterpart, and goes by the name of the whole."""
        self._names[path] = own
        if is_whole:
            self._whole.add(path)

    def own(self, path: str) -> str:
        """Return the client's name of a path in the translated body."""
        ends = [len(path), *(match.start() for match in _END_OF_PATH.finditer(path))]
        for end in sorted(ends, reverse=True):
            if (name := self._names.get(path[:end])) is not None:
                return name if path[:end] in self._whole else name + path[end:]
        return path

    def reworded(self, error: KunServeError) -> KunServeError:
        """Return the same error with the client's names in it."""
        message = _QUOTED.sub(lambda quoted: f"`{self.own(quoted[1])}`", error.message)
        param = None if error.param is None else self.own(error.param)
        return type(error)(message, param=param, retry_after_s=error.retry_after_s)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Reword whatever KunServeError leaves the block."""
        try:
            yield
        except KunServeError as error:
            raise self.reworded(error) from None
