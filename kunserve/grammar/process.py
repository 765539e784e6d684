"""In the server: one structure's process, from its fork to its end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kunserve.grammar.fork_server import Exit, ForkServer
from kunserve.grammar.limits import CPU_S, MEMORY_BYTES, TOKEN_CPU_S, RefusedError
from kunserve.grammar.wire import COST, POSITION, Frames, Kind, frame

# A process that says nothing for so long is ended. Its own limit is of CPU time, which the machine may not give it.
COMPILE_S, ANSWER_S = 60.0, 5.0
_KILL_S = 5.0  # for the fork server to carry out an order; else it is ended, with all processes


@dataclass(frozen=True, slots=True)
class Death:
    """Why a process ended that should not have. `is_own`: of its structure's doing, so far as one can tell."""

    reason: str  # a constant word, for the log
    is_own: bool
    text: str = ""  # for the client whose structure it was


KILLED = Death("killed", is_own=False, text="its process was killed")
_CPU = Death(
    "cpu", is_own=True, text=f"it takes more than {CPU_S:g} s of CPU to compile, or {TOKEN_CPU_S:g} s for a token"
)
_CRASH = Death("crash", is_own=True, text=f"it is nested too deeply, or takes more than {MEMORY_BYTES >> 20} MiB")
_HUNG = Death("hung", is_own=True, text="it takes too long")


class DiedError(Exception):
    """The process ended before it had compiled the structure."""

    def __init__(self, death: Death) -> None:
        super().__init__(death.text)
        self.death = death


class Follower(Protocol):
    """What a process tells about one matcher: `num_tokens` says after how many tokens."""

    number: int

    @property
    def is_waiting(self) -> bool:
        """Return whether an answer is due."""

    def judged(self, num_tokens: int, kind: Kind, reason: str) -> None:
        """Take the verdict on the last token: it may follow (MORE, FINISHED) or not (WRONG, UNUSABLE)."""

    def masked(self, num_tokens: int, mask: bytes) -> None:
        """Take the mask of what may follow."""

    def lost(self, process: Process, death: Death) -> None:
        """Learn that the matcher's process has died."""


class Process(asyncio.Protocol):
    """One process, as the server sees it."""

    def __init__(
        self,
        fork_server: ForkServer,
        serial: int,
        exit_: asyncio.Future[Exit],
        on_death: Callable[[Process, Death], None],
    ) -> None:
        self._fork_server, self._serial, self._exit, self._on_death = fork_server, serial, exit_, on_death
        self.pid: int | None = None  # known when it has ended
        self.cpu_s, self.memory_bytes = CPU_S, 0  # of compiling
        self.first_mask = b""
        self.followers: dict[int, Follower] = {}
        self.is_alive = self._is_wanted = True
        self.used_s = asyncio.get_running_loop().time()  # by a request, last
        self._compiled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._frames = Frames()
        self._awaited: set[int] = set()  # numbers of matchers that an answer is due for
        self._answered_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_hung = False

    @classmethod
    async def start(
        cls, fork_server: ForkServer, kind: str, value: str, on_death: Callable[[Process, Death], None]
    ) -> Process:
        """Compile a structure in a new process.

        Raises RefusedError or DiedError, with nothing left running; KunServeError as `ForkServer.fork`.
        """
        serial, connection, exit_ = await fork_server.fork()
        process = cls(fork_server, serial, exit_, on_death)
        exit_.add_done_callback(process._exited)
        try:
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_unix_connection(lambda: process, sock=connection)
            process._transport = transport
            transport.write(frame(Kind.COMPILE, f"{kind}\0{value}".encode()))
            async with asyncio.timeout(COMPILE_S):
                await asyncio.wait([process._compiled])
        except TimeoutError:
            process._end_hung()
            raise DiedError(_HUNG) from None
        except BaseException:
            process.end()
            raise
        if process._compiled.exception() is not None:
            process.end()
        process._compiled.result()
        return process

    @property
    def is_busy(self) -> bool:
        """Return whether answers are due."""
        return bool(self._awaited)

    def advance(self, follower: Follower, num_tokens: int, token_ids: bytes) -> None:
        """Give a matcher its next tokens (uint32), all so far if it is a new one here."""
        assert self._transport is not None
        self.followers[follower.number] = follower
        self.used_s = asyncio.get_running_loop().time()
        self._transport.write(frame(Kind.ADVANCE, POSITION.pack(follower.number, num_tokens), token_ids))
        if not self._awaited:
            self._answered_s = self.used_s
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(ANSWER_S, self._watch)
        self._awaited.add(follower.number)

    def forget(self, follower: Follower) -> None:
        """Drop a matcher that nobody needs any more."""
        self._awaited.discard(follower.number)
        self.used_s = asyncio.get_running_loop().time()
        if self.followers.pop(follower.number, None) is not None and self._transport is not None:
            self._transport.write(frame(Kind.CLOSE, POSITION.pack(follower.number, 0)))

    def end(self) -> None:
        """Let it end: nobody needs it."""
        self.is_alive = self._is_wanted = False
        self._stop_watching()
        if self._transport is not None:
            self._transport.abort()
        self._fork_server.kill(self._serial)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._answered_s = asyncio.get_running_loop().time()
        for kind, payload in self._frames.receive(data):
            if kind in (Kind.COMPILED, Kind.REFUSED):
                self._resolve(kind, payload)
                continue
            number, num_tokens = POSITION.unpack_from(payload)
            follower = self.followers.get(number)
            if follower is None:  # forgotten meanwhile
                continue
            rest = payload[POSITION.size :]
            if kind is Kind.MASK:
                follower.masked(num_tokens, rest)
            else:
                follower.judged(num_tokens, kind, rest.decode(errors="replace"))
            if kind is not Kind.MORE and not follower.is_waiting:
                self._awaited.discard(number)

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.Protocol`. How it ended, the fork server says."""
        self._transport, self.is_alive = None, False
        self._fork_server.kill(self._serial)

    def _resolve(self, kind: Kind, payload: bytes) -> None:
        self.cpu_s, self.memory_bytes = COST.unpack_from(payload)
        rest = payload[COST.size :]
        if self._compiled.done():
            return
        if kind is Kind.COMPILED:
            self.first_mask = rest
            self._compiled.set_result(None)
        else:
            self._compiled.set_exception(RefusedError(rest.decode(errors="replace")))

    def _exited(self, exit_: asyncio.Future[Exit]) -> None:
        """Note that the process has ended, and tell its matchers."""
        self._stop_watching()
        self.pid = exit_.result().pid
        self.is_alive = False
        if self._transport is not None:
            self._transport.abort()
        death = _HUNG if self._is_hung else _death(exit_.result().status)
        if not self._compiled.done():
            self._compiled.set_exception(DiedError(death))
        if self._is_wanted:
            self._on_death(self, death)
        followers, self.followers = self.followers, {}
        for follower in followers.values():
            follower.lost(self, death)

    def _watch(self) -> None:
        """End it if an answer is due for too long."""
        self._timer = None
        if not self._awaited:
            return
        loop = asyncio.get_running_loop()
        left_s = self._answered_s + ANSWER_S - loop.time()
        if left_s > 0:
            self._timer = loop.call_later(left_s, self._watch)
        else:
            self._end_hung()

    def _end_hung(self) -> None:
        self._is_hung = True
        self.is_alive = False
        self._fork_server.kill(self._serial)
        asyncio.get_running_loop().call_later(_KILL_S, self._end_all)

    def _end_all(self) -> None:
        if not self._exit.done():
            self._fork_server.kill_all()

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _death(status: int | None) -> Death:
    if status is None or status == -1:  # with the fork server, or it was never forked
        return KILLED
    if os.WIFEXITED(status):  # with an exception: of memory, or the library's
        return _CRASH if os.WEXITSTATUS(status) else KILLED
    signum = os.WTERMSIG(status)
    if signum in (signal.SIGPROF, signal.SIGXCPU):
        return _CPU
    return _CRASH if signum in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE) else KILLED
