"""Structures compiled in real processes, for a vocabulary of bytes: token i is byte i."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np

from kunserve.engine.text.constraint import GrammarConstraint
from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.grammar.compiled import Key
from kunserve.grammar.fork_server import Vocabulary
from kunserve.grammar.pool import Pool
from kunserve.sampling import TokenMask

EOS = 299
VOCABULARY = Vocabulary(Tokenizer.dummy(300, (EOS,)).to_json, 300, (EOS,))


@asynccontextmanager
async def open_pool(
    vocabulary: Vocabulary = VOCABULARY, on_death: Callable[[str], None] = lambda reason: None
) -> AsyncIterator[Pool]:
    """A pool until the block is left."""
    pool = Pool(vocabulary, on_death)
    try:
        yield pool
    finally:
        await pool.close()


async def constraint(pool: Pool, key: Key, begins_after: int | None = None) -> GrammarConstraint:
    """A request's constraint at its beginning."""
    return GrammarConstraint((await pool.compile(key, "somebody")).matcher(), begins_after)


def ids_of(mask: TokenMask) -> set[int] | None:
    """The tokens that a mask allows; waits for it."""
    words = mask()
    return None if words is None else set(np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()[0].tolist())


def children_of(pid: int) -> list[int]:
    """Process ids of a process's living children."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except OSError:  # it has ended meanwhile
            continue
        if int(parent) == pid and state != b"Z":
            found.append(int(name))
    return found


def processes_of(pool: Pool) -> list[int]:
    """Process ids of the structures' processes of a pool."""
    pid = pool.fork_server_pid
    return [] if pid is None else children_of(pid)
