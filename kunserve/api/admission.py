"""The way in: whether the queue has room for a request, decided before any work is done on it.

Rendering and tokenizing a long prompt takes up to seconds. A bound that is checked before but counted after lets a
flood through (vllm#58192), so what is accepted counts from here on, and until the engine has it in its own queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kunserve.errors import InvalidRequestError, OverloadedError
from kunserve.metrics import EngineStats, Metrics

CHARS_PER_TOKEN = 4  # of text that is not tokenized yet


def estimated_tokens(prompt: str | list[int]) -> int:
    """Tokens of a prompt, without looking at it."""
    return len(prompt) if isinstance(prompt, list) else len(prompt) // CHARS_PER_TOKEN + 1


class Admission:
    """Counts what is accepted but not yet queued, on top of what the engine says is waiting."""

    def __init__(self, stats: Callable[[], EngineStats], metrics: Metrics, max_reqs: int, max_tokens: int) -> None:
        self._stats, self._metrics = stats, metrics
        self._max_reqs, self._max_tokens = max_reqs, max_tokens
        self._num_reqs = self._num_tokens = 0

    def check(self, num_reqs: int = 1, num_tokens: int = 1) -> None:
        """OverloadedError if so many sequences, with prompts of so many tokens in all, do not fit in the queue."""
        if num_reqs > self._max_reqs:
            text = f"The request asks for {num_reqs} sequences; the queue holds {self._max_reqs}."
            raise InvalidRequestError(text, param="n")
        stats = self._stats()
        waiting_reqs = stats.num_waiting + self._num_reqs
        waiting_tokens = stats.num_waiting_tokens + self._num_tokens
        if waiting_reqs + num_reqs > self._max_reqs:
            self._metrics.rejection("queue_full")
            raise OverloadedError(f"The queue is full: {waiting_reqs} requests are waiting.", retry_after_s=1)
        if waiting_reqs and waiting_tokens + num_tokens > self._max_tokens:  # an empty queue takes any one prompt
            self._metrics.rejection("queue_tokens_full")
            text = f"The queue is full: prompts of {waiting_tokens} tokens are waiting."
            raise OverloadedError(text, retry_after_s=1)

    @contextmanager
    def accepted(self, num_reqs: int, num_tokens: int) -> Iterator[None]:
        """Hold the place of sequences in the queue while their prompts are made; leave it before they are submitted."""
        self.check(num_reqs, num_tokens)
        self._num_reqs += num_reqs
        self._num_tokens += num_tokens
        try:
            yield
        finally:
            self._num_reqs -= num_reqs
            self._num_tokens -= num_tokens
