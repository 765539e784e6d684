"""Fair use of the event loop: whoever comes in one moment takes turns, so that together they do not hold it up.

A loop runs everything that is ready before it looks at anything else. Forty requests at once, each with a millisecond
or two of parsing, would keep forty streams waiting; so would the sequences of one request that has a thousand.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Turns:
    """Hands out a number of turns in each round of the event loop, in the order in which they are asked for."""

    def __init__(self, per_round: int = 1) -> None:
        self._per_round = per_round
        self._num_left = per_round  # in this round
        self._waiting: deque[asyncio.Future[None] | Callable[[], None]] = deque()

    async def take(self) -> None:
        """Return when it is the caller's turn: at once if this round has one left."""
        if not self._is_now():
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn

    def run(self, work: Callable[[], None]) -> None:
        """Call `work` when it is its turn, whatever becomes of the caller: at once if this round has one left."""
        if self._is_now():
            work()
        else:
            self._waiting.append(work)

    def later(self, work: Callable[[], None]) -> None:
        """Call `work` when it is its turn, but not yet: what comes until then may become one piece of work."""
        self._waiting.append(work)
        if self._num_left == self._per_round:
            self._num_left = 0  # what is left of this round
            asyncio.get_running_loop().call_soon(self._next)

    def _is_now(self) -> bool:
        """Use up a turn of this round, if one is left."""
        if self._num_left == 0:
            return False
        if self._num_left == self._per_round:
            asyncio.get_running_loop().call_soon(self._next)
        self._num_left -= 1
        return True

    async def slices(self, items: Sequence[T], size: int) -> AsyncIterator[Sequence[T]]:
        """Yield `items` in pieces of `size`, each in a turn of its own; the caller has the first turn already."""
        for start in range(0, len(items), size):
            if start:
                await self.take()
            yield items[start : start + size]

    def _next(self) -> None:
        """Begin a new round."""
        loop, self._num_left = asyncio.get_running_loop(), self._per_round
        while self._waiting and self._num_left > 0:
            turn = self._waiting.popleft()
            if isinstance(turn, asyncio.Future) and turn.done():  # its client has left
                continue
            self._num_left -= 1
            if isinstance(turn, asyncio.Future):
                turn.set_result(None)
            else:
                try:
                    turn()
                except (KeyboardInterrupt, SystemExit):
                    raise
                except BaseException as error:  # a panic in Rust code is no Exception; it stops no other
                    loop.call_exception_handler({"message": f"a turn of {turn!r} failed", "exception": error})
        if self._num_left < self._per_round:
            loop.call_soon(self._next)
