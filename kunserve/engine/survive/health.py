"""Health: which devices do their work. One that fails step after step, or does not answer, is suspected, then lost.

A suspected device gets no new requests while there are others, and no plan counts on it. Nothing is taken from it: it
may only be slow. A lost one is never heard again (gpu/watched.py); its group dissolves (regroup/membership.py).
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Iterable, Sequence

import structlog

from kunserve.engine.batch import work_of
from kunserve.engine.fleet import Fleet
from kunserve.engine.signals import Signals, loop_time
from kunserve.engine.step.executor import Executor
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.watched import WatchedDevice
from kunserve.observe.metrics import Metrics
from kunserve.planner.microbatch import Lookahead

log = structlog.get_logger()

TICK_S = 0.1
# A device is suspected when it has ended nothing for the longer of two times: `MULTIPLE` times what the cost model
# predicts for its step, and the floor, by which a busy host may be late.
MULTIPLE, STEP_FLOOR_S, COPY_FLOOR_S = 10.0, 1.0, 10.0
LOAD_SLACK = 10.0  # weights may come from a slow disk: they have so many times as long as copies
PROBES = 2  # trivial work that a device has to fail at, one after the other, to be lost


class DeviceState(enum.StrEnum):
    """What a device is good for."""

    OK = "ok"
    SUSPECT = "suspect"
    LOST = "lost"
    REMOVED = "removed"


class Health:
    """Watches devices. Used on the event loop. Implements `gpu.watched.Watcher`.

    `deadline_s`: a device that ends nothing of its work for so long is lost; None: it never is for that.
    """

    def __init__(
        self,
        fleet: Fleet,
        memories: Sequence[DeviceMemory],
        executor: Executor,
        signals: Signals,
        metrics: Metrics,
        lookahead: Lookahead | None,
        deadline_s: float | None,
    ) -> None:
        self._fleet, self._memories, self._executor = fleet, memories, executor
        self._signals, self._metrics, self._lookahead, self._deadline_s = signals, metrics, lookahead, deadline_s
        self.on_lost: Callable[[int], None] = lambda device: None
        self._overdue = set[int]()
        self._failing = set[int]()
        self._leaving, self._removed = set[int](), set[int]()
        self._ticking: asyncio.TimerHandle | None = None
        self._ticked_s = 0.0
        self._tasks = set[asyncio.Task[None]]()
        for memory in memories:
            memory.device.watcher = self

    @property
    def devices(self) -> list[WatchedDevice]:
        """Return all devices; one that was lost or taken out until there is another in its place."""
        return [memory.device for memory in self._memories]

    # --- what is known ------------------------------------------------------------------------------------------

    def state(self, device: int) -> DeviceState:
        """Return what a device is good for now."""
        if device in self._removed:
            return DeviceState.REMOVED
        if self.devices[device].is_lost:
            return DeviceState.LOST
        is_suspect = device in self._overdue or device in self._failing or device in self._leaving
        return DeviceState.SUSPECT if is_suspect else DeviceState.OK

    def degraded(self) -> str | None:
        """Return which devices do not do their work, in words; None if all do, but for those that were taken out."""
        states = {i: self.state(i) for i in range(len(self.devices))}
        shown = (DeviceState.SUSPECT, DeviceState.LOST)
        bad = {i: state for i, state in states.items() if state in shown and i not in self._leaving}
        return ", ".join(f"{self.devices[i].name} is {state}" for i, state in bad.items()) or None

    @property
    def is_hanging(self) -> bool:
        """Return whether somebody waits for a device."""
        return any(device.has_work for device in self.devices)

    def take_fault(self, devices: Iterable[int]) -> bool:
        """Return whether work was the end of one of these that had it. Only once: what came behind it did nothing."""
        faulted = [self.devices[device] for device in devices if self.devices[device].has_faulted]
        for device in faulted:
            device.has_faulted = False
        return bool(faulted)

    # --- who fails ----------------------------------------------------------------------------------------------

    def fails(self, devices: Sequence[int]) -> bool:
        """Suspect devices on which steps failed one after the other; those that fail at the simplest are lost.

        Returns whether any of them was not suspected for that yet: somebody has to `trust` it at last.
        """
        new = [i for i in devices if not (self.devices[i].is_lost or i in self._failing)]
        for device in new:
            self._failing.add(device)
            self._mark(device)
            log.warning("steps on a device fail one after the other", device=self.devices[device].name)
            task = asyncio.create_task(self._probe(device), name="probe")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return bool(new)

    def trust(self, devices: Sequence[int]) -> None:
        """Give devices requests again."""
        for device in devices:
            self._failing.discard(device)
            self._mark(device)

    async def _probe(self, device: int) -> None:
        """Find out whether it is the device that fails, or what it was given."""
        for probes_left in reversed(range(PROBES)):
            try:
                await self._executor.probe(self._fleet.group_on(device), device)
                return
            except Exception as error:
                if not probes_left:
                    self.lose(device, f"it fails at the simplest work: {error!r}")

    # --- who hangs ----------------------------------------------------------------------------------------------

    def has_work(self) -> None:
        """See `Watcher.has_work`."""
        if self._ticking is None:
            self._ticked_s = loop_time()
            self._ticking = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        now = loop_time()
        # A host that stood still says nothing of its devices.
        elapsed_s, self._ticked_s, self._ticking = min(now - self._ticked_s, 2 * TICK_S), now, None
        for index, device in enumerate(self.devices):
            if device.is_lost:
                continue
            silence = device.tick(elapsed_s)
            step_s, copy_s = silence.compute_s, max(silence.copy_s, silence.load_s / LOAD_SLACK)
            silent_s, expected_s = max(step_s, copy_s), 0.0
            if step_s > STEP_FLOOR_S:
                expected_s = MULTIPLE * self._predicted_s(index)
            if self._deadline_s is not None and silent_s > max(self._deadline_s, expected_s):
                self.lose(index, f"it has not answered for {max(silence):.1f} s")
            elif (step_s > max(STEP_FLOOR_S, expected_s) or copy_s > COPY_FLOOR_S) != (index in self._overdue):
                self._overdue ^= {index}
                log.warning("a device is overdue" if index in self._overdue else "a device answers", device=device.name)
                self._mark(index)
        if self.is_hanging:
            self._ticking = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _predicted_s(self, device: int) -> float:
        """Return how long the longest step of a device that is under way takes, by the cost model; 0 without one."""
        group = self._fleet.group_on(device)
        if group is None or self._lookahead is None:
            return 0.0
        return max((self._lookahead.time(work_of(batch)) for batch in group.in_flight), default=0.0)

    # --- who is gone --------------------------------------------------------------------------------------------

    def lose(self, device: int, reason: str) -> None:
        """Declare a device lost. Idempotent."""
        self.devices[device].lose(reason)

    async def give_up_hanging(self, after_s: float) -> None:
        """Declare all devices lost that somebody waits for, from then on, until cancelled: the server stops."""
        await asyncio.sleep(after_s)
        while True:
            for device in self.devices:
                if device.has_work:
                    device.lose("it stops")
            await asyncio.sleep(TICK_S)

    def lost(self, device: WatchedDevice, reason: str) -> None:
        """See `Watcher.lost`."""
        devices = self.devices
        if device not in devices:
            return  # another one is in its place by now
        index = devices.index(device)
        if index in self._removed:
            return
        log.error("a device is lost", device=device.name, because=reason)
        self._metrics.device_lost()
        self._mark(index)
        self.on_lost(index)

    def retire(self, device: int) -> None:
        """Give a device no new requests: an operator takes it out. `stay` takes that back."""
        self._leaving.add(device)
        self._mark(device)

    def is_leaving(self, device: int) -> bool:
        """Return whether an operator is about to take a device out."""
        return device in self._leaving

    def stay(self, device: int) -> None:
        """Note that a device is not taken out, or not any more to be."""
        self._leaving.discard(device)
        self._mark(device)

    def remove(self, device: int) -> None:
        """Note that an operator has taken a device out, in which nothing is any more."""
        self._leaving.discard(device)
        self._removed.add(device)
        self.lose(device, "it was taken out")
        self._mark(device)

    def welcome(self, device: int) -> None:
        """Note that there is a device again: another one."""
        self.devices[device].watcher = self
        for devices in (self._leaving, self._removed, self._failing, self._overdue):
            devices.discard(device)
        self._mark(device)

    def _mark(self, device: int) -> None:
        state = self.state(device)
        self._fleet.mark(device, is_suspect=state is not DeviceState.OK, is_lost=self.devices[device].is_lost)
        self._signals.wake()
        # Whoever waits for it may give up; not now, as this may be called in the middle of a step's end.
        asyncio.get_running_loop().call_soon(self._signals.progress)
