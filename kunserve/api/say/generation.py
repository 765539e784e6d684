"""The sequences of one HTTP request in the engine: submitted together, read as one stream, never left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from kunserve.api.wire.admission import Reservation
from kunserve.api.wire.context import Api
from kunserve.api.wire.turns import Turns
from kunserve.engine.request import Output, Request
from kunserve.errors import EngineError

SLICE = 32  # sequences in a turn of the event loop: 1 to 2 ms

Delivery = tuple[int, Output]  # index of the sequence, what came of it


async def _next(stream: AsyncIterator[Output]) -> Output:
    async for output in stream:
        return output
    raise EngineError("The engine ended a request without its final output.")


class Deliveries(AsyncIterator[Delivery]):
    """What comes of some sequences, until each has given its final output.

    A step ends for hundreds of sequences in one moment, and each then has something to write: they take turns.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._num_open = 0
        self._only: AsyncIterator[Output] | None = None  # nearly always there is one: no task then
        self._came: asyncio.Queue[Delivery | Exception] = asyncio.Queue(1)
        self._tasks: list[asyncio.Task[None]] = []

    def add(self, stream: AsyncIterator[Output], is_only: bool) -> None:
        """Read one more."""
        if is_only:
            self._only = stream
        else:
            self._tasks.append(asyncio.create_task(self._read(self._num_open, stream)))
        self._num_open += 1

    async def _read(self, index: int, stream: AsyncIterator[Output]) -> None:
        try:
            output = Output()
            while output.finish_reason is None:
                output = await _next(stream)
                await self._came.put((index, output))
        except Exception as error:
            await self._came.put(error)

    async def __anext__(self) -> Delivery:
        if self._num_open == 0:
            raise StopAsyncIteration
        delivery = (0, await _next(self._only)) if self._only is not None else await self._came.get()
        if isinstance(delivery, Exception):
            raise delivery
        self._num_open -= delivery[1].finish_reason is not None
        await self._turns.take()
        return delivery

    async def close(self) -> None:
        """Leave no task behind."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def submitted(
    api: Api, reservation: Reservation, requests: Sequence[Request]
) -> AsyncIterator[AsyncIterator[Delivery]]:
    """Submit all requests or none, some in each turn of the loop; inside, read what comes of them.

    However the block is left (end, error, the client gone: cancellation), nothing of them stays in the engine.
    """
    deliveries, num_submitted = Deliveries(api.deliveries), 0
    try:
        async for some in api.turns.slices(requests, SLICE):
            for request in some:
                deliveries.add(api.backend.submit(request), is_only=len(requests) == 1)
                num_submitted += 1
                reservation.leave()
        yield deliveries
    finally:
        for request in requests[:num_submitted]:
            api.departures.run(partial(api.backend.abort, request.request_id))
        await deliveries.close()
