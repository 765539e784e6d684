"""How many tokens of a choice are reasoning: counted by their bytes, so that streamed and whole answers agree."""

from __future__ import annotations

from collections.abc import Sequence

from kunserve.api.say.reasoning import END, START
from kunserve.api.wire.backend import TextTokenizer

_END, _START = END.encode(), START.encode()


class ReasoningTokens:
    """The count of one choice, `</think>` included; 0 if its output does not begin with reasoning."""

    __slots__ = ("_bytes", "_has_begun", "_is_over", "_num_taken", "_tokenizer", "is_open")

    def __init__(self, tokenizer: TextTokenizer, is_open: bool) -> None:
        """`is_open`: the prompt has begun the reasoning."""
        self.is_open = is_open
        self._tokenizer, self._has_begun = tokenizer, is_open
        self._is_over = False
        self._bytes = b""
        self._num_taken = 0

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
            elif _END in self._bytes:
                self._is_over = True
            else:
                self._bytes = self._bytes[-len(_END) :]

    def _begin(self) -> None:
        begin = self._bytes.lstrip()
        if begin.startswith(_START):
            self._has_begun = True
        elif not _START.startswith(begin):
            self._is_over = True
