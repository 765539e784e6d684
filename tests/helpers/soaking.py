"""A soak: random load, random faults, random operators, and every answer is what it has to be."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hooks import step_call
from transition_harness import TINY, Answer, Checked, checked_engine, make_requests, patient_with_sound_devices

from kunserve.engine.request import Request
from kunserve.errors import DeviceError, KunServeError

NUM_BLOCKS = 256
SETTINGS: dict[str, Any] = {"is_pinned": False, "restore_hold_s": 0.3, "device_timeout_s": 1.0}
# Devices that hold the weights, which take 16 chunks, only two by two.
PAIRS: dict[str, Any] = {"num_blocks_override": None, "device_memory_bytes": 15 * TINY["chunk_bytes"]}
HANG_S = 4.0  # longer than a device may be silent
ROUND_S = 10.0  # then everything ends, and nothing may be left of it


class Soak:
    """One server under random load until a time is over. `counts`: what happened.

    `num_needed`: devices that hold the weights together; so many are always left.
    """

    def __init__(
        self, checked: Checked, requests: Sequence[Request], expected: Sequence[Answer], seed: int, num_needed: int = 1
    ) -> None:
        self._checked, self._engine, self._num_needed = checked, checked.engine, num_needed
        self._known = list(zip(requests, expected, strict=True))
        self._rng = random.Random(seed)
        self._hanging: list[threading.Event] = []
        self.doomed: list[Any] = []  # devices that hang with their next step, or do already
        self.counts = Counter[str]()
        self.rss_bytes: list[int] = []  # after each round

    async def run(self, seconds: float) -> None:
        """Load and disturb the server, round after round; raises if anything is not as it has to be."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            disturbing = asyncio.ensure_future(self._disturb())
            try:
                await self._load(min(end, time.monotonic() + ROUND_S))
            finally:
                disturbing.cancel()
                with suppress(asyncio.CancelledError):
                    await disturbing
            await self._mend()
            await self._checked.rebuilt()
            self._checked.assert_idle()
            self.counts["rounds"] += 1
            self.rss_bytes.append(_rss_bytes())

    async def _load(self, end: float) -> None:
        asked = set[asyncio.Task[None]]()
        while time.monotonic() < end:
            for _ in range(self._rng.choice((0, 1, 2, 12))):
                asked.add(asyncio.ensure_future(self._ask()))
            await asyncio.sleep(self._rng.random() * 0.4)
            for task in [task for task in asked if task.done()]:
                asked.remove(task)
                task.result()
        await asyncio.gather(*asked)

    async def _ask(self) -> None:
        """One request; every fifth client leaves. What it got is the beginning of its answer, or all of it."""
        known, expected = self._rng.choice(self._known)
        number = self.counts["requests"]
        self.counts["requests"] += 1
        request, answer = Request(f"s{number}", list(known.prompt_token_ids), known.params), Answer()
        leaves_after = self._rng.randrange(1, 6) if self._rng.random() < 0.2 else None
        async for output in self._engine.submit(request):
            answer.add(output)
            if leaves_after is not None and len(answer.token_ids) >= leaves_after and answer.finish is None:
                self._engine.abort(request.request_id)
                self.counts["left"] += 1
                assert answer.token_ids == expected.token_ids[: len(answer.token_ids)], request.request_id
                return
        answer.assert_same(expected)

    # --- what goes wrong ----------------------------------------------------------------------------------------

    async def _disturb(self) -> None:
        while True:
            await asyncio.sleep(self._rng.random() * 0.4)
            name, action = self._rng.choice(ACTIONS)
            with suppress(KunServeError, OSError, RuntimeError):  # not now, or what was injected came out
                await action(self)
                self.counts[name] += 1

    def _sound(self) -> list[int]:
        """Devices that do their work, and will."""
        states = [device["state"] for device in self._engine.state()["devices"]]
        inner = [memory.device.inner for memory in self._engine.memories]
        return [i for i, state in enumerate(states) if state == "ok" and inner[i] not in self.doomed]

    def _victim(self) -> int:
        sound = self._sound()
        if len(sound) <= self._num_needed:
            raise DeviceError("some have to be left")
        return self._rng.choice(sound)

    def _next_run(self, device: int, faulty: Callable[[Callable[[], Any]], Any]) -> None:
        """Let the next step of a device be this."""
        inner: Any = self._engine.memories[device].device.inner
        name = step_call(inner)
        run = getattr(inner, name)

        async def once(work: Callable[[], Any], *after: Any) -> Any:
            setattr(inner, name, run)
            return await run(lambda: faulty(work), *after)

        setattr(inner, name, once)

    async def fail(self) -> None:
        """One step raises."""

        def faulty(work: Callable[[], Any]) -> Any:
            raise RuntimeError("injected")

        sound = self._sound()
        if not sound:
            raise DeviceError("all of them fail as it is")
        self._next_run(self._rng.choice(sound), faulty)

    async def hang(self) -> None:
        """One step does not end for a while."""
        ends = threading.Event()
        self._hanging.append(ends)

        def faulty(work: Callable[[], Any]) -> Any:
            ends.wait(HANG_S)
            return work()

        victim = self._victim()
        self.doomed.append(self._engine.memories[victim].device.inner)
        self._next_run(victim, faulty)

    async def lose(self) -> None:
        """A device is gone from one moment to the next."""
        self._engine.device_health.lose(self._victim(), "the soak")

    async def remove(self) -> None:
        """An operator takes a device out."""
        await self._engine.remove_device(self._victim(), drain_s=self._rng.choice((0.0, 0.2)))

    async def add(self) -> None:
        """A device that is gone comes back."""
        states = [device["state"] for device in self._engine.state()["devices"]]
        for i, state in enumerate(states):
            if state in ("lost", "removed"):
                await self._engine.add_device(i)
                return
        raise DeviceError("all are there")

    async def drop(self) -> None:
        """An operator drops."""
        await self._engine.drop(is_forced=True)

    async def restore(self) -> None:
        """An operator restores."""
        await self._engine.restore()

    async def _mend(self) -> None:
        """End what hangs, and bring all devices back."""
        for ends in self._hanging:
            ends.set()
        self._hanging.clear()
        self.doomed.clear()
        while len(self._sound()) < len(self._engine.memories):
            await self._checked.rebuilt()
            with suppress(KunServeError):
                await self.add()
            await asyncio.sleep(0.01)


ACTIONS = [
    (action.__name__, action)
    for action in (Soak.fail, Soak.hang, Soak.lose, Soak.remove, Soak.add, Soak.add, Soak.drop, Soak.restore)
]


async def soak(folder: Path, seconds: float, seed: int, devices: str = "cpu:3", *, are_pairs: bool = False) -> Soak:
    """Soak a server of a tiny model for so long; returns what happened. AssertionError if anything was wrong.

    `are_pairs`: no device holds the weights alone.
    """
    requests = make_requests(40, seed=seed, longest_prompt=60, most_tokens=40)
    async with checked_engine(folder, "cpu:1", 1200) as checked:
        expected = await checked.answer_all(requests)
    async with checked_engine(folder, devices, NUM_BLOCKS, **SETTINGS | (PAIRS if are_pairs else {})) as checked:
        found = Soak(checked, requests, expected, seed, num_needed=1 + are_pairs)
        with patient_with_sound_devices(lambda device: device in found.doomed):
            await found.run(seconds)
        return found


def _rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages << 12
