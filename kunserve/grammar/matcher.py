"""In the server: one request's position in its structure, whichever process follows it at the moment.

Its tokens are all that is needed to make it again, so a process that dies takes nothing with it. A token that is
given while no process has the matcher, or whose process dies over it, is given to another one with all before it. The
same happens to every matcher that was waiting for that process: if the process died of the structure's doing, each
of them goes on in a process of its own, and the one whose process dies again is to blame.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kunserve.errors import EngineError, InvalidRequestError, KunServeError, OverloadedError
from kunserve.grammar.process import KILLED, Death, Process
from kunserve.grammar.wire import Kind

Mask = Future["NDArray[np.uint32] | None"]

# So many processes may die over one token. Somebody who kills them by hand is not the structure's fault.
MAX_OWN_DEATHS, MAX_DEATHS = 2, 5


class ProcessFinder(Protocol):
    """What finds processes for the matchers of one structure."""

    def new_number(self) -> int:
        """Return a number that none of its matchers has."""

    def first_mask(self) -> Mask:
        """Return the mask of the first token."""

    def find_process(self, matcher: Matcher, is_alone: bool = False) -> None:
        """Find a process for a matcher that waits, of its own if it `is_alone`; the matcher enters it, or fails."""

    def refuse(self, text: str) -> None:
        """Refuse a structure from now on: it has ended processes."""


def resolve(mask: Mask, words: NDArray[np.uint32] | None) -> None:
    """Give a mask to whoever waits for it, unless that was done before."""
    if not mask.done():
        mask.set_result(words)


class Matcher:
    """A position in a structure. Used on the event loop. Implements `process.Follower`."""

    def __init__(
        self, finder: ProcessFinder, token_ids: Sequence[int] = (), error: KunServeError | None = None
    ) -> None:
        self.number = finder.new_number()
        self.token_ids = array("I", token_ids)
        self.is_finished = False
        self.error = error  # why nothing can follow, and the request has to end
        self._finder = finder
        self._process: Process | None = None
        self._is_alone = False  # its process is nobody else's
        self._mask: Mask = finder.first_mask()
        self._judged = asyncio.Event()
        self._judged.set()
        self._num_deaths = self._num_own_deaths = 0  # over the last token

    def copy(self) -> Matcher:
        """Return another request's matcher, at the same position."""
        matcher = Matcher(self._finder, self.token_ids, self.error)
        matcher.is_finished = self.is_finished
        if matcher.token_ids and not (self.is_finished or self.error):
            matcher._mask = Mask()
            self._finder.find_process(matcher)
        return matcher

    @property
    def mask(self) -> Mask:
        """Return what may follow the tokens so far; None: anything, because the request ends anyway."""
        return self._mask

    def advance(self, token_id: int, mask: Mask) -> None:
        """Begin to take a token; `decided` says when it is known whether it may follow, `mask` what may follow it."""
        resolve(self._mask, None)  # nobody can wait for it any more
        self.token_ids.append(token_id)
        self._mask = mask
        self._num_deaths = self._num_own_deaths = 0
        if self.error is not None:
            resolve(mask, None)
            return
        self._judged.clear()
        if self._process is not None and self._process.is_alive:
            self._process.advance(self, len(self.token_ids), self.token_ids[-1:].tobytes())
        else:
            self._process = None
            self._finder.find_process(self)

    async def decided(self) -> None:
        """Return when `is_finished` and `error` are known for all tokens so far."""
        await self._judged.wait()

    def enter(self, process: Process, is_alone: bool = False) -> None:
        """Go on in this process, from the first token."""
        if not self.is_waiting:
            if is_alone:
                process.end()
            return
        if not process.is_alive:  # nobody would be told any more that it has died
            self.not_followed(KILLED)
            return
        self._process, self._is_alone = process, is_alone
        process.advance(self, len(self.token_ids), self.token_ids.tobytes())

    def close(self) -> None:
        """End the matcher: nothing will be taken any more, and whoever waits may go on."""
        resolve(self._mask, None)
        self._judged.set()
        self._leave()

    def fail(self, error: KunServeError) -> None:
        """End the request with an error: in its next step, if the last token is accepted already."""
        self.error = error
        self.close()

    @property
    def is_waiting(self) -> bool:
        """Return whether the matcher waits for a verdict or a mask."""
        return not self._judged.is_set() or not self._mask.done()

    def judged(self, num_tokens: int, kind: Kind, reason: str) -> None:
        """See `Follower`."""
        if num_tokens != len(self.token_ids):
            return
        if kind is Kind.WRONG:
            self.fail(EngineError(reason))
        elif kind is Kind.UNUSABLE:
            self.fail(InvalidRequestError(f"The structure that was asked for is {reason}"))
        elif kind is Kind.FINISHED:
            self.is_finished = True
            self.close()
        self._judged.set()

    def masked(self, num_tokens: int, mask: bytes) -> None:
        """See `Follower`."""
        if num_tokens == len(self.token_ids):
            resolve(self._mask, np.frombuffer(mask, np.uint32))

    def lost(self, process: Process, death: Death) -> None:
        """See `Follower`."""
        if self._process is process:
            self._process = None
            self.not_followed(death)

    def not_followed(self, death: Death) -> None:
        """Find another process, if it waits for one that has died, and unless that happens too often."""
        if not self.is_waiting:
            return
        self._num_deaths += 1
        self._num_own_deaths += death.is_own
        if self._num_own_deaths == MAX_OWN_DEATHS:
            self._finder.refuse(death.text)
            self.fail(InvalidRequestError(f"The structure that was asked for cannot be used: {death.text}"))
        elif self._num_deaths == MAX_DEATHS:
            self.fail(OverloadedError("the processes of the structure are killed again and again", retry_after_s=5))
        else:
            self._finder.find_process(self, is_alone=self._num_own_deaths > 0)

    def _leave(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._is_alone:
            process.end()
        elif process is not None:
            process.forget(self)
