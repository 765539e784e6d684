"""What all workers share, as one of them sees it: the queue's door, and the stored responses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kunserve.api.remote import messages as m
from kunserve.api.remote.structures import Asker
from kunserve.api.wire.admission import Door, Reservation
from kunserve.api.wire.response_store import Responses, Stored


class _RemoteReservation(Reservation):
    """Places in the queue, under a number of the worker's."""

    def __init__(self, asker: Asker, num_reqs: int) -> None:
        self._asker, self.number, self.num_reqs = asker, asker.new_number(), num_reqs

    def leave(self, num_reqs: int = 1) -> None:
        """See `Reservation`. It comes right behind the request that is in the queue now."""
        if num_reqs:
            self.num_reqs -= num_reqs
            self._asker.send(m.Leave(self.number, num_reqs))


class RemoteDoor(Door):
    """The way into the queue, which is in the engine's process."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker

    async def check(self, owner: str = "", num_reqs: int = 1, num_tokens: int = 1) -> None:
        """See `Door`."""
        await self._asker.ask(lambda call: m.Check(call, owner, num_reqs, num_tokens))

    @asynccontextmanager
    async def accepted(self, owner: str, num_reqs: int, num_tokens: int) -> AsyncIterator[Reservation]:
        """See `Door`."""
        reservation = _RemoteReservation(self._asker, num_reqs)
        try:
            await self._asker.ask(lambda call: m.Reserve(call, reservation.number, owner, num_reqs, num_tokens))
            yield reservation
        finally:  # also of a client that left before there was an answer
            reservation.leave(reservation.num_reqs)


class RemoteResponses(Responses):
    """The stored responses, which any worker may be asked for."""

    def __init__(self, asker: Asker, is_on: bool) -> None:
        self._asker, self._is_on = asker, is_on

    @property
    def is_on(self) -> bool:
        """See `Responses`."""
        return self._is_on

    def put(self, response_id: str, owner: str, stored: Stored) -> None:
        """See `Responses`."""
        self._asker.send(m.Put(response_id, owner, stored.response, stored.items, stored.num_input_items))
        self._asker.flush()  # before the client has its answer

    async def load(self, response_id: str, owner: str) -> Stored | None:
        """See `Responses`."""
        found = await self._asker.ask(lambda call: m.Load(call, response_id, owner))
        return None if found is None else Stored(*found)

    async def delete(self, response_id: str, owner: str) -> bool:
        """See `Responses`."""
        is_gone: bool = await self._asker.ask(lambda call: m.Delete(call, response_id, owner))
        return is_gone
