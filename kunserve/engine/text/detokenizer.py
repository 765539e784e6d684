"""Request flow, between sampler and SSE: one request's token ids -> text that is final, ended by stop strings.

Own code instead of `tokenizers.decoders.DecodeStream`: that one decodes its window anew for each token, keeps
everything while bytes are invalid or tokens are skipped (quadratic with `ignore_eos`), and cannot be flushed.
A token is bytes here, and Python's incremental UTF-8 decoder holds back an unfinished character, at most 3 bytes.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.sampling import SamplingParams

PROMPT_TAIL = 8  # tokens; a prompt may end inside a character, which has at most 4 bytes


class Detokenizer:
    """Text of one request, token by token. `stopped` is the stop string that ended it, if one did.

    While it `is_whole`, nothing of what came before changes what a token says: where there are no stop strings, the
    text of one that is in `whole` is what is there, and need not be pushed.
    """

    __slots__ = (
        "_checked_from",
        "_held",
        "_include_stop",
        "_num_tokens",
        "_skipped",
        "_stops",
        "_strip",
        "_tokenizer",
        "_utf8",
        "is_whole",
        "stopped",
        "whole",
    )

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self.stopped: str | None = None
        self._tokenizer, self.whole = tokenizer, tokenizer.whole
        self._stops = tuple(_Stop(stop) for stop in params.stop if stop)
        self._include_stop = params.include_stop_str_in_output
        self._skipped = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        self._checked_from = params.min_tokens  # the first token, counted from 1, whose text may stop
        self._num_tokens = 0
        self._held = ""  # text that may be the beginning of a stop string
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = [i for i in prompt_token_ids[-PROMPT_TAIL:] if i not in self._skipped]
        self._strip = False
        self._decode(b"".join(map(tokenizer.token_bytes, tail)))  # perhaps it ends inside a character
        self._strip = not tail and tokenizer.coding.strips_space
        self.is_whole &= not self._strip

    @property
    def has_stops(self) -> bool:
        """Return whether there are strings that end the text."""
        return len(self._stops) > 0

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is final with it, "" once stopped."""
        self._num_tokens += 1
        if self.stopped is not None or token_id in self._skipped:
            return ""
        text = self.whole.get(token_id) if self.is_whole else None
        if text is None:
            text = self._decode(self._tokenizer.token_bytes(token_id))
        if not self._stops or self._num_tokens < self._checked_from:
            return text
        return self._until_stop(text) if text else ""

    def _decode(self, data: bytes) -> str:
        """Return the text of a token's bytes, as far as it is sure with those before them."""
        if self._strip and data:
            data, self._strip = data.removeprefix(b" "), False
        text = self._utf8.decode(data)
        self.is_whole = not (self._strip or self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        """Return what was held back: the request ended without a stop string."""
        if self.stopped is not None:
            return ""
        text = self._until_stop(self._utf8.decode(b"", final=True))
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def _until_stop(self, text: str) -> str:
        """Follow the stop strings through new text; hold the longest tail that may become one.

        The stop string that is complete first counts, of several the longest: so the result does not depend on how
        the text is cut into tokens, and no stop string is left in what comes out.
        """
        for i, char in enumerate(text):
            complete = [stop.text for stop in self._stops if stop.advance(char)]
            if complete:
                self.stopped = max(complete, key=len)
                text, self._held = self._held + text[: i + 1], ""
                return text if self._include_stop else text[: -len(self.stopped)]
        text = self._held + text
        num_final = len(text) - max((stop.num_matched for stop in self._stops), default=0)
        self._held = text[num_final:]
        return text[:num_final]


class _Stop:
    """One stop string and how much of it the text ends with (Knuth, Morris and Pratt: no character is read twice)."""

    __slots__ = ("_shorter", "num_matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._shorter = [0, 0]  # for each length matched, the next shorter one that the same text also ends with
        for char in text[1:]:
            length = self._shorter[-1]
            while length and text[length] != char:
                length = self._shorter[length]
            self._shorter.append(length + (text[length] == char))

    def advance(self, char: str) -> bool:
        """Take the next character; True when the text now ends with the stop string."""
        while self.num_matched and self.text[self.num_matched] != char:
            self.num_matched = self._shorter[self.num_matched]
        self.num_matched += self.text[self.num_matched] == char
        return self.num_matched == len(self.text)
