"""The way in: what the server holds of bodies that are not requests yet, of all clients together, within one bound.

A client that stops in the middle of its body holds what it has sent until its time is over: two thousand of them would
hold gigabytes. Where there is no room left, a body that has not grown for `IDLE_S` gives way to one that grows, so that
those who stopped cannot keep out those who go on; and large bodies leave the last part of the memory to small ones.
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NoReturn

from kunserve.api.wire.admission import SHARE
from kunserve.api.wire.backend import ApiSettings, Counters
from kunserve.errors import OverloadedError, PayloadTooLargeError

IDLE_S = 2.0  # a body that has not grown for so long may have to give way
MOST_BYTES = 64 << 10  # of a small body: most have less
LEFT_TO_SMALL = 8  # large bodies leave one part of so many


@dataclass(slots=True, eq=False)
class Body:
    """One body, as far as it has come. `give_way` is called if it has to: whoever reads it shall stop.

    Beyond `MOST_BYTES` it is in pages of its own: freed pieces of a heap that others share seldom leave the process.
    """

    memory: BodyMemory
    owner: str
    give_way: Callable[[], None]
    num_bytes: int = 0
    grown_s: float = 0.0
    has_given_way: bool = False
    whole: bytes = b""
    _small: bytearray = field(default_factory=bytearray)
    _pages: mmap.mmap | None = None

    def add(self, piece: bytes, now_s: float) -> None:
        """Append what came at `now_s`. PayloadTooLargeError, or OverloadedError if there is no room for it now."""
        if self.num_bytes + len(piece) > self.memory.largest_body_bytes:
            raise too_large(self.memory.largest_body_bytes)
        self.memory.make_room(self, len(piece), now_s)
        before, self.num_bytes, self.grown_s = self.num_bytes, self.num_bytes + len(piece), now_s
        if self._pages is None and self.num_bytes <= MOST_BYTES:
            self._small += piece
            return
        if self._pages is None:
            self._pages = _pages(self.memory.largest_body_bytes)
            self._pages[:before] = bytes(self._small)
            self._small = bytearray()
        self._pages[before : self.num_bytes] = piece

    def end(self) -> None:
        """Put all of it into `whole`; it gives way to nobody from now on. OverloadedError if it had to before."""
        self.memory.end(self)
        self.whole = bytes(self._small) if self._pages is None else self._pages[: self.num_bytes]
        self._free()

    def forget(self) -> None:
        """Free what has come, also of work that holds this body and that no thread will do any more."""
        self.num_bytes, self.whole = 0, b""
        self._free()

    def _free(self) -> None:
        self._small = bytearray()
        if self._pages is not None:
            self._pages.close()
            self._pages = None


def too_large(max_bytes: int) -> PayloadTooLargeError:
    """Return what is answered to a body that can never be read."""
    return PayloadTooLargeError(f"The body is larger than {max_bytes} bytes.")


def _pages(num_bytes: int) -> mmap.mmap:
    """Return so much private memory, of which only what is written takes any."""
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_NOHUGEPAGE)  # else the first byte would take two MiB
    return pages


class BodyMemory:
    """Counts the bytes of all bodies from their first byte until they are requests, or refused, or their client left.

    Times are in seconds, on any clock that is always the same.
    """

    def __init__(self, metrics: Counters, settings: ApiSettings) -> None:
        self._metrics, self._max_bytes = metrics, settings.max_body_memory_bytes
        self.largest_body_bytes = settings.largest_body_bytes
        self._is_shared = len(settings.api_keys) > 1
        self._held = defaultdict[str | None, int](int)  # bytes by owner; None: of all
        self._growing: dict[Body, None] = {}  # who has not grown for longest is the first

    @property
    def num_bytes(self) -> int:
        """Return the bytes of bodies that are held now."""
        return self._held[None]

    @contextmanager
    def held(self, owner: str, give_way: Callable[[], None]) -> Iterator[Body]:
        """Hold one body; however the block is left, nothing of it is kept."""
        body = Body(self, owner, give_way)
        try:
            yield body
        finally:
            self._drop(body)

    def make_room(self, body: Body, num_bytes: int, now_s: float) -> None:
        """Count so many more bytes of `body`. OverloadedError if they have no room, or the body has lost its own."""
        while not body.has_given_way and (reason := self._lack(body, num_bytes)) is not None:
            idle = self._idle(None if reason == "body_memory" else body.owner, body)
            if idle is None or now_s < idle.grown_s + IDLE_S:
                self._refuse(reason)
            self._drop(idle)
            idle.has_given_way = True
            idle.give_way()
        self._check(body)
        self._count(body.owner, num_bytes)
        self._growing.pop(body, None)
        self._growing[body] = None

    def end(self, body: Body) -> None:
        """See `Body.end`."""
        self._check(body)
        self._growing.pop(body, None)

    def _lack(self, body: Body, num_bytes: int) -> str | None:
        """Return the reason (of `Metrics.rejection`) why `body` cannot have more bytes; None if it can."""
        is_small = body.num_bytes + num_bytes <= MOST_BYTES
        left = self._max_bytes - self._held[None] - num_bytes
        if left < (0 if is_small else self._max_bytes // LEFT_TO_SMALL):
            return "body_memory"
        own = self._held.get(body.owner, 0)
        return "body_share" if self._is_shared and own and own + num_bytes > SHARE * left else None

    def _idle(self, owner: str | None, body: Body) -> Body | None:
        """Return the body that has not grown for longest, of all owners or of one, but never `body`."""
        return next((one for one in self._growing if one is not body and owner in (None, one.owner)), None)

    def _drop(self, body: Body) -> None:
        """Forget what has come of a body; its bytes count no longer."""
        self._growing.pop(body, None)
        self._count(body.owner, -body.num_bytes)
        body.forget()

    def _count(self, owner: str, num_bytes: int) -> None:
        for whose in (None, owner):
            self._held[whose] += num_bytes
        if self._held[owner] == 0:
            del self._held[owner]
        self._metrics.body_bytes(self._held[None])

    def _check(self, body: Body) -> None:
        if body.has_given_way:
            self._refuse("body_memory")

    def _refuse(self, reason: str) -> NoReturn:
        self._metrics.rejection(reason)
        whose = "this key's" if reason == "body_share" else "unfinished"
        raise OverloadedError(f"The memory for {whose} bodies is in use.", retry_after_s=round(IDLE_S))
