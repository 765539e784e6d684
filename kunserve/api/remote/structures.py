"""Structures as a worker sees them: where they begin, and where tokens of another server lead."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from kunserve.api.remote import messages as m
from kunserve.api.wire.grammars import Compiler, Structure
from kunserve.errors import KunServeError
from kunserve.sampling import TokenMask


class Asker(Protocol):
    """What talks to the engine's process."""

    def new_number(self) -> int:
        """Return a number that nothing of this worker's has."""

    def send(self, message: m.FromWorker) -> None:
        """Tell the engine's process something."""

    def flush(self) -> None:
        """Send what was to be sent soon."""

    async def ask(self, make: Callable[[int], m.FromWorker]) -> Any:
        """Return the answer to a call, which `make` makes of its number."""


class _Position:
    """A position in a structure that the engine's process keeps for as long as this object lives."""

    def __init__(self, asker: Asker) -> None:
        self.number = asker.new_number()
        loop = asyncio.get_running_loop()  # what held it may have gone to a thread
        weakref.finalize(self, loop.call_soon_threadsafe, asker.send, m.Forget(self.number)).atexit = False


class RemoteConstraint:
    """A request's structure. Implements `Begun`; its masks are where the engine is."""

    def __init__(self, asker: Asker, position: _Position) -> None:
        self._asker, self.position = asker, position
        self._given: list[int] = []  # tokens that nobody has judged yet
        self.error: KunServeError | None = None
        self.is_finished = False

    def copy(self) -> RemoteConstraint:
        """See `Begun`."""
        return RemoteConstraint(self._asker, self.position)

    def mask(self, num_accepted: int) -> TokenMask:
        """Raise: nothing is sampled in a worker."""
        raise AssertionError("a worker samples nothing")

    def accept(self, token_id: int) -> None:
        """See `Constraint.accept`."""
        self._given.append(token_id)

    async def decided(self) -> None:
        """See `Constraint.decided`."""
        begin, self.position = self.position, _Position(self._asker)
        given, self._given = m.packed(self._given), []
        try:
            end = self.position.number
            self.is_finished = await self._asker.ask(lambda call: m.Replay(call, begin.number, end, given))
        except KunServeError as error:
            self.error = error

    def release(self) -> None:
        """See `Constraint.release`."""

    def close(self) -> None:
        """See `Constraint.close`."""


class RemoteGrammars(Compiler):
    """The compiler in the engine's process."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker

    async def compile(self, structure: Structure, reasons: bool, owner: str = "") -> RemoteConstraint:
        """See `Compiler`."""
        position, (kind, value, param) = _Position(self._asker), (structure.kind, structure.value, structure.param)
        await self._asker.ask(lambda call: m.Compile(call, position.number, kind, value, param, reasons, owner))
        return RemoteConstraint(self._asker, position)
