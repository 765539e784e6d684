"""A server without a model, in a thread: it loads, serves and stops when a test says so, and shows what it is told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web
from api_fakes import FakeEngine, make_app
from own_server import free_port
from states import State, state

from kunserve.api.operate.loading import loading_handler
from kunserve.api.wire.context import OPERATED
from kunserve.command.listen import Listener
from kunserve.observe.metrics import Metrics
from kunserve.progress import LoadingProgress


class _Shown(FakeEngine):
    """An engine whose state a test sets."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = state()

    def state(self, num_transitions: int | None = None) -> dict[str, Any]:
        return self.shown


PATIENCE_S = 60.0  # a server that hangs fails one test, and not the run


class ScriptedServer:
    """Loads until `ready`, then serves until `stop`; `show` sets what the page sees from then on."""

    def __init__(self, port: int | None = None) -> None:
        self.port = port or free_port()
        self.progress = LoadingProgress()
        self._engine = _Shown()
        self._app = make_app(self._engine)
        self._is_listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="scripted server", daemon=True)
        self._thread.start()
        assert self._is_listening.wait(PATIENCE_S), "it does not listen"

    @property
    def url(self) -> str:
        """Return where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def metrics(self) -> Metrics:
        """Return what it counts."""
        return self._app[OPERATED].metrics

    def show(self, shown: State) -> None:
        """Let the engine's state be this one."""
        self._engine.shown = shown

    def ready(self) -> None:
        """The model is loaded."""
        self._loop.call_soon_threadsafe(self._loaded.set)

    def stop(self) -> None:
        """End, as a process that has died: nothing listens when this returns."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join(PATIENCE_S)
            assert not self._thread.is_alive(), "it does not end"

    async def _serve(self) -> None:
        self._loop, self._loaded, self._stopped = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        listener = Listener("127.0.0.1", self.port, None, None)
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            async with listener.answering_with(loading_handler(lambda: self.progress.newest)):
                self._is_listening.set()
                loaded = asyncio.ensure_future(self._loaded.wait())
                await asyncio.wait([loaded, stopped], return_when=asyncio.FIRST_COMPLETED)
                loaded.cancel()
            if not stopped.done():
                runner = web.AppRunner(self._app, handle_signals=False, shutdown_timeout=1.0)
                await runner.setup()
                await listener.serve(runner)
                await stopped
                await runner.cleanup()
        finally:
            listener.close()


@contextmanager
def scripted_server(port: int | None = None) -> Iterator[ScriptedServer]:
    """A server that loads; it is stopped when the block is left."""
    server = ScriptedServer(port)
    try:
        yield server
    finally:
        server.stop()
