"""A worker of `--api-workers`: HTTP and text of a server, in a process of their own. Its server starts and ends it."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from aiohttp import web

from kunserve.api.app import Known, create_worker_app
from kunserve.api.ask.chat_template import ChatTemplate
from kunserve.api.remote import messages as m
from kunserve.api.remote.guest import Guest
from kunserve.api.remote.link import read_frame
from kunserve.api.remote.proxy import Proxy
from kunserve.api.wire.backend import ApiSettings, ModelInfo
from kunserve.command.flags import HttpConfig
from kunserve.command.interpreter import set_up_interpreter
from kunserve.command.listen import take_connections
from kunserve.engine.serving_limits import ServingLimits
from kunserve.engine.text.tokenizer import tokenizer_of
from kunserve.log import set_up_logging
from kunserve.sizes import ceil_div


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker has to know; it reads the tokenizer itself."""

    model: ModelInfo
    settings: ApiSettings
    http: HttpConfig | None  # whose certificate is used, if there is one
    template: str | None  # source of the chat template
    folder: Path | None  # of the tokenizer; None: that of dummy weights, which needs
    vocab_size: int
    special_token_ids: tuple[int, ...]
    eos_token_ids: tuple[int, ...]  # that end an answer
    limits: ServingLimits
    log_level: str
    log_json: bool
    engine_socket: str = ""  # path of the Unix socket on which the engine's process answers operators


def of_worker(settings: ApiSettings, num_workers: int) -> ApiSettings:
    """Return the settings of one of so many workers: a share of the memory for bodies, or what the largest takes."""
    most, share = settings.max_body_memory_bytes, settings.max_body_memory_bytes // max(1, num_workers)
    least = min(most, ceil_div(settings.largest_body_bytes * 4, 3))
    return replace(settings, max_body_memory_bytes=max(share, least))


async def work(setup: Setup, name: str, connection: socket.socket, listening: socket.socket) -> None:
    """Serve until the engine's process says that it is over; end at once when that is gone."""
    stop = asyncio.Event()
    tokenizer = tokenizer_of(setup.folder, setup.vocab_size, setup.special_token_ids)
    template = None if setup.template is None else ChatTemplate(setup.template, tokenizer.special_tokens)
    guest = Guest(tokenizer, setup.eos_token_ids, setup.limits, stop.set, lambda: os._exit(1))
    proxy = Proxy(setup.engine_socket, setup.settings)
    app = create_worker_app(Known(tokenizer, template, setup.model, setup.settings), guest, proxy, name)
    runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    set_up_interpreter()
    try:
        await guest.open(connection)
        await take_connections(runner, listening, setup.http.ssl_context() if setup.http else None)
        guest.send(m.Ready())
        await stop.wait()
    finally:
        await runner.cleanup()


def main() -> None:
    """Run as `python -m kunserve.command.worker NAME LINK LISTENING`: the descriptors are inherited."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server says when it is over
        signal.signal(number, signal.SIG_IGN)
    connection, listening = (socket.socket(fileno=int(argument)) for argument in sys.argv[2:])
    setup: Setup = pickle.loads(read_frame(connection))  # of our own server, which started us
    set_up_logging(setup.log_level, setup.log_json)

    import uvloop

    uvloop.run(work(setup, sys.argv[1], connection, listening))


if __name__ == "__main__":
    main()
