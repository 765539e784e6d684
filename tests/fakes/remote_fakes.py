"""A worker's application and the engine's, joined as `--api-workers` joins them, in one process."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from aiohttp.test_utils import TestClient
from api_fakes import BRACKETS, MODEL, ROUNDS_OF_A_STEP, Client, FakeEngine, PlainServer, Waited, make_app

from kunserve.api.app import Known, create_worker_app
from kunserve.api.remote.guest import Guest
from kunserve.api.remote.host import Host
from kunserve.api.remote.proxy import Proxy
from kunserve.api.wire.backend import ApiSettings, ModelInfo
from kunserve.api.wire.context import API, OPERATED
from kunserve.api.wire.grammars import Grammars
from kunserve.engine.request import Request
from kunserve.engine.serving_limits import ServingLimits
from kunserve.engine.text.live import Live
from kunserve.engine.text.stream import Sink
from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.errors import KunServeError
from kunserve.sampling import FinishReason, SampledToken

EOS = (299,)
TOKENIZER = Tokenizer.dummy(300, EOS)  # the first 256 are bytes
_NAMES = map(str, itertools.count(1))


Tokens = Callable[[Request], Sequence[SampledToken | BaseException | Waited]]


class TokenEngine(FakeEngine):
    """Gives each request the tokens that `tokens` says, and text of them to who wants it, as the real one does."""

    def __init__(self, tokens: Tokens) -> None:
        super().__init__()
        self.tokens = tokens
        self.reasons: list[FinishReason] = []  # why requests were aborted

    async def _answer(self, request: Request, sink: Sink) -> None:
        live, tokens = Live.of(request, sink, TOKENIZER), self.tokens(request)
        for number, token in enumerate(tokens, 1):
            for _ in range(ROUNDS_OF_A_STEP):
                await asyncio.sleep(0)
            if isinstance(token, KunServeError):
                sink.fail(token)
                return
            if not isinstance(token, SampledToken):
                await token.wait()  # type: ignore[union-attr]
                continue
            output = live.take(token, EOS)
            if output.finish_reason is None and number == len(tokens):
                output = output._replace(finish_reason=FinishReason.LENGTH)
            sink.put(output)
            if output.finish_reason is not None:
                return

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        self.reasons.append(reason)
        super().abort(request_id, reason)


@dataclass
class Worker:
    """A worker: its clients' way in, and both ends of its link."""

    client: Client
    guest: Guest
    host: Host


@dataclass
class Joined:
    """An engine's application, and workers before it."""

    app: web.Application
    path: str  # of the socket on which the engine's application answers
    stack: AsyncExitStack
    body_bytes: int = 0

    def _hold(self, num_bytes: int) -> None:
        self.body_bytes = num_bytes

    async def worker(self) -> Worker:
        """One worker more."""
        ours, theirs = socket.socketpair()
        host = Host(self.app[API], self.app[OPERATED].admission, self._hold, lambda: None)
        stop, lost = asyncio.Event(), asyncio.Event()
        api = self.app[API]
        limits = ServingLimits(api.model.max_model_len, 99)
        guest = Guest(TOKENIZER, EOS, limits, stop.set, lost.set)
        await host.open(ours)
        await guest.open(theirs)
        known = Known(TOKENIZER, BRACKETS, api.model, api.settings)
        app = create_worker_app(known, guest, Proxy(self.path, 30.0), next(_NAMES))
        client = await self.stack.enter_async_context(TestClient(PlainServer(app)))
        self.stack.callback(host.link.close)
        return Worker(client, guest, host)


@asynccontextmanager
async def joined(
    engine: FakeEngine,
    folder: Path,
    settings: ApiSettings | None = None,
    grammars: Grammars | None = None,
    model: ModelInfo = MODEL,
) -> AsyncIterator[Joined]:
    """The application on `engine`, which workers may be joined to; its socket is in `folder`."""
    app = make_app(engine, settings, model, TOKENIZER, grammars=grammars)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(runner.cleanup)
        path = str(folder / "engine")
        await web.UnixSite(runner, path).start()
        yield Joined(app, path, stack)
