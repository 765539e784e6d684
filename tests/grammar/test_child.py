"""What a structure's process does, without forking one, and what the kernel holds it to."""

from __future__ import annotations

import socket
import subprocess
import sys
from array import array
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from structures import EOS, VOCABULARY

from kunserve.grammar.child import _Matchers
from kunserve.grammar.limits import RefusedError
from kunserve.grammar.source import compile_matcher
from kunserve.grammar.wire import POSITION, Frames, Kind, frame


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return LLTokenizer(VOCABULARY.tokenizer_json(), n_vocab=300, eos_token=EOS)


class Server:
    """The other end."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.frames = connection, Frames()
        self.answers = self._answers()

    def send(self, number: int, num_tokens: int, text: bytes) -> None:
        tokens = array("I", list(text)).tobytes()
        self.connection.sendall(frame(Kind.ADVANCE, POSITION.pack(number, num_tokens), tokens))

    def _answers(self) -> Iterator[tuple[Kind, tuple[int, int], bytes]]:
        while data := self.connection.recv(1 << 16):
            for kind, payload in self.frames.receive(data):
                yield kind, POSITION.unpack_from(payload), payload[POSITION.size :]


@pytest.fixture
def serve() -> Iterator[Any]:
    ours, theirs = socket.socketpair()
    threads = []

    def serve(matcher: LLMatcher) -> Server:
        threads.append(Thread(target=_Matchers(theirs, matcher, 40).follow, args=[Frames()]))
        threads[0].start()
        return Server(ours)

    with ours, theirs:
        yield serve
        ours.shutdown(socket.SHUT_RDWR)
        threads[0].join(10)
        assert not threads[0].is_alive()


def test_too_complex_for_its_limits(tokenizer: LLTokenizer, serve: Any) -> None:
    grammar = LLMatcher.grammar_from_lark('start: "aa" | "ab" | "ac" | "ad"')
    server = serve(LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(max_items_in_row=3)))
    server.send(7, 1, b"a")
    kind, position, reason = next(server.answers)
    assert (kind, position) == (Kind.UNUSABLE, (7, 1)) and reason.startswith(b"too complex: ")
    assert len(reason) < 300 and b"\n" not in reason


def test_a_dead_end_is_the_structure_s_fault(tokenizer: LLTokenizer, serve: Any) -> None:
    server = serve(compile_matcher(tokenizer, "grammar", 'start: "a" X | "b"\nX: /c/ & /d/')[0])
    server.send(7, 1, b"a")
    assert next(server.answers)[:2] == (Kind.MORE, (7, 1))
    kind, position, reason = next(server.answers)
    assert (kind, position) == (Kind.UNUSABLE, (7, 1)) and reason.startswith(b"a dead end")


def test_verdicts_and_masks_of_several(tokenizer: LLTokenizer, serve: Any) -> None:
    server = serve(LLMatcher(tokenizer, LLMatcher.grammar_from_regex("ab|cd"), log_level=0))
    server.send(1, 1, b"a")
    assert [next(server.answers)[:2] for _ in range(2)] == [(Kind.MORE, (1, 1)), (Kind.MASK, (1, 1))]
    server.send(2, 2, b"cd")  # from the beginning, in one piece
    assert next(server.answers)[:2] == (Kind.FINISHED, (2, 2))
    server.send(1, 2, b"x")
    kind, position, reason = next(server.answers)
    assert (kind, position) == (Kind.WRONG, (1, 2)) and b"does not allow token 120" in reason


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("regex", "[^\\s\\S]"),
        ("grammar", "start: X\nX: /[^\\s\\S]/"),
        ("json", '{"$ref": "#"}'),
        ("json", "false"),
        ("json", '{"allOf": [{"type": "string"}, {"type": "null"}]}'),
        ("grammar", "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(30)) + '\nr30: "a"'),
        ("grammar", "R0: R1 R1\n" * 2),
        ("regex", "(a|b)*" * 2000),
        ("grammar", 'start: "abc" X\nX: /c/ & /d/'),
    ],
)
def test_what_has_no_answer_is_refused_before_the_first_token(tokenizer: LLTokenizer, kind: str, value: str) -> None:
    with pytest.raises(RefusedError):
        compile_matcher(tokenizer, kind, value)


def test_memory_is_limited() -> None:
    code = """
import os, sys
from kunserve.grammar import child
from kunserve.grammar.limits import MEMORY_BYTES
answer = os.dup(1)
child.limit_process(os.getppid())
held = bytearray(MEMORY_BYTES // 2)
try:
    held += bytearray(MEMORY_BYTES // 2)
except MemoryError:
    os.write(answer, b"refused")
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"refused"
