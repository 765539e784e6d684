"""The queue of a device without streams: work in order on one thread, whatever becomes of those who wait for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from kunserve.gpu.queue import WorkQueue


@pytest.fixture
def queue() -> Iterator[WorkQueue]:
    queue = WorkQueue("queue")
    yield queue
    queue.close()


async def test_work_runs_in_order_on_one_thread(queue: WorkQueue) -> None:
    order, threads = list[int](), set[str]()

    def work(number: int) -> int:
        order.append(number)
        threads.add(threading.current_thread().name)
        return -number

    answers = [queue.run(lambda i=i: work(i)) for i in range(5)]  # type: ignore[misc]
    assert [await answer for answer in answers] == [0, -1, -2, -3, -4]
    assert order == [0, 1, 2, 3, 4] and threads == {"queue"}


async def test_errors_are_the_callers_and_the_thread_goes_on(queue: WorkQueue) -> None:
    def fail() -> None:
        raise SystemExit(3)  # of whatever kind

    queue.begin(fail)
    failing = queue.run(fail)
    with pytest.raises(SystemExit):
        await failing
    with pytest.raises(RuntimeError, match="StopIteration"):  # which no future can hold
        await queue.run(lambda: next(iter(())))
    assert await queue.run(lambda: 7) == 7


async def test_a_cancelled_caller_goes_on_when_its_work_has_ended_with_or_without_an_error(queue: WorkQueue) -> None:
    for error in (None, ZeroDivisionError()):
        ends, is_done = threading.Event(), list[bool]()

        def work(ends: threading.Event = ends, done: list[bool] = is_done, error: Exception | None = error) -> None:
            ends.wait()
            done.append(True)
            if error is not None:
                raise error

        async def call() -> None:
            await queue.run(work)

        caller = asyncio.create_task(call())
        for _ in range(3):
            await asyncio.sleep(0)
            caller.cancel()
        await asyncio.sleep(0.01)
        assert not caller.done()
        ends.set()
        await asyncio.wait([caller])
        assert caller.cancelled() and is_done == [True]


async def test_an_abandoned_queue_begins_nothing_more_and_lets_all_others_go(queue: WorkQueue) -> None:
    begun, ends, done = threading.Event(), threading.Event(), list[int]()

    def work() -> None:
        begun.set()
        ends.wait()

    running, waiting = queue.run(work), queue.run(lambda: done.append(2))
    queue.begin(lambda: done.append(3))
    await asyncio.to_thread(begun.wait)
    queue.abandon()
    await asyncio.wait([waiting])
    assert waiting.cancelled() and not queue.has_ended(0.0)
    with pytest.raises(RuntimeError, match="queue is closed"):
        queue.run(lambda: done.append(4))
    ends.set()
    await running
    assert queue.has_ended(60.0) and done == []


def test_work_may_end_after_its_loop(queue: WorkQueue) -> None:
    ends = threading.Event()

    async def leave() -> None:
        queue.run(ends.wait)

    asyncio.run(leave())
    ends.set()

    async def ask() -> int:
        return await queue.run(lambda: 5)

    assert asyncio.run(ask()) == 5
