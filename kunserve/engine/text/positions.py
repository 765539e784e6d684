"""Where each token of a text begins, in characters: the same text that the detokenizer makes of the same tokens.

A character may be spread over several tokens: all of them begin where it does. A token that a text does not show (a
special one) begins where the next one does. What stop strings hold back or cut off counts as text.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

_CONTINUES = range(0x80, 0xC0)  # a byte that is not the first one of its character


class Positions:
    """One text, token by token. `num_chars`: how many characters are complete."""

    __slots__ = ("_begun", "_strips_space", "_utf8", "num_chars")

    def __init__(self, before: Iterable[bytes] = (), strips_space: bool = False) -> None:
        """Count characters of a text. `before`: tokens that stand before it and may end inside a character.

        `strips_space`: the blank that the first token of all begins with belongs to no text.
        """
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = self._utf8.decode(b"".join(before)) != "" or self._utf8.getstate()[0] != b""
        self._strips_space = strips_space
        self.num_chars = 0

    def take(self, data: bytes) -> int:
        """Take the bytes of the next token; return where it begins."""
        if not data:
            return self.num_chars
        if not self._begun:
            self._begun = True
            data = data.removeprefix(b" ") if self._strips_space else data
        pending = self._utf8.getstate()[0]
        if pending and data:
            first, data = data[:1], data[1:]
            decoded = self._utf8.decode(first)
            # What is pending stays unfinished for good where this byte does not go on with it: then it is a U+FFFD of
            # its own, and the token begins behind that.
            is_whole = len(decoded) == 1 and not self._utf8.getstate()[0]
            goes_on = first[0] in _CONTINUES and (not decoded or is_whole)
            begin = self.num_chars + (0 if goes_on else 1)
            self.num_chars += len(decoded)
        else:
            begin = self.num_chars
        self.num_chars += len(self._utf8.decode(data))
        return begin
