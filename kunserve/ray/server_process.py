"""A replica's own server: `kunserve.server` as a child process on a Unix socket, started, asked and ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from kunserve.command.flags import FRONT_KEY_VARIABLE

# The server ends with the replica, whatever ends that: it would keep the GPUs. The kernel sees to it (PDEATHSIG).
_CHILD = "import ctypes; ctypes.CDLL(None).prctl(1, 9); from kunserve.server import main; main()"
_POLL_S = 0.1
_KILL_S = 10.0  # it has nothing to do any more: its requests have ended, or go on elsewhere


class ServerProcess:
    """One server. Made by `start`."""

    def __init__(self, flags: Sequence[str], front_key: str) -> None:
        """Set up a server with these flags; nothing runs yet."""
        self._flags, self._front_key = list(flags), front_key
        self._folder = tempfile.TemporaryDirectory(prefix="kunserve-")
        self.socket = Path(self._folder.name) / "http"
        self._process: asyncio.subprocess.Process | None = None
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Start it, and return when it is ready. RuntimeError if it ends before."""
        command = [sys.executable, "-c", _CHILD, *self._flags, "--uds", str(self.socket)]
        environment = {**os.environ, FRONT_KEY_VARIABLE: self._front_key}
        self._process = await asyncio.create_subprocess_exec(*command, env=environment)
        self._session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.socket)))
        while not await self._is_ready():
            if self._process.returncode is not None:
                raise RuntimeError(f"kunserve {shlex.join(self._flags)} has ended; the log above says why")
            await asyncio.sleep(_POLL_S)

    async def _is_ready(self) -> bool:
        try:
            return await self.status_of("/ready") == 200
        except aiohttp.ClientError:
            return False

    @property
    def pid(self) -> int:
        """Return the number of its process."""
        assert self._process is not None
        return self._process.pid

    async def status_of(self, path: str) -> int:
        """Return the status of a GET. Raises aiohttp.ClientError if it does not answer."""
        assert self._session is not None
        async with self._session.get(f"http://kunserve{path}") as response:
            return response.status

    async def gauges(self, names: Mapping[str, str]) -> dict[str, float]:
        """Return gauges of /metrics under other names; `names`: ours by the server's."""
        assert self._session is not None
        async with self._session.get("http://kunserve/metrics") as response:
            families = text_string_to_metric_families(await response.text())
            return {names[family.name]: family.samples[0].value for family in families if family.name in names}

    async def stop(self) -> None:
        """End it, and what is still asked of it."""
        if self._session is not None:
            await self._session.close()
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _KILL_S)
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
        self._folder.cleanup()
