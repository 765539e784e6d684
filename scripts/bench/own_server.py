"""A KunServe server of one's own, as users start one: for scripts that measure it, and for tests."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import aiohttp

START_S = 120.0
STOP_S = 30.0
POLL_S = 0.02


class ServerProcess:
    """Runs one server on a port of the loopback interface, until `close`; a `with` block begins when it is ready."""

    def __init__(
        self,
        *flags: str,
        port: int | None = None,
        command: Sequence[str] = (sys.executable, "-m", "kunserve.server"),
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        log: Path | None = None,
    ) -> None:
        """Start `command` with these flags, in `folder` or this process's, with `environment` over this process's."""
        self.port = port or free_port()
        # Closed with the process.
        self._log = log.open("w+b") if log else tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [*command, *flags, "--port", str(self.port)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )

    def __enter__(self) -> Self:
        """Wait until it is ready; RuntimeError, with the log, if it does not get so far."""
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.close()

    @property
    def is_running(self) -> bool:
        """Return whether the process has not ended."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    @property
    def url(self) -> str:
        """Return where it listens, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """Return what it has written to stdout and stderr so far."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def wait_ready(self) -> None:
        """Return once /health answers 200; raise RuntimeError, with the log, if it ends or takes too long."""
        deadline = time.monotonic() + START_S
        while not self._is_healthy():
            if not self.is_running:
                raise RuntimeError(f"the server ended with {self._process.returncode}:\n{self.log}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server is not ready after {START_S:.0f} s:\n{self.log}")
            time.sleep(POLL_S)

    def _is_healthy(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return connection.recv(64).startswith(b"HTTP/1.1 200 ")
        except OSError:
            return False

    def close(self) -> None:
        """End the process, kindly first."""
        if self.is_running:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()


@dataclass(frozen=True, slots=True)
class Server:
    """Where a ready server listens, and its process id."""

    url: str
    pid: int

    async def state(self) -> dict[str, Any]:
        """Return its `/kunserve/state`."""
        return await get_json(f"{self.url}/kunserve/state")


@asynccontextmanager
async def running_server(*flags: str, log: Path | None = None) -> AsyncIterator[Server]:
    """Run a server with these flags until the block is left; SystemExit, with its log, if it does not start.

    What it writes goes to `log`, or to nowhere.
    """
    process = ServerProcess(*flags, log=log)
    try:
        try:
            await asyncio.to_thread(process.wait_ready)
        except RuntimeError as error:
            raise SystemExit(str(error)) from None
        yield Server(process.url, process.pid)
    finally:
        await asyncio.to_thread(process.close)


async def get_json(url: str) -> dict[str, Any]:
    """Return the JSON object at `url`."""
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        response.raise_for_status()
        answer: dict[str, Any] = await response.json()
        return answer


async def post_json(url: str, body: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the answer to a POST with a bearer token; SystemExit if it is refused."""
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession() as session, session.post(url, json=body, headers=headers) as response:
        answer: dict[str, Any] = await response.json()
        if response.status != 200:
            raise SystemExit(f"{url}: {response.status} {answer}")
        return answer


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
