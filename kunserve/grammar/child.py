"""A structure's process: compiles it once, under the kernel's limits, then follows it for each of its requests.

One thread reads what the server says and answers. Verdicts go out before masks: the server publishes a token as soon
as it knows that it may follow, and needs the next mask only when its devices have computed the next logits.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from kunserve.grammar.limits import CPU_S, MEMORY_BYTES, TOKEN_CPU_S, RefusedError
from kunserve.grammar.source import compile_matcher, is_limit, is_stuck
from kunserve.grammar.wire import COST, POSITION, Frames, Kind, frame
from kunserve.sizes import ceil_div

NICE = 5  # of compiling: streams go before
_PR_SET_PDEATHSIG = 1
_OOM_SCORE = "500"  # rather this than the server
_libc = ctypes.CDLL(None, use_errno=True)


def serve(connection: socket.socket, tokenizer: Any, vocab_size: int, fork_server_pid: int) -> None:
    """Compile the structure that comes first, and answer until the server closes the connection. Blocking."""
    limit_process(fork_server_pid)
    frames, received = Frames(), deque[tuple[Kind, bytes]]()
    while not received:
        if not (data := connection.recv(1 << 16)):
            return
        received += frames.receive(data)
    _, text = received.popleft()
    kind, _, value = text.decode().partition("\0")
    mask_bytes = ceil_div(vocab_size, 32) * 4  # a bit for each token, in whole words
    matcher = _compile(connection, tokenizer, kind, value, mask_bytes)
    if matcher is not None:
        _Matchers(connection, matcher, mask_bytes).follow(frames)
    else:
        connection.recv(1)  # the server closes


def limit_process(fork_server_pid: int) -> None:
    """Limit the memory of this process, close what it inherited, and let it end with the fork server."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != fork_server_pid:  # it died before it could matter
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # the library writes parts of what clients sent
        os.dup2(null, descriptor)
    Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = _size_bytes() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _size_bytes() -> int:
    """Return the size of the address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _compile(connection: socket.socket, tokenizer: Any, kind: str, value: str, mask_bytes: int) -> Any:
    """Compile on a thread of lower priority, for nobody can take back what a process gave up; None if refused."""
    size_bytes = _size_bytes()
    answers: list[tuple[Kind, bytes, Any]] = []

    def work() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            matcher, mask = compile_matcher(tokenizer, kind, value)
            answers.append((Kind.COMPILED, mask[:mask_bytes], matcher))
        except RefusedError as error:
            answers.append((Kind.REFUSED, str(error).encode(errors="replace"), None))
        except RecursionError:
            answers.append((Kind.REFUSED, b"it is nested too deeply", None))
        except MemoryError:
            answers.append((Kind.REFUSED, b"it takes too much memory", None))
        except BaseException as error:  # a panic of the library is none of Exception
            answers.append((Kind.REFUSED, f"the library failed: {type(error).__name__}".encode(), None))

    thread = threading.Thread(target=work)
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    thread.start()
    thread.join()
    signal.setitimer(signal.ITIMER_PROF, 0)
    [(answer, data, matcher)] = answers
    cost = COST.pack(time.process_time(), max(0, _size_bytes() - size_bytes))
    connection.sendall(frame(answer, cost, data))
    return matcher


class _Matchers:
    """The matchers of all requests that follow the structure here."""

    def __init__(self, connection: socket.socket, first: Any, mask_bytes: int) -> None:
        self._connection, self._first, self._mask_bytes = connection, first, mask_bytes
        self._matchers: dict[int, Any] = {}
        self._masks: dict[int, int] = {}  # to be computed: matcher's number, its tokens; in the order of their verdicts
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def follow(self, frames: Frames) -> None:
        """Answer until the server closes the connection."""
        while True:
            if self._masks and not self._poll.poll(0):
                number = next(iter(self._masks))
                self._send_mask(number, self._masks.pop(number))
                continue
            if not (data := self._connection.recv(1 << 16)):
                return
            for kind, payload in frames.receive(data):
                number, num_tokens = POSITION.unpack_from(payload)
                if kind is Kind.CLOSE:
                    self._matchers.pop(number, None)
                    self._masks.pop(number, None)
                else:
                    self._advance(number, num_tokens, memoryview(payload)[POSITION.size :].cast("I"))

    def _advance(self, number: int, num_tokens: int, token_ids: memoryview) -> None:
        """Take tokens, all of them if the matcher is a new one, and say what comes of it."""
        if (matcher := self._matchers.get(number)) is None:
            matcher = self._matchers[number] = self._first.deep_copy()
        position = POSITION.pack(number, num_tokens)
        self._masks.pop(number, None)
        for token_id in token_ids:
            signal.setitimer(signal.ITIMER_PROF, TOKEN_CPU_S)
            if not matcher.consume_token(token_id) or matcher.is_error():
                self._refuse(position, matcher.get_error(), token_id)
                return
        signal.setitimer(signal.ITIMER_PROF, 0)
        if matcher.is_stopped():
            self._connection.sendall(frame(Kind.FINISHED, position))
            return
        self._connection.sendall(frame(Kind.MORE, position))
        self._masks[number] = num_tokens

    def _send_mask(self, number: int, num_tokens: int) -> None:
        position = POSITION.pack(number, num_tokens)
        matcher = self._matchers[number]
        signal.setitimer(signal.ITIMER_PROF, TOKEN_CPU_S)
        try:
            mask = matcher.compute_bitmask()
        except ValueError as error:
            self._refuse(position, str(error), None)
            return
        signal.setitimer(signal.ITIMER_PROF, 0)
        if is_stuck(matcher):
            text = "a dead end: nothing may follow what was generated"
            self._connection.sendall(frame(Kind.UNUSABLE, position, text.encode()))
            return
        self._connection.sendall(frame(Kind.MASK, position, mask[: self._mask_bytes]))

    def _refuse(self, position: bytes, error: str, token_id: int | None) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        reason = error.partition("\n")[0]
        if token_id is None or is_limit(reason):
            self._connection.sendall(frame(Kind.UNUSABLE, position, f"too complex: {reason}".encode()))
        else:
            text = f"the grammar does not allow token {token_id}: {reason}"
            self._connection.sendall(frame(Kind.WRONG, position, text.encode()))
