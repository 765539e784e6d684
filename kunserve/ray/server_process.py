"""A replica's own server: `kunserve.server` as a child process on a Unix socket, started, asked and ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import sys
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from kunserve.command.flags import FRONT_KEY_VARIABLE

# The server ends with the replica, whatever ends that: it would keep the GPUs. The kernel sees to it (PDEATHSIG).
_CHILD = "import ctypes; ctypes.CDLL(None).prctl(1, 9); from kunserve.server import main; main()"
_POLL_S = 0.1
_KILL_S = 10.0  # it has nothing to do any more: its requests have ended, or go on elsewhere

Head = tuple[int, list[tuple[bytes, bytes]]]  # status and headers of an answer


def session_to(socket: str) -> aiohttp.ClientSession:
    """Return a session with the server that listens on a Unix socket."""
    connector, timeout = aiohttp.UnixConnector(socket, limit=0), aiohttp.ClientTimeout(total=None)
    return aiohttp.ClientSession(
        connector=connector, auto_decompress=False, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()
    )


async def answer_of(
    session: aiohttp.ClientSession, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes
) -> AsyncGenerator[Head | bytes, None]:
    """Yield status and headers of a server's answer, then the body as it comes. Raises aiohttp.ClientError if it dies.

    Leaving early closes the connection, and so ends the work for it.
    """
    asked = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
    url = f"http://kunserve{path}"
    async with session.request(method, url, headers=asked, data=body, allow_redirects=False) as response:
        yield response.status, [(name.lower(), value) for name, value in response.raw_headers]
        while data := await response.content.readany():
            yield data


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
        self._session = session_to(str(self.socket))
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

    def answer(
        self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes
    ) -> AsyncGenerator[Head | bytes, None]:
        """See `answer_of`."""
        assert self._session is not None
        return answer_of(self._session, method, path, headers, body)

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
