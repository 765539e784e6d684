"""A server as users start it: its own process on a free port, ready when /health answers, ended by its pid."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

START_S = 120.0
STOP_S = 30.0
POLL_S = 0.02

# The same main(), with other bounds on what a client may do: tests need not wait for the real ones.
_WITH_SETTINGS = """
import functools, kunserve.server, kunserve.serving as serving
serving.ApiSettings = functools.partial(serving.ApiSettings, **{settings!r})
kunserve.server.main()
"""


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """One `python -m kunserve.server`; `log` is everything it wrote to stdout and stderr."""

    def __init__(
        self,
        *arguments: str,
        port: int | None = None,
        api_settings: Mapping[str, float] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port = port or free_port()
        main = ["-c", _WITH_SETTINGS.format(settings=dict(api_settings))] if api_settings else ["-m", "kunserve.server"]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, *main, *arguments, "--port", str(self.port)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What it has written so far."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def wait_ready(self) -> None:
        """Return once /health answers 200. RuntimeError, with the log, if the process ends or takes too long."""
        deadline = time.monotonic() + START_S
        while not self._is_healthy():
            if self._process.poll() is not None:
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

    def send_signal(self, number: signal.Signals) -> None:
        """Like `kill`."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float = STOP_S) -> int:
        """Exit code, once it ends by itself; RuntimeError, with the log, if it does not."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the server still runs after {timeout_s:.0f} s:\n{self.log}") from None

    def close(self) -> None:
        """End it, kindly first."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    @contextmanager
    def log_shown(self) -> Iterator[None]:
        """Print the end of what is logged meanwhile; pytest shows it if the test fails."""
        start = len(self.log)
        yield
        print(self.log[start:][-4000:])


@contextmanager
def running_server(*arguments: str, **settings: Any) -> Iterator[ServerProcess]:
    """A ready server until the block is left; `settings` are ServerProcess's."""
    server = ServerProcess(*arguments, **settings)
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()


def run_to_end(*arguments: str, **settings: Any) -> tuple[int, str]:
    """Exit code and output of a server that ends by itself."""
    server = ServerProcess(*arguments, **settings)
    try:
        return server.wait(START_S), server.log
    finally:
        server.close()
