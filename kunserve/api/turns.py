"""The way in: requests that come in one moment take turns, so that together they do not hold the event loop up.

Each costs a millisecond or two of parsing and tokenizing. A loop runs everything that is ready before it looks at
anything else, so forty at once would keep forty streams waiting; this lets one of them go in each round of the loop.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """At most one turn per round of the event loop, in order of arrival."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_taken = False  # in this round

    async def take(self) -> None:
        """Return when it is the caller's turn: at once if nobody else's is in this round."""
        loop = asyncio.get_running_loop()
        if not self._is_taken:
            self._is_taken = True
            loop.call_soon(self._next)
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next(self) -> None:
        """A new round."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # else its client has left
                turn.set_result(None)
                asyncio.get_running_loop().call_soon(self._next)
                return
        self._is_taken = False
