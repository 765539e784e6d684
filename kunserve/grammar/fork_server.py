"""In the server: the fork server, a process that is started when the first structure comes, and after its death."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from kunserve.errors import EngineError, OverloadedError
from kunserve.grammar.wire import EXIT, EXITED, FAILED, FORK, KILL, ORDER, READY

log = structlog.get_logger()

START_S = 120.0  # to import the library and read the vocabulary
_PACKET = 2048
_NOT_NOW = "structures cannot be compiled now"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a model's tokens are."""

    tokenizer_json: Callable[[], str]
    size: int
    eos_token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended. `status` as of `os.waitpid`; None: with the fork server."""

    pid: int | None
    status: int | None


class ForkServer:
    """Forks structures' processes; on the event loop."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokenizer: int | None = None  # descriptor of its JSON in memory, made once
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready: asyncio.Future[None] | None = None
        self._starting = asyncio.Lock()
        self._ended = asyncio.Event()  # set while it does not run
        self._serials = itertools.count()
        self._exits: dict[int, asyncio.Future[Exit]] = {}  # of processes that are not known to have ended

    @property
    def pid(self) -> int | None:
        """Return the fork server's process id, while it runs."""
        return None if self._process is None else self._process.pid

    async def open(self) -> None:
        """Write down the vocabulary, which keeps the GIL for a tenth of a second: better before there are streams."""
        if self._tokenizer is None:
            self._tokenizer = await asyncio.to_thread(self._store_tokenizer)

    async def fork(self) -> tuple[int, socket.socket, asyncio.Future[Exit]]:
        """Fork a process; return its serial number, a connection to it, and a future of how it ended.

        Raises OverloadedError if that cannot be now, EngineError if it never can.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        serial = next(self._serials)
        with theirs:
            try:
                await self._order_fork(serial, theirs)
            except BaseException:
                ours.close()
                raise
        self._exits[serial] = asyncio.get_running_loop().create_future()
        return serial, ours, self._exits[serial]

    async def _order_fork(self, serial: int, connection: socket.socket) -> None:
        for _ in range(2):
            async with self._starting:
                if self._control is None:
                    await self._start()
            assert self._control is not None
            try:
                socket.send_fds(self._control, [ORDER.pack(FORK, serial)], [connection.fileno()])
                return
            except OSError:  # it has died, or does not read any more
                self.kill_all()
                await self._ended.wait()
        raise OverloadedError(_NOT_NOW, retry_after_s=1)

    def kill(self, serial: int) -> None:
        """End one process at once; no effect if it has ended."""
        if self._control is not None and serial in self._exits:
            try:
                self._control.send(ORDER.pack(KILL, serial))
            except OSError:
                self.kill_all()

    def kill_all(self) -> None:
        """End the fork server, and with it all processes, at once."""
        if self._process is not None:
            self._process.kill()

    async def close(self) -> None:
        """End everything, and return when the fork server has ended."""
        process = self._process
        self._lost()
        if process is not None:
            await asyncio.to_thread(process.wait)
        if self._tokenizer is not None:
            os.close(self._tokenizer)
            self._tokenizer = None

    async def _start(self) -> None:
        await self.open()
        assert self._tokenizer is not None
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = self._spawn(theirs.fileno(), self._tokenizer)
            except OSError as error:  # no memory, or too many processes
                control.close()
                raise OverloadedError(f"{_NOT_NOW}: {error}", retry_after_s=5) from None
        loop = asyncio.get_running_loop()
        control.setblocking(False)
        self._control, self._ready = control, loop.create_future()
        self._ended.clear()
        loop.add_reader(control.fileno(), self._read)
        try:
            async with asyncio.timeout(START_S):
                await asyncio.wait([self._ready])
        except TimeoutError:
            self.kill_all()
            raise OverloadedError(_NOT_NOW, retry_after_s=5) from None
        self._ready.result()

    def _spawn(self, control: int, tokenizer: int) -> subprocess.Popen[bytes]:
        """Start the process: that takes a millisecond of the event loop's, once."""
        numbers = (control, tokenizer, self._vocabulary.size, *self._vocabulary.eos_token_ids)
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        # One arena: each further one takes 64 MiB of the address space that a structure may have.
        environment = {**os.environ, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"}
        command = [sys.executable, "-P", "-m", "kunserve.grammar.fork_main", *map(str, numbers)]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(control, tokenizer), env=environment)

    def _store_tokenizer(self) -> int:
        descriptor = os.memfd_create("tokenizer")
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(self._vocabulary.tokenizer_json().encode())
        return descriptor

    def _read(self) -> None:
        assert self._control is not None and self._ready is not None
        while True:
            try:
                packet = self._control.recv(_PACKET)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                log.warning("the fork server of structures has ended")
                process = self._process
                self._lost()
                assert process is not None
                asyncio.get_running_loop().run_in_executor(None, process.wait)
                return
            if packet[:1] == EXIT:
                _, serial, pid, status = EXITED.unpack(packet)
                self._exits.pop(serial).set_result(Exit(pid, status))
            elif packet[:1] == READY:
                self._ready.set_result(None)
            elif packet[:1] == FAILED:
                text = f"the vocabulary cannot be used for structured output: {packet[1:].decode(errors='replace')}"
                self._ready.set_exception(EngineError(text))

    def _lost(self) -> None:
        """Note that the fork server has ended, and its processes with it."""
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            self._control.close()
        self._control = self._process = None
        self._ended.set()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(OverloadedError(_NOT_NOW, retry_after_s=1))
        exits, self._exits = self._exits, {}
        for exit_ in exits.values():
            exit_.set_result(Exit(None, None))
