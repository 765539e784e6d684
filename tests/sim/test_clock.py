"""The virtual clock: it jumps, keeps order, and says when nothing can happen any more."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kunserve.sim.clock import DeadlockError, simulate


def test_time_jumps_from_timer_to_timer() -> None:
    async def main() -> list[float]:
        loop, times = asyncio.get_running_loop(), list[float]()

        async def note(delay_s: float) -> None:
            await asyncio.sleep(delay_s)
            times.append(loop.time())

        await asyncio.gather(note(1e6), note(3.0), note(0.5))
        return times

    assert simulate(main()) == pytest.approx([0.5, 3.0, 1e6])


def test_timeouts_are_simulated_too() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(86400):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert simulate(main()) == pytest.approx(86400)


def test_there_are_no_threads() -> None:
    async def main() -> threading.Thread:
        return await asyncio.to_thread(threading.current_thread)

    assert simulate(main()) is threading.current_thread()


def test_what_threads_would_call_is_called() -> None:
    async def main() -> bool:
        called = asyncio.Event()
        asyncio.get_running_loop().call_soon_threadsafe(called.set)
        return await called.wait()

    assert simulate(main())


def test_timers_of_one_time_are_due_in_the_order_in_which_they_were_set() -> None:
    async def main() -> list[int]:
        loop, order = asyncio.get_running_loop(), list[int]()
        for number in range(9):
            loop.call_at(1.0, order.append, number)
        await asyncio.sleep(2.0)
        return order

    assert simulate(main()) == list(range(9))


def test_waiting_for_what_never_comes_is_an_error() -> None:
    async def main() -> None:
        await asyncio.sleep(2)
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError, match=r"2\.000 s"):
        simulate(main())
