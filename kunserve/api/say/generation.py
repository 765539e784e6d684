"""The sequences of one HTTP request in the engine: submitted together, read as one stream, never left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from kunserve.api.wire.admission import Reservation
from kunserve.api.wire.context import Api
from kunserve.api.wire.turns import Turns
from kunserve.engine.request import Output, Request
from kunserve.engine.text.stream import Sink, merged
from kunserve.errors import KunServeError

SLICE = 32  # sequences in a turn of the event loop: 1 to 2 ms

Delivered = dict[int, Output]  # index of a sequence -> what came of it


class Deliveries(AsyncIterator[Delivered]):
    """What comes of some sequences, until each has given its final output: what came at once is read at once.

    A step ends for hundreds of sequences in one moment, and each then has something to write: they take turns. Waking
    a task for each would cost more than the writing, so `take_now` may take what comes while the reader waits.
    """

    def __init__(self, turns: Turns, num_sequences: int) -> None:
        self._turns, self._num_open = turns, num_sequences
        self._came: Delivered = {}
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None  # while it waits
        self._is_due = False  # a turn will come to hand over what came
        # Takes what came, without waiting, and returns True; False to leave all of it to the reader.
        self.take_now: Callable[[Delivered], bool] = lambda came: False

    def put(self, index: int, output: Output) -> None:
        """Add a delta of a sequence to what the reader, if it is slow, has not taken yet."""
        last = self._came.get(index)
        self._came[index] = output if last is None else merged(last, output)
        if output.finish_reason is not None:
            self._num_open -= 1
        if not self._is_due:
            self._hand_over_soon()

    def fail(self, error: Exception) -> None:
        """End all with an error, after what is already there."""
        self._error = self._error or error
        self._hand_over_soon()

    def put_token(self, index: int, text: str, token_id: int) -> None:
        """Add a delta of a sequence as `put` does, of one token: what nearly all of them are."""
        if self._is_due or self._came or self._reader is None:
            self.put(index, Output(text, (token_id,)))
            return
        self._came[index] = Output(text, (token_id,))
        self._is_due = True
        self._turns.later(self._hand_over)

    def _hand_over_soon(self) -> None:
        if self._reader is not None and not self._is_due:
            self._is_due = True
            self._turns.later(self._hand_over)

    def _hand_over(self) -> None:
        """Give what came to `take_now`, or to the reader."""
        self._is_due = False
        if self._reader is None or self._reader.done():  # it has left
            return
        try:
            if self._came and self.take_now(self._came):
                self._came = {}
        except Exception as error:
            self._came, self._error = {}, error
        if self._came or self._error is not None or self._num_open == 0:
            self._reader.set_result(None)

    async def __anext__(self) -> Delivered:
        if not self._came and self._error is None and self._num_open:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
            await self._turns.take()
        if self._came:
            came, self._came = self._came, {}
            return came
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration


class _Sequence(Sink):
    """One of the sequences, as the engine sees it."""

    __slots__ = ("_deliveries", "_index")

    def __init__(self, deliveries: Deliveries, index: int) -> None:
        self._deliveries, self._index = deliveries, index

    def put(self, output: Output) -> None:
        """See `Sink.put`."""
        self._deliveries.put(self._index, output)

    def put_token(self, text: str, token_id: int) -> None:
        """See `Sink.put_token`."""
        self._deliveries.put_token(self._index, text, token_id)

    def fail(self, error: KunServeError) -> None:
        """See `Sink.fail`."""
        self._deliveries.fail(error)


@asynccontextmanager
async def submitted(api: Api, reservation: Reservation, requests: Sequence[Request]) -> AsyncIterator[Deliveries]:
    """Submit all requests or none, some in each turn of the loop; inside, read what comes of them.

    However the block is left (end, error, the client gone: cancellation), nothing of them stays in the engine.
    """
    deliveries, num_submitted = Deliveries(api.deliveries, len(requests)), 0
    try:
        async for some in api.turns.slices(requests, SLICE):
            answers = []
            for request in some:
                answers.append(api.backend.submit_to(request, _Sequence(deliveries, num_submitted)))
                num_submitted += 1
                reservation.leave()
            for taken in answers:
                if taken is not None and (error := await taken) is not None:
                    raise error
        yield deliveries
    finally:
        for request in requests[:num_submitted]:
            api.departures.run(partial(api.backend.abort, request.request_id))
