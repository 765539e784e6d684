"""How many tokens of a choice are reasoning: counted by their bytes, so that streamed and whole answers agree."""

from __future__ import annotations

from collections.abc import Sequence

from kunserve.api.say.reasoning import ReasoningFormat
from kunserve.api.wire.backend import TextTokenizer


class ReasoningTokens:
    """The count of one choice, marks included; 0 if its output does not begin with reasoning."""

    __slots__ = (
        "_bytes",
        "_ends",
        "_format",
        "_is_first",
        "_is_inside",
        "_is_open",
        "_is_over",
        "_num_before",
        "_starts",
        "_tokenizer",
        "num_tokens",
    )

    def __init__(self, tokenizer: TextTokenizer, is_open: bool, format: ReasoningFormat) -> None:
        """Begin to count. `is_open`: the prompt has begun the reasoning."""
        self.num_tokens = 0  # of the tokens so far
        self._format, self._is_open = format, is_open
        self._starts = tuple(mark.encode() for mark in format.starts)
        self._ends = tuple(mark.encode() for mark in format.ends + format.stops)
        self._tokenizer = tokenizer
        self._is_first, self._is_inside, self._is_over = not is_open, is_open, False
        self._bytes = b""
        self._num_before = 0  # of tokens that may be a mark, while it is not clear if the output begins with one

    def fresh(self) -> ReasoningTokens:
        """Return the count of another look at the same choice."""
        return ReasoningTokens(self._tokenizer, self._is_open, self._format)

    def take(self, token_ids: Sequence[int]) -> None:
        """Count those of the tokens that came which are reasoning."""
        for token_id in token_ids:
            if self._is_over:
                return
            self._bytes += self._tokenizer.token_bytes(token_id)
            if self._is_inside:
                self.num_tokens += 1
                self._look_for(self._ends)
            elif self._is_first:
                self._num_before += 1
                self._begin()
            else:
                self._look_for(self._starts)

    def _look_for(self, marks: tuple[bytes, ...]) -> None:
        """Change sides if one of `marks` has come."""
        if not any(mark in self._bytes for mark in marks):
            self._bytes = self._bytes[-max(map(len, marks)) :]
            return
        self._bytes = b""
        self._is_inside = not self._is_inside
        self._is_over = not self._is_inside and not self._format.repeats

    def _begin(self) -> None:
        begin = self._bytes.lstrip()
        if begin.startswith(self._starts):
            self._is_first, self._is_inside = False, True
            self.num_tokens = self._num_before
        elif not any(start.startswith(begin) for start in self._starts):
            self._is_first, self._is_over = False, not self._format.repeats
