"""The workers of `--api-workers`, as their server sees them: started, started again when they die, ended."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import structlog
from aiohttp import web

from kunserve.api.remote.host import Host
from kunserve.api.remote.link import framed
from kunserve.api.wire.context import API, OPERATED
from kunserve.errors import ConfigError

if TYPE_CHECKING:
    from kunserve.command.worker import Setup

log = structlog.get_logger()

START_S = 120.0  # until all take connections
STOP_S = 5.0  # for a worker to end what its clients are sent
AGAIN_S = 1.0  # a worker that lived for less waits for so long before it is started again


class Workers:
    """Processes that take connections from one socket, on the engine of one application."""

    def __init__(self, setup: Setup, runner: web.AppRunner, listening: int, num_workers: int) -> None:
        """Start nothing yet. `runner`: of all routes in this process. `listening`: descriptor of the socket."""
        self._message = b""  # what each is told first
        self._setup, self._runner, self._app, self._listening = setup, runner, runner.app, listening
        self._num_workers, self._names = num_workers, itertools.count(1)
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # nobody else may look into it
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._hosts: dict[int, Host] = {}
        self._ready = set[int]()  # those that have taken connections once
        self._changed = asyncio.Event()  # one is ready, or has ended
        self._has_failed = False
        self._stopping = asyncio.Event()
        self._body_bytes = defaultdict[int, int](int)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pids(self) -> list[int]:
        """Return the process ids of those that live."""
        return [process.pid for process in self._processes.values()]

    async def open(self) -> None:
        """Start all, and return when all take connections. ConfigError if one does not; `close` ends the others."""
        self._folder = tempfile.TemporaryDirectory(prefix="kunserve-")
        path = os.path.join(self._folder.name, "engine")
        await web.UnixSite(self._runner, path).start()
        self._message = framed(pickle.dumps(replace(self._setup, engine_socket=path)))
        self._tasks = [asyncio.create_task(self._keep(i), name=f"api worker {i}") for i in range(self._num_workers)]
        try:
            async with asyncio.timeout(START_S):
                while len(self._ready) < self._num_workers and not self._has_failed:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            self._has_failed = True
        if self._has_failed:
            raise ConfigError("an API worker does not start; the log says why")

    async def close(self) -> None:
        """Let all end, with what their clients are still sent. Nothing happens if there are none."""
        self._stopping.set()
        if not self._tasks:
            return
        await self._runner.shutdown()  # ends what viewers are sent
        for host in self._hosts.values():
            host.stop()
        _, late = await asyncio.wait(self._tasks, timeout=STOP_S)
        for process in self._processes.values():  # of those who are late
            process.kill()
        if late:
            await asyncio.wait(late, timeout=STOP_S)
        if self._folder is not None:
            self._folder.cleanup()

    async def _keep(self, index: int) -> None:
        """Run one worker, and another one when it dies, until all are to end."""
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            started_s, (connection, process) = loop.time(), self._spawn()
            host = Host(
                self._app[API],
                self._app[OPERATED].admission,
                partial(self._hold, index),
                partial(self._is_ready, index),
            )
            self._processes[index], self._hosts[index] = process, host
            try:
                connection.setblocking(False)
                await loop.sock_sendall(connection, self._message)
                await host.open(connection)
                await host.lost.wait()
            except OSError:  # it has ended already
                connection.close()
            process.kill()
            status = await asyncio.to_thread(process.wait)
            del self._processes[index], self._hosts[index]
            if self._stopping.is_set():
                return
            self._has_failed |= index not in self._ready
            self._changed.set()
            text = "an API worker has ended, and its requests with it; another one is started"
            log.warning(text, pid=process.pid, status=status, requests=host.num_lost)
            await asyncio.sleep(max(0.0, AGAIN_S - (loop.time() - started_s)))

    def _is_ready(self, index: int) -> None:
        self._ready.add(index)
        self._changed.set()

    def _spawn(self) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with theirs:
            numbers = (theirs.fileno(), self._listening)
            arguments = map(str, (next(self._names), *numbers))
            command = [sys.executable, "-P", "-m", "kunserve.command.worker", *arguments]
            environment = {**os.environ, "PYTHONPATH": path}
            # In a group of its own: Ctrl-C in a terminal is for the server, which says when it is over.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=numbers, env=environment, process_group=0
            )
        return ours, process

    def _hold(self, index: int, num_bytes: int) -> None:
        """Show what all workers together hold of bodies."""
        self._body_bytes[index] = num_bytes
        self._app[API].metrics.body_bytes(sum(self._body_bytes.values()))
