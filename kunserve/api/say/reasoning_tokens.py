"""How many tokens of a choice are reasoning: counted by their bytes, so that streamed and whole answers agree."""

from __future__ import annotations

from collections.abc import Sequence

from kunserve.api.say.reasoning import ReasoningFormat
from kunserve.api.wire.backend import TextTokenizer


class ReasoningTokens:
    """The count of one choice, the mark of its end included; 0 if its output does not begin with reasoning."""

    __slots__ = (
        "_bytes",
        "_ends",
        "_form",
        "_has_begun",
        "_is_open",
        "_is_over",
        "_num_taken",
        "_starts",
        "_tokenizer",
    )

    def __init__(self, tokenizer: TextTokenizer, is_open: bool, form: ReasoningFormat) -> None:
        """`is_open`: the prompt has begun the reasoning."""
        self._form, self._is_open = form, is_open
        self._starts = tuple(mark.encode() for mark in form.starts)
        self._ends = tuple(mark.encode() for mark in form.ends + form.stops)
        self._tokenizer, self._has_begun = tokenizer, is_open
        self._is_over = False
        self._bytes = b""
        self._num_taken = 0

    def fresh(self) -> ReasoningTokens:
        """Return the count of another look at the same choice."""
        return ReasoningTokens(self._tokenizer, self._is_open, self._form)

    @property
    def num_tokens(self) -> int:
        """How many of the tokens so far are reasoning."""
        return self._num_taken if self._has_begun else 0

    def take(self, token_ids: Sequence[int]) -> None:
        """Count what came."""
        for token_id in token_ids:
            if self._is_over:
                return
            self._num_taken += 1
            self._bytes += self._tokenizer.token_bytes(token_id)
            if not self._has_begun:
                self._begin()
            elif any(end in self._bytes for end in self._ends):
                self._is_over = True
            else:
                self._bytes = self._bytes[-max(map(len, self._ends)) :]

    def _begin(self) -> None:
        begin = self._bytes.lstrip()
        if begin.startswith(self._starts):
            self._has_begun = True
        elif not any(start.startswith(begin) for start in self._starts):
            self._is_over = True
