"""Links: whose turn it is, and that no turn is ever lost."""

from __future__ import annotations

import asyncio
import random

import pytest
from memory_contract import let_others_run

from kunserve.gpu.links import HOST, Links, Priority


class Transfers:
    """Transfers that record their order and hold the link until they are let go."""

    def __init__(self) -> None:
        self.links, self.order = Links(), list[str]()
        self.on_link: dict[tuple[int, int], int] = {}
        self._gates: dict[str, asyncio.Event] = {}

    def begin(self, name: str, priority: Priority, source: int = 0, destination: int = 1) -> asyncio.Task[None]:
        self._gates[name] = asyncio.Event()
        return asyncio.create_task(self._transfer(name, priority, (source, destination)))

    def let_go(self, name: str) -> None:
        self._gates[name].set()

    async def _transfer(self, name: str, priority: Priority, link: tuple[int, int]) -> None:
        async with self.links.turn(*link, priority, 1):
            self.on_link[link] = self.on_link.get(link, 0) + 1
            assert self.on_link[link] == 1  # one at a time
            self.order.append(name)
            try:
                await self._gates[name].wait()
            finally:
                self.on_link[link] -= 1


async def test_activations_then_kv_then_weights_each_in_order_of_asking() -> None:
    transfers = Transfers()
    tasks = [transfers.begin("first", Priority.WEIGHTS)]
    await let_others_run()
    for name, priority in (
        ("weights", Priority.WEIGHTS),
        ("kv 1", Priority.KV),
        ("kv 2", Priority.KV),
        ("activation", Priority.ACTIVATION),
    ):
        tasks.append(transfers.begin(name, priority))
        await let_others_run()
    assert transfers.order == ["first"]
    for name in ("first", "activation", "kv 1", "kv 2", "weights"):
        transfers.let_go(name)
        await let_others_run()
    assert transfers.order == ["first", "activation", "kv 1", "kv 2", "weights"]
    await asyncio.gather(*tasks)


async def test_links_do_not_wait_for_each_other() -> None:
    transfers = Transfers()
    ways = [(0, 1), (1, 0), (HOST, 1), (1, 2)]
    tasks = [transfers.begin(f"{way}", Priority.KV, *way) for way in ways]
    await let_others_run()
    assert len(transfers.order) == 4
    for way in ways:
        transfers.let_go(f"{way}")
    await asyncio.gather(*tasks)


async def test_a_transfer_that_fails_frees_the_link() -> None:
    transfers = Transfers()
    with pytest.raises(OSError, match="lost"):
        async with transfers.links.turn(0, 1, Priority.KV, 1):
            raise OSError("lost")
    following = transfers.begin("following", Priority.KV)
    await let_others_run()
    assert transfers.order == ["following"]
    transfers.let_go("following")
    await following


async def test_a_cancelled_waiter_passes_its_turn_on() -> None:
    """Also one that is cancelled when it has been given its turn, but has not run yet."""
    transfers, gate = Transfers(), asyncio.Event()

    async def hold_and_cancel() -> None:
        async with transfers.links.turn(0, 1, Priority.KV, 1):
            await gate.wait()
        chosen.cancel()

    first = asyncio.create_task(hold_and_cancel())
    await let_others_run()
    waiting, chosen, last = (transfers.begin(name, Priority.KV) for name in ("waiting", "chosen", "last"))
    await let_others_run()
    waiting.cancel()
    await let_others_run()
    gate.set()
    await first
    await let_others_run()
    assert transfers.order == ["last"]
    transfers.let_go("last")
    await last
    assert waiting.cancelled() and chosen.cancelled()


async def test_random_transfers_and_cancellations() -> None:
    rng, transfers = random.Random(0), Transfers()
    tasks = {}
    for i in range(600):
        name = f"{i}"
        tasks[name] = transfers.begin(name, rng.choice(list(Priority)), rng.randrange(2), 2)
        for _ in range(rng.randrange(3)):
            victim = rng.choice(list(tasks))
            if rng.random() < 0.5:
                tasks[victim].cancel()
            else:
                transfers.let_go(victim)
            if rng.random() < 0.5:
                await asyncio.sleep(0)
    for name in tasks:
        transfers.let_go(name)
    await asyncio.wait(tasks.values())
    done = [name for name, task in tasks.items() if not task.cancelled()]
    assert len(done) >= 100 and set(done) <= set(transfers.order)
    async with transfers.links.turn(0, 2, Priority.WEIGHTS, 1), transfers.links.turn(1, 2, Priority.WEIGHTS, 1):
        pass  # both are free


async def test_how_fast_kv_goes_is_what_it_was_lately(monkeypatch: pytest.MonkeyPatch) -> None:
    links, now = Links(usual_bytes_per_s=1e9), [0.0]
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now[0])

    async def send(num_bytes: int, seconds: float, priority: Priority = Priority.KV, to: int = 1) -> None:
        async with links.turn(0, to, priority, num_bytes):
            now[0] += seconds

    await send(1 << 30, 100.0, Priority.ACTIVATION)  # waits for more than its bytes
    assert links.kv_bytes_per_s == 1e9
    for _ in range(200):
        await send(100, 1.0)
    assert links.kv_bytes_per_s == pytest.approx(100)
    for _ in range(100):
        await send(10_000, 1.0)
    assert links.kv_bytes_per_s == pytest.approx(10_000)  # the slow minutes are forgotten
    await send(0, 5.0)
    assert links.kv_bytes_per_s == pytest.approx(10_000)
    assert links.host_kv_bytes_per_s == 1e9  # another link, of another speed
    for _ in range(200):
        await send(500, 1.0, to=HOST)
    assert (links.kv_bytes_per_s, links.host_kv_bytes_per_s) == pytest.approx((10_000, 500))
