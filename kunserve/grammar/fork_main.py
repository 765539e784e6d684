"""`python -m kunserve.grammar.fork_main`: reads the vocabulary once, then forks a process for each structure.

Nothing of a client's is looked at here. Arguments: descriptors of a socket to the server and of the tokenizer's JSON,
the vocabulary's size, and the tokens that end an answer. It ends when the server has closed the socket, which the
kernel does when the server dies, and its processes end with it. It does not heed the terminal's Ctrl-C, or what ends
a whole service: the server may still have streams to finish.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import select
import signal
import socket
import sys
from typing import Any, NoReturn

from kunserve.grammar import child
from kunserve.grammar.vocabulary import read_vocabulary
from kunserve.grammar.wire import EXIT, EXITED, FAILED, FORK, ORDER, READY

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Below the server, whose event loop would otherwise wait its turn behind all of them: when they compile, and when they
# end together, which takes the kernel some milliseconds for each.
_NICE = 10


def main() -> None:
    """Run until the server is gone."""
    for signum in _IGNORED:
        signal.signal(signum, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    vocab_size, eos_token_ids = int(sys.argv[3]), [int(argument) for argument in sys.argv[4:]]
    try:
        tokenizer = _read_tokenizer(int(sys.argv[2]), vocab_size, eos_token_ids)
    except Exception as error:
        control.send(FAILED + str(error).encode(errors="replace")[:1000])
        return
    os.nice(_NICE)
    gc.collect()
    gc.freeze()  # collections in the processes would copy all of its pages
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server is gone
        control.send(READY)
        ForkServer(control, tokenizer, vocab_size).run()


def _read_tokenizer(descriptor: int, vocab_size: int, eos_token_ids: list[int]) -> Any:
    with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as text:
        return read_vocabulary(text[:].decode(), vocab_size, eos_token_ids)


class ForkServer:
    """Forks, kills, and reports deaths. Single-threaded: a fork copies only the thread that asks for it."""

    def __init__(self, control: socket.socket, tokenizer: Any, vocab_size: int) -> None:
        self._control, self._tokenizer, self._vocab_size = control, tokenizer, vocab_size
        self._pid = os.getpid()
        self._serials: dict[int, int] = {}  # of living processes, by process id
        self._woken, self._wakes = os.pipe()
        for descriptor in (self._woken, self._wakes):
            os.set_blocking(descriptor, False)

    def run(self) -> None:
        """Serve until the socket is closed."""
        signal.set_wakeup_fd(self._wakes)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            ready, _, _ = select.select([self._control.fileno(), self._woken], [], [])
            if self._woken in ready:
                os.read(self._woken, 4096)
                self._report_exits()
            if self._control.fileno() in ready and not self._obey():
                return

    def _obey(self) -> bool:
        """Carry out the next order; return False once there will be none."""
        order, descriptors, _, _ = socket.recv_fds(self._control, ORDER.size, 1)
        if len(order) < ORDER.size:
            return False
        command, serial = ORDER.unpack(order)
        if command == FORK:
            with socket.socket(fileno=descriptors[0]) as connection:
                self._fork(serial, connection)
        else:
            for pid in [pid for pid, known in self._serials.items() if known == serial]:
                os.kill(pid, signal.SIGKILL)
        return True

    def _fork(self, serial: int, connection: socket.socket) -> None:
        try:
            pid = os.fork()
        except OSError:  # no memory, or too many processes
            self._control.send(EXITED.pack(EXIT, serial, 0, -1))
            return
        if pid == 0:
            self._be_child(connection)
        self._serials[pid] = serial

    def _be_child(self, connection: socket.socket) -> NoReturn:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            for descriptor in (self._woken, self._wakes):
                os.close(descriptor)
            child.serve(connection, self._tokenizer, self._vocab_size, self._pid)
            code = 0
        finally:
            os._exit(code)

    def _report_exits(self) -> None:
        while self._serials:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._control.send(EXITED.pack(EXIT, self._serials.pop(pid), pid, status))


if __name__ == "__main__":
    main()
