"""A work queue on a thread of its own: what stands for a stream on devices that have none."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")

LAST_WAIT_S = 0.5  # for the threads of a lost device, before its memory is left to the end of the process


class Answer(asyncio.Future[T]):
    """What becomes of work that is not interrupted: a caller that is cancelled goes on only when it is done.

    Else the memory that a thread or a stream works on would be given to others under it.
    """

    def __init__(self, give_up: Callable[[], object] | None = None) -> None:
        """Begin without an answer. `give_up` is called when a caller is cancelled: it may end the work earlier."""
        super().__init__(loop=asyncio.get_running_loop())
        self._give_up = give_up

    def cancel(self, msg: Any = None) -> bool:
        """Refuse: whoever waits is told of its own cancellation, however often, when there is an answer."""
        if self._give_up is not None:
            self._give_up()
        return False

    def end(self) -> None:
        """Answer, to nobody perhaps, that there is none."""
        super().cancel()


def answer_of(work: Awaitable[T]) -> Answer[T]:
    """Return the answer of any work. Callers may be answered before it ends; it is asked to end if one gives up."""
    if isinstance(work, Answer):
        return work
    running = asyncio.ensure_future(work)
    answer = Answer[T](running.cancel)

    def tell(running: asyncio.Future[T]) -> None:
        error = None if running.cancelled() else running.exception()
        if answer.done():
            return
        if running.cancelled():
            answer.end()
        elif error is None:
            answer.set_result(running.result())
        else:
            answer.set_exception(error)

    running.add_done_callback(tell)
    return answer


class _Item(Generic[T]):
    """Work, and the loop that waits for it; nobody does if there is no answer."""

    __slots__ = ("_answer", "_error", "_value", "_work")

    def __init__(self, work: Callable[[], T], answer: Answer[T] | None) -> None:
        self._work, self._answer = work, answer
        self._value: T | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do the work, on the queue's thread."""
        try:
            self._value = self._work()
        except StopIteration as error:  # no future takes one: its caller would wait for ever
            self._error = RuntimeError("work on a queue raised StopIteration")
            self._error.__cause__ = error
        except BaseException as error:  # whatever it is, it is the caller's
            self._error = error
        if self._answer is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._answer.get_loop().call_soon_threadsafe(self._tell)

    def drop(self) -> None:
        """Give the work up: it is never done, and whoever waits for it is told."""
        if self._answer is not None:
            with suppress(RuntimeError):
                self._answer.get_loop().call_soon_threadsafe(self._answer.end)

    def _tell(self) -> None:
        assert self._answer is not None
        error, self._error = self._error, None  # its traceback knows this item: all that the work holds would stay
        if self._answer.done():
            return
        if error is None:
            self._answer.set_result(self._value)  # type: ignore[arg-type]  # it is what the work returned
        else:
            self._answer.set_exception(error)


class WorkQueue:
    """Runs submitted work in order on one thread, optionally pinned to one core.

    A thread of our own, because one call of a device is made for each step: a pool's future, with its lock, and those
    that wrap and shield it cost more than all else that the loop does for the call.
    """

    def __init__(self, name: str, core: int | None = None) -> None:
        self._items = SimpleQueue[_Item[Any] | None]()  # None: there are no more
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()
        if core is not None:
            os.sched_setaffinity(self._thread.native_id or 0, {core})

    def _work(self) -> None:
        while (item := self._items.get()) is not None:
            item.run()
            del item  # what it holds: the next may be long in coming

    def run(self, work: Callable[[], T]) -> Answer[T]:
        """Run `work` after everything submitted before. Once begun it is not interrupted: a cancelled caller waits."""
        answer = Answer[T]()
        self._submit(_Item(work, answer))
        return answer

    def begin(self, work: Callable[[], None]) -> None:
        """Have `work` run after everything submitted before. Nobody hears of its end, nor of its errors."""
        self._submit(_Item(work, None))

    def _submit(self, item: _Item[Any]) -> None:
        if self._is_closed:
            raise RuntimeError(f"{self._thread.name} is closed")
        self._items.put(item)

    def abandon(self) -> None:
        """Begin nothing more, and wait for nothing."""
        self._is_closed = True
        with suppress(Empty):
            while (item := self._items.get_nowait()) is not None:
                item.drop()
        self._items.put(None)

    def has_ended(self, timeout_s: float) -> bool:
        """Return whether the thread of an abandoned queue has ended, at the latest after so many seconds."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Wait for what runs and end the thread."""
        self._is_closed = True
        self._items.put(None)
        self._thread.join()


async def to_the_end(work: Awaitable[T]) -> T:
    """Return what `work` returns. A caller that is cancelled, however often, goes on only when `work` has ended.

    Else the memory that a thread or a stream works on would be given to others under it.
    """
    running = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            with suppress(asyncio.CancelledError):  # once more: the first one is raised below
                await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # seen: the caller is gone
        raise


async def gather_all(awaitables: Iterable[Awaitable[T]]) -> list[T]:
    """Wait for all of them, whatever happens to one; then raise the first error."""
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
