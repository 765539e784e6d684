"""Request flow, beside the sampler: which tokens a request's grammar allows next, found out in another process.

The tokens so far are known when a step is scheduled, so the mask is computed while the devices compute the logits;
the sampler only waits for it if they are faster. The verdict on a token that was chosen is
asked for before it is published, because "nothing may follow" is a reason to finish.
"""

from __future__ import annotations

from kunserve.errors import KunServeError
from kunserve.grammar.matcher import Mask, Matcher, resolve
from kunserve.sampling import TokenMask


class GrammarConstraint:
    """One request's position in its grammar. Implements `request.Constraint`; owned by the engine once submitted."""

    def __init__(self, matcher: Matcher, begins_after: int | None = None) -> None:
        """Follow a structure. `begins_after`: the token that ends the reasoning, before which everything is allowed."""
        self._matcher, self._begins_after = matcher, begins_after
        self._num_accepted = 0
        self._next: Mask | None = None  # somebody will need the mask after the next `accept`

    def copy(self) -> GrammarConstraint:
        """Return another request's constraint, at the same position."""
        other = GrammarConstraint(self._matcher.copy(), self._begins_after)
        other._num_accepted = self._num_accepted
        return other

    def mask(self, num_accepted: int) -> TokenMask:
        """See `Constraint.mask`. What it returns may be called on any thread."""
        # A token is accepted before its step is committed: a step that is planned in between runs ahead of a token
        # that is known here.
        if num_accepted > self._num_accepted:
            self._next = self._next or Mask()
            return self._next.result
        return (lambda: None) if self._begins_after is not None else self._matcher.mask.result

    def accept(self, token_id: int) -> None:
        """See `Constraint.accept`."""
        self._num_accepted += 1
        mask, self._next = self._next or Mask(), None
        if self._begins_after is None:
            self._matcher.advance(token_id, mask)
        elif token_id == self._begins_after:
            self._begins_after = None
            resolve(mask, self._matcher.mask.result())  # the first one, which is known
        else:
            resolve(mask, None)

    async def decided(self) -> None:
        """See `Constraint.decided`."""
        await self._matcher.decided()

    def release(self) -> None:
        """See `Constraint.release`."""
        if self._next is not None:
            resolve(self._next, None)
            self._next = None

    def close(self) -> None:
        """See `Constraint.close`."""
        self.release()
        self._matcher.close()

    @property
    def error(self) -> KunServeError | None:
        """See `Constraint.error`."""
        return self._matcher.error

    @property
    def is_finished(self) -> bool:
        """See `Constraint.is_finished`."""
        return self._matcher.is_finished
