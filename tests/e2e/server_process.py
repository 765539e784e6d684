"""A server as users start it: its own process on a free port, ready when /health answers, ended by its pid."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import own_server
from own_server import POLL_S as POLL_S  # how often tests look as well
from own_server import START_S, STOP_S

# The same main(), with other bounds on what a client may do: tests need not wait for the real ones.
_WITH_SETTINGS = """
import functools, kunserve.server, kunserve.command.serving as serving
serving.ApiSettings = functools.partial(serving.ApiSettings, **{settings!r})
kunserve.server.main()
"""


class ServerProcess(own_server.ServerProcess):
    """One server, and what tests do to it; `api_settings` are put in the place of its own."""

    def __init__(self, *flags: str, api_settings: Mapping[str, float] | None = None, **settings: Any) -> None:
        if api_settings:
            settings["command"] = (sys.executable, "-c", _WITH_SETTINGS.format(settings=dict(api_settings)))
        super().__init__(*flags, **settings)

    def send_signal(self, number: signal.Signals) -> None:
        """Like `kill`."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float = STOP_S) -> int:
        """Exit code, once it ends by itself; RuntimeError, with the log, if it does not."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the server still runs after {timeout_s:.0f} s:\n{self.log}") from None

    @contextmanager
    def log_shown(self) -> Iterator[None]:
        """Print the end of what is logged meanwhile; pytest shows it if the test fails."""
        start = len(self.log)
        yield
        print(self.log[start:][-4000:])


@contextmanager
def running_server(*arguments: str, **settings: Any) -> Iterator[ServerProcess]:
    """A ready server until the block is left; `settings` are ServerProcess's."""
    with ServerProcess(*arguments, **settings) as server:
        yield server


def run_to_end(*arguments: str, **settings: Any) -> tuple[int, str]:
    """Exit code and output of a server that ends by itself."""
    server = ServerProcess(*arguments, **settings)
    try:
        return server.wait(START_S), server.log
    finally:
        server.close()
