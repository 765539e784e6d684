"""In the server: all structures. Compiles on request, in fair turns; keeps what is used; remembers what was refused."""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import structlog

from kunserve.errors import EngineError, KunServeError, OverloadedError
from kunserve.grammar.compiled import STOPPING, Compiled, Key
from kunserve.grammar.fair_queue import FairQueue
from kunserve.grammar.fork_server import ForkServer, Vocabulary
from kunserve.grammar.limits import CPU_S, RefusedError
from kunserve.grammar.process import KILLED, Death, DiedError, Process

log = structlog.get_logger()

MAX_PROCESSES, MAX_BYTES = (
    256,
    4 << 30,
)  # beyond these, processes that nobody waits for are ended, the longest unused first
MAX_IDLE = 32  # processes without followers: should the fork server die, all end at once, and that keeps the cores busy
IDLE_S = 60.0  # after so long without a request a process ends
MAX_REFUSED = 4096  # refused structures that are remembered
MAX_KILLED = 3  # processes that may be killed from outside while they compile one structure


@dataclass(slots=True, eq=False)
class _Job:
    """A structure to be compiled, once for all requests that wait for it."""

    key: Key
    owner: str
    compiled: asyncio.Future[Compiled]
    num_waiting: int = 0
    is_running: bool = False


@dataclass(slots=True)
class _Refused:
    """Why structures cannot be used, by a hash of each: the last `MAX_REFUSED` of them."""

    texts: OrderedDict[bytes, str] = field(default_factory=OrderedDict)

    def add(self, key: Key, text: str) -> None:
        self.texts[_hash(key)] = text
        if len(self.texts) > MAX_REFUSED:
            self.texts.popitem(last=False)

    def get(self, key: Key) -> str | None:
        return self.texts.get(_hash(key)) if self.texts else None


def _hash(key: Key) -> bytes:
    return blake2b("\0".join(key).encode(), digest_size=16).digest()


class Pool:
    """All structures of a server. Used on one event loop."""

    def __init__(self, vocabulary: Vocabulary, on_death: Callable[[str], None] = lambda reason: None) -> None:
        """Start nothing yet. `on_death` is told the reason when a process ends that should not have."""
        self.num_cores = len(os.sched_getaffinity(0))
        self._fork_server, self._on_death = ForkServer(vocabulary), on_death
        self._compiled: dict[Key, Compiled] = {}
        self._refused = _Refused()
        self._jobs: dict[Key, _Job] = {}  # that wait to be compiled, or are being compiled
        self._queue: FairQueue[_Job] = FairQueue(CPU_S)
        self._num_free = max(1, self.num_cores - 1)  # compiles that may begin now
        self._processes: dict[Process, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeping: asyncio.TimerHandle | None = None
        self.is_closed = False

    @property
    def fork_server_pid(self) -> int | None:
        """Return the process id of the parent of all structures' processes, while it runs."""
        return self._fork_server.pid

    async def open(self) -> None:
        """Start the fork server before there are streams; else the first `compile` does."""
        await self._fork_server.open()

    async def compile(self, key: Key, owner: str) -> Compiled:
        """Return a structure ready to be followed. Owners who have had less compile time go before `owner`.

        Raises RefusedError if it cannot be used, OverloadedError if it cannot be compiled now.
        """
        if self.is_closed:
            raise OverloadedError(STOPPING, retry_after_s=5)
        if (text := self._refused.get(key)) is not None:
            raise RefusedError(text)
        if (compiled := self._compiled.get(key)) is not None:
            return compiled
        if (job := self._jobs.get(key)) is None:
            job = self._jobs[key] = _Job(key, owner, asyncio.get_running_loop().create_future())
            self._queue.push(owner, job)
            self._run_jobs()
        job.num_waiting += 1
        try:
            await asyncio.wait([job.compiled])
        finally:
            job.num_waiting -= 1
            if job.num_waiting == 0 and not job.is_running and not job.compiled.done():  # all have left
                self._queue.remove(job.owner, job)
                del self._jobs[key]
        return job.compiled.result()

    async def start(self, key: Key) -> Process | Death | KunServeError:
        """See `Processes.start`: for matchers that have no process."""
        self._make_room()
        try:
            return self._add(await Process.start(self._fork_server, *key, self._died))
        except DiedError as error:
            return error.death
        except RefusedError as error:  # it was compiled before, so memory is short now
            return Death("refused", is_own=True, text=str(error))
        except OverloadedError:
            return KILLED
        except KunServeError as error:
            return error
        except Exception as error:  # whoever waits for the process has to be told
            log.exception("a structure's process cannot be started")
            return EngineError(f"the structure's process cannot be started: {error!r}")

    def refuse(self, key: Key, text: str) -> None:
        """See `Processes.refuse`."""
        self._refused.add(key, text)
        self._compiled.pop(key, None)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """See `Processes.spawn`."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """End all processes, and return when they have ended."""
        self.is_closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for process in list(self._processes):
            self._end(process)
        if self._sweeping is not None:
            self._sweeping.cancel()
        await asyncio.sleep(0)  # for the connections to close
        await self._fork_server.close()

    def _run_jobs(self) -> None:
        while self._num_free and (popped := self._queue.pop()) is not None:
            _, job = popped
            self._num_free -= 1
            job.is_running = True
            self.spawn(self._run(job))

    async def _run(self, job: _Job) -> None:
        cost_s = CPU_S
        try:
            process = await self._compile(job.key)
            cost_s = process.cpu_s
            self._compiled[job.key] = Compiled(self, job.key, process)
            job.compiled.set_result(self._compiled[job.key])
        except RefusedError as error:
            self.refuse(job.key, str(error))
            job.compiled.set_exception(error)
        except Exception as error:
            job.compiled.set_exception(error)
        finally:
            del self._jobs[job.key]
            if not job.compiled.cancel():  # the pool was not closed
                job.compiled.exception()  # perhaps nobody waits any more
                self._queue.done(job.owner, cost_s)
                self._num_free += 1
                self._run_jobs()

    async def _compile(self, key: Key) -> Process:
        self._make_room()
        for _ in range(MAX_KILLED):
            try:
                return self._add(await Process.start(self._fork_server, *key, self._died))
            except DiedError as error:
                if error.death.is_own:
                    raise RefusedError(error.death.text) from None
        raise OverloadedError("the processes that compile the structure are killed", retry_after_s=5)

    def _add(self, process: Process) -> Process:
        self._processes[process] = None
        if self._sweeping is None:
            self._sweeping = asyncio.get_running_loop().call_later(IDLE_S / 2, self._sweep)
        return process

    def _died(self, process: Process, death: Death) -> None:
        self._processes.pop(process, None)
        self._on_death(death.reason)
        requests = len(process.followers)
        log.warning("a structure's process has ended", reason=death.reason, pid=process.pid, requests=requests)

    def _end(self, process: Process) -> None:
        self._processes.pop(process, None)
        process.end()

    def _make_room(self) -> None:
        """End processes that nobody waits for until one more fits, and those beyond `MAX_IDLE` that nobody follows."""
        num_bytes = sum(process.memory_bytes for process in self._processes)
        num_idle = sum(not process.followers for process in self._processes)
        for process in sorted(self._processes, key=lambda process: process.used_s):
            is_full = len(self._processes) >= MAX_PROCESSES or num_bytes >= MAX_BYTES
            if not is_full and num_idle <= MAX_IDLE:
                return
            if not process.is_busy and (is_full or not process.followers):
                num_bytes -= process.memory_bytes
                num_idle -= not process.followers
                self._end(process)

    def _sweep(self) -> None:
        """End processes that were not used for a while, and forget structures that have no process."""
        loop = asyncio.get_running_loop()
        for process in list(self._processes):
            if not process.followers and loop.time() - process.used_s > IDLE_S:
                self._end(process)
        for key, compiled in list(self._compiled.items()):
            if not any(process.is_alive for process in compiled.processes):
                del self._compiled[key]
        self._sweeping = loop.call_later(IDLE_S / 2, self._sweep) if self._processes or self._compiled else None
