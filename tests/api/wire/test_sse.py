from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import cast

import pytest
from aiohttp import web

from kunserve.api.wire.sse import write_while_read


class FakeTransport:
    """A write buffer whose fill the test tells, one value for each look at it."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = list(sizes)
        self.is_aborted = False

    def get_write_buffer_size(self) -> int:
        return self.sizes.pop(0)

    def abort(self) -> None:
        self.is_aborted = True


class FakeConnection:
    """As much of a request as writing needs; draining takes as many timeouts as there are sizes to see."""

    def __init__(self, transport: FakeTransport | None) -> None:
        self.transport = transport
        self.writer = self

    async def drain(self) -> None:
        if self.transport is not None and self.transport.sizes:
            await asyncio.Event().wait()


async def write(connection: FakeConnection, pending: Callable[[], Awaitable[None]]) -> None:
    await write_while_read(cast(web.BaseRequest, connection), pending, 100, timeout_s=0.001)


async def test_a_client_that_reads_slowly_is_waited_for() -> None:
    transport = FakeTransport(50, 140, 130, 20)  # before, then after each timeout
    connection = FakeConnection(transport)
    await write(connection, connection.drain)
    assert transport.sizes == []
    assert not transport.is_aborted


async def test_a_client_that_reads_nothing_is_cut_off() -> None:
    transport = FakeTransport(50, 140, 140, 20)
    connection = FakeConnection(transport)
    with pytest.raises(ConnectionResetError, match="stopped reading"):
        await write(connection, connection.drain)
    assert transport.is_aborted
    assert transport.sizes == [20]


async def test_a_client_that_is_gone() -> None:
    connection = FakeConnection(None)
    with pytest.raises(ConnectionResetError, match="gone"):
        await write(connection, connection.drain)
