"""The way in: whether the queue has room for a request, decided before any work is done on it.

Rendering and tokenizing a long prompt takes up to seconds. A bound that is checked before but counted after lets a
flood through (vllm#58192), so what is accepted counts from here on, and until the engine has it in its own queue.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from kunserve.api.wire.backend import ApiSettings, Counters
from kunserve.engine.schedule.waiting import Waiting
from kunserve.errors import InvalidRequestError, OverloadedError

CHARS_PER_TOKEN = 4  # of text that is not tokenized yet
# With several keys, each may hold SHARE times the room that is left: one busy key ends up with three quarters of the
# queue, two with three sevenths each. So a flood leaves room for others, yet nothing is set aside for keys that send
# nothing (dynamic thresholds, Choudhury and Hahne, 1998).
SHARE = 3


def estimated_tokens(prompt: str | list[int]) -> int:
    """Return about how many tokens a prompt has, without looking at it."""
    return len(prompt) if isinstance(prompt, list) else len(prompt) // CHARS_PER_TOKEN + 1


class Queued(Protocol):
    """The engine's queue: how much is in it, of all or of one owner."""

    def __call__(self, owner: str | None = None) -> Waiting:
        """See `Backend.waiting`."""


class Reservation(Protocol):
    """What is held for sequences that are not in the engine's queue yet."""

    def leave(self, num_reqs: int = 1) -> None:
        """Count so many requests no longer: the engine's queue counts them now, or they will never be in it."""


class Door(Protocol):
    """The way in as routes see it, in this process or in another one."""

    async def check(self, owner: str = "", num_reqs: int = 1, num_tokens: int = 1) -> None:
        """Raise OverloadedError if so many sequences with prompts of so many tokens do not fit in the queue."""

    def accepted(self, owner: str, num_reqs: int, num_tokens: int) -> AbstractAsyncContextManager[Reservation]:
        """Reserve places for a request's sequences, all or none, until each is in the engine's queue."""


@dataclass(slots=True)
class LocalReservation(Reservation):
    """The places of one request's sequences."""

    admission: Admission
    owner: str
    num_reqs: int
    num_tokens: int  # of their prompts, as estimated

    def leave(self, num_reqs: int = 1) -> None:
        """See `Reservation`."""
        if num_reqs:
            num_tokens = self.num_tokens * num_reqs // self.num_reqs
            self.num_reqs -= num_reqs
            self.num_tokens -= num_tokens
            self.admission.leave(self.owner, num_reqs, num_tokens)


class Admission(Door):
    """Counts what is accepted but not yet queued, on top of what the engine says is waiting."""

    def __init__(self, queued: Queued, metrics: Counters, settings: ApiSettings) -> None:
        self._queued, self._metrics = queued, metrics
        self._max_reqs, self._max_tokens = settings.max_num_queued_reqs, settings.max_num_queued_tokens
        self._is_shared = len(settings.api_keys) > 1
        self._accepted: defaultdict[str | None, Waiting] = defaultdict(Waiting)  # None: of all

    async def check(self, owner: str = "", num_reqs: int = 1, num_tokens: int = 1) -> None:
        """See `Door`."""
        self.check_now(owner, num_reqs, num_tokens)

    def check_now(self, owner: str, num_reqs: int, num_tokens: int) -> None:
        """Do what `check` does, without waiting."""
        if num_reqs > self._max_reqs:
            text = f"The request asks for {num_reqs} sequences; the queue holds {self._max_reqs}."
            raise InvalidRequestError(text, param="n")
        total = self._waiting(None)
        if total.num_reqs + num_reqs > self._max_reqs:
            self._refuse("queue_full", f"The queue is full: {total.num_reqs} requests are waiting.")
        if total.num_reqs and total.num_tokens + num_tokens > self._max_tokens:  # an empty queue takes any one prompt
            self._refuse("queue_tokens_full", f"The queue is full: prompts of {total.num_tokens} tokens are waiting.")
        if self._is_shared and (own := self._waiting(owner)).num_reqs:
            reqs_left = self._max_reqs - total.num_reqs - num_reqs + 1
            tokens_left = self._max_tokens - total.num_tokens - num_tokens + 1
            if own.num_reqs + num_reqs > SHARE * reqs_left or own.num_tokens + num_tokens > SHARE * tokens_left:
                text = f"{own.num_reqs} requests of this key are waiting; what is left of the queue is for others."
                self._refuse("key_share", text)

    def reserve(self, owner: str, num_reqs: int, num_tokens: int) -> LocalReservation:
        """Do what `accepted` does, until the caller has left with all."""
        self.check_now(owner, num_reqs, num_tokens)
        self._add(owner, num_reqs, num_tokens)
        return LocalReservation(self, owner, num_reqs, num_tokens)

    @asynccontextmanager
    async def accepted(self, owner: str, num_reqs: int, num_tokens: int) -> AsyncIterator[LocalReservation]:
        """See `Door`."""
        reservation = self.reserve(owner, num_reqs, num_tokens)
        try:
            yield reservation
        finally:
            reservation.leave(reservation.num_reqs)

    def leave(self, owner: str, num_reqs: int, num_tokens: int) -> None:
        """Count these requests and tokens of an owner no longer."""
        self._add(owner, -num_reqs, -num_tokens)
        if self._accepted[owner].num_reqs == 0:
            del self._accepted[owner]

    def _waiting(self, owner: str | None) -> Waiting:
        queued = self._queued(owner)
        accepted = self._accepted.get(owner, Waiting())
        return Waiting(queued.num_reqs + accepted.num_reqs, queued.num_tokens + accepted.num_tokens)

    def _add(self, owner: str, num_reqs: int, num_tokens: int) -> None:
        for waiting in (self._accepted[None], self._accepted[owner]):
            waiting.num_reqs += num_reqs
            waiting.num_tokens += num_tokens

    def _refuse(self, reason: str, text: str) -> None:
        self._metrics.rejection(reason)
        raise OverloadedError(text, retry_after_s=1)
