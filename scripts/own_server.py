"""A KunServe server of one's own, for scripts that measure one."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

START_TIMEOUT_S = 120.0
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Server:
    """Where it listens, and its process."""

    url: str
    pid: int

    async def state(self) -> dict[str, Any]:
        """Its `/kunserve/state`."""
        return await get_json(f"{self.url}/kunserve/state")


@asynccontextmanager
async def running_server(*flags: str, log: Path | None = None) -> AsyncIterator[Server]:
    """Start `python -m kunserve.server` with these flags on a free port; it is stopped as by Ctrl-C at the end.

    Its output goes to `log`, or to nowhere. SystemExit, with the end of it, if it does not start.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.NamedTemporaryFile(suffix=".log") as unnamed:
        path = log or Path(unnamed.name)
        with path.open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "kunserve.server", *flags, "--port", str(port)), stdout=out, stderr=out
            )
        try:
            await _until_ready(process, url, path)
            yield Server(url, process.pid)
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGINT)
            await process.wait()


async def _until_ready(process: asyncio.subprocess.Process, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.returncode is None:
        try:
            await get_json(f"{url}/health")
            return
        except aiohttp.ClientError:
            await asyncio.sleep(POLL_S)
    raise SystemExit(f"the server did not start:\n{log.read_text()[-2000:]}")


async def get_json(url: str) -> dict[str, Any]:
    """The JSON object at `url`."""
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        response.raise_for_status()
        answer: dict[str, Any] = await response.json()
        return answer


async def post_json(url: str, body: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The answer to a POST with a bearer token; SystemExit if it is refused."""
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession() as session, session.post(url, json=body, headers=headers) as response:
        answer: dict[str, Any] = await response.json()
        if response.status != 200:
            raise SystemExit(f"{url}: {response.status} {answer}")
        return answer


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
