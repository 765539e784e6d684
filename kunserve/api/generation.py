"""The sequences of one HTTP request in the engine: submitted together, read as one stream, never left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

from kunserve.api.backend import Backend
from kunserve.engine.request import Output, Request
from kunserve.errors import EngineError

SUBMITS_A_ROUND = 64  # of the event loop: 2 ms


async def _next(stream: AsyncIterator[Output]) -> Output:
    async for output in stream:
        return output
    raise EngineError("The engine ended a request without its final output.")


async def merge(streams: Sequence[AsyncIterator[Output]]) -> AsyncGenerator[tuple[int, Output]]:
    """Yield (index of the stream, delta) as they come, until every stream has given its final one."""
    if len(streams) == 1:  # nearly always: no task per token
        output = Output()
        while output.finish_reason is None:
            output = await _next(streams[0])
            yield 0, output
        return
    pending = {asyncio.ensure_future(_next(stream)): index for index, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=pending.__getitem__):
                output, index = task.result(), pending.pop(task)
                if output.finish_reason is None:
                    pending[asyncio.ensure_future(_next(streams[index]))] = index
                yield index, output
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


@asynccontextmanager
async def submitted(backend: Backend, requests: Sequence[Request]) -> AsyncIterator[AsyncIterator[tuple[int, Output]]]:
    """Submit all requests or none; inside, read their merged deltas.

    However the block is left (end, error, the client gone: cancellation), nothing of them stays in the engine.
    """
    streams: list[AsyncIterator[Output]] = []
    outputs = merge(streams)
    try:
        for request in requests:
            streams.append(backend.submit(request))
            if len(streams) % SUBMITS_A_ROUND == 0:
                await asyncio.sleep(0)
        yield outputs
    finally:
        for request in requests[: len(streams)]:
            backend.abort(request.request_id)  # at once: before anything is awaited
        await outputs.aclose()
