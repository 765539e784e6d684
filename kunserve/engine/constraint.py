"""Request flow, beside the sampler: which tokens a request's grammar allows next, found out off the event loop.

The tokens so far are known when a step is scheduled, so a thread computes the mask while the devices compute the
logits; the sampler only waits for it if they are faster.
"""

from __future__ import annotations

from concurrent.futures import Executor, Future

import llguidance.numpy
import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from kunserve.engine.request import TokenMask
from kunserve.errors import EngineError, InvalidRequestError

LIMIT_WORDS = ("max is", "fuel", "limit")  # in llguidance's messages about its LLParserLimits


class GrammarConstraint:
    """One request's place in its grammar. Implements `request.Constraint`; owned by the engine once submitted."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, threads: Executor, begins_after: int | None = None) -> None:
        """`begins_after`: the token that ends the model's reasoning, before which everything is allowed."""
        self._matcher, self._vocab_size, self._threads = matcher, vocab_size, threads
        self._begins_after = begins_after
        self._mask: Future[NDArray[np.uint32]] | None = None
        self._next: Future[TokenMask] | None = None  # somebody will need the mask after the next `accept`
        self._is_finished = begins_after is None and matcher.is_stopped()

    def copy(self) -> GrammarConstraint:
        """Another request's, at the same place."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab_size, self._threads, self._begins_after)

    def mask(self) -> TokenMask:
        """See `Constraint.mask`. What it returns may be called on any thread."""
        if self._begins_after is not None:
            return lambda: None
        if self._mask is None:
            self._mask = self._threads.submit(self._compute)
        return self._mask.result

    def next_mask(self) -> TokenMask:
        """See `Constraint.next_mask`."""
        waiting = self._next = self._next or Future()
        return lambda: waiting.result()()

    def accept(self, token_id: int) -> None:
        """See `Constraint.accept`."""
        self._accept(token_id)
        self._is_finished = self._begins_after is None and self._matcher.is_stopped()  # before a thread has it again
        if self._next is not None and not self._is_finished:
            self._next.set_result(self.mask())
            self._next = None

    def close(self) -> None:
        """See `Constraint.close`."""
        if self._next is not None:
            self._next.set_result(lambda: None)
            self._next = None

    def _accept(self, token_id: int) -> None:
        if self._begins_after is not None:
            if token_id == self._begins_after:
                self._begins_after = None
            return
        if self._mask is not None:
            self._mask.result()  # done, unless the token came from elsewhere: the matcher is one thread's at a time
        self._mask = None
        if not self._matcher.consume_token(token_id) or self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            if any(word in reason for word in LIMIT_WORDS):
                raise InvalidRequestError(f"The structure that was asked for is too complex: {reason}")
            raise EngineError(f"the grammar does not allow token {token_id}: {reason}")

    @property
    def is_finished(self) -> bool:
        """See `Constraint.is_finished`."""
        return self._is_finished

    def _compute(self) -> NDArray[np.uint32]:
        words = llguidance.numpy.allocate_token_bitmask(1, self._vocab_size)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, words)
        mask: NDArray[np.uint32] = words[0].view(np.uint32)
        return mask
