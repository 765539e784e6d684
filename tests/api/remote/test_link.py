"""The socket between a worker and the engine's process: what is sent at once comes at once, whole and in order."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kunserve.api.remote import link
from kunserve.api.remote.link import Link, framed, read_frame
from kunserve.api.remote.messages import Asked, FromWorker, Problem, Rejected, packed, unpacked
from kunserve.errors import InvalidRequestError, OverloadedError


class End:
    """One end of a link, and what has come to it."""

    def __init__(self) -> None:
        self.came: list[Any] = []
        self.last: Asked | None = None
        self.lost = asyncio.Event()
        self.link = Link[FromWorker, FromWorker](list[FromWorker], self.take, self.take_last, self.lost.set)

    def take(self, message: Any) -> None:
        if message == Rejected("wrong"):
            raise ValueError("a handler that fails")
        self.came.append(message)

    def take_last(self) -> Asked | None:
        last, self.last = self.last, None
        return last


@asynccontextmanager
async def ends() -> AsyncIterator[tuple[End, End]]:
    one, other = End(), End()
    for end, connection in zip((one, other), socket.socketpair(), strict=True):
        await end.link.open(connection)
    yield one, other
    await closed(one, other)


async def closed(one: End, other: End) -> None:
    """Return when a link that is closed is noticed to be, at both ends."""
    one.link.close()
    async with asyncio.timeout(30):
        await one.lost.wait()
        await other.lost.wait()


async def come(end: End, num: int) -> list[Any]:
    async with asyncio.timeout(30):
        while len(end.came) < num:
            await asyncio.sleep(0)
    return end.came


async def test_messages_come_in_order_and_what_is_last_behind_them() -> None:
    async with ends() as (one, other):
        one.last = Asked(9)
        for n in range(3):
            one.link.send(Asked(n))
        assert await come(other, 4) == [Asked(0), Asked(1), Asked(2), Asked(9)]
        other.link.send(Rejected("x"))
        other.link.send_now()
        assert await come(one, 1) == [Rejected("x")]


async def test_frames_of_megabytes_come_whole() -> None:
    async with ends() as (one, other):
        texts = ["x" * 3_000_000, "y", "z" * 1_000_000]
        for text in texts:
            one.link.send(Rejected(text))
            one.link.send_now()
        assert await come(other, 3) == [Rejected(text) for text in texts]


async def test_what_fails_for_one_message_stops_no_other() -> None:
    async with ends() as (one, other):
        for reason in ("right", "wrong", "right"):
            one.link.send(Rejected(reason))
        assert await come(other, 2) == [Rejected("right")] * 2


async def test_what_is_sent_before_there_is_a_connection_waits_for_it() -> None:
    one, other = End(), End()
    one.link.send(Asked(1))
    ours, theirs = socket.socketpair()
    await other.link.open(theirs)
    await one.link.open(ours)
    assert await come(other, 1) == [Asked(1)]
    await closed(one, other)


async def test_nothing_is_sent_to_an_end_that_is_gone() -> None:
    async with ends() as (one, other):
        await closed(one, other)
        other.link.send(Asked(1))
        other.link.send_now()
    assert one.came == []


async def test_an_end_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MOST_UNREAD_BYTES", 1 << 20)
    end, (ours, theirs) = End(), socket.socketpair()
    await end.link.open(ours)
    with theirs:
        end.link.send(Rejected("x" * (8 << 20)))
        async with asyncio.timeout(30):
            await end.lost.wait()


def test_a_frame_can_be_waited_for_without_a_loop() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.sendall(framed(b"hello") + framed(b"")[:2])
            assert read_frame(ours) == b"hello"
        with pytest.raises(EOFError):
            read_frame(ours)


def test_errors_and_token_ids_cross_as_they_are() -> None:
    for error in (OverloadedError("full", retry_after_s=3), InvalidRequestError("no", param="n")):
        crossed = Problem.of(error).error
        assert type(crossed) is type(error) and vars(crossed) == vars(error)
    assert unpacked(packed([0, 5, 2**32 - 1])).tolist() == [0, 5, 2**32 - 1]
