"""Responses that clients may come back to: bounded in memory, and kept in a SQLite file if there is one.

Everything here returns at once but `load`: the file is written and read on a thread of its own. What is not written
yet is in memory, so that a response can be asked for as soon as its client has it.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import structlog

from kunserve.errors import ConfigError

log = structlog.get_logger()

T = TypeVar("T")

_OVERHEAD_BYTES = 1000  # of a stored response, besides its JSON
_TABLE = """
    create table if not exists responses (
        number integer primary key, key text unique, response blob, items blob, num_input_items integer
    )
"""
_SIZE = f"length(response) + length(items) + {_OVERHEAD_BYTES}"  # of a row, as `Stored.num_bytes`


@dataclass(frozen=True, slots=True)
class Stored:
    """One response, as JSON, and all items that a response after it goes on with: `num_input_items`, then its own."""

    response: bytes
    items: bytes  # a list
    num_input_items: int

    @property
    def num_bytes(self) -> int:
        """Return the bytes that the response takes in memory."""
        return len(self.response) + len(self.items) + _OVERHEAD_BYTES


class Responses(Protocol):
    """Where responses are stored, in this process or in another one."""

    @property
    def is_on(self) -> bool:
        """Return whether responses are stored at all."""

    def put(self, response_id: str, owner: str, stored: Stored) -> None:
        """Store a response; the oldest ones make room. Nobody but its owner sees it, or puts another in its place."""

    async def load(self, response_id: str, owner: str) -> Stored | None:
        """Return a response, None if there is none of this owner's."""

    async def delete(self, response_id: str, owner: str) -> bool:
        """Forget a response; return whether there was one of this owner's."""


class ResponseStore(Responses):
    """The newest responses, as many as fit. Owned by the event loop."""

    def __init__(self, max_bytes: int, path: Path | None = None) -> None:
        """Open the file, if any; ConfigError if it cannot be used. `max_bytes`: of all in memory, and in the file."""
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, Stored] = OrderedDict()
        self._num_bytes = 0
        self._file = None if path is None else _File(path, max_bytes)

    @property
    def is_on(self) -> bool:
        """See `Responses`."""
        return self._max_bytes > 0

    def put(self, response_id: str, owner: str, stored: Stored) -> None:
        """See `Responses`."""
        key = _key(response_id, owner)
        self._forget(key)
        self._kept[key] = stored
        self._num_bytes += stored.num_bytes
        while self._num_bytes > self._max_bytes:
            self._forget(next(iter(self._kept)))
        if self._file is not None:
            self._file.put(key, stored)

    async def load(self, response_id: str, owner: str) -> Stored | None:
        """See `Responses`."""
        key = _key(response_id, owner)
        stored = self._kept.get(key)
        return await self._file.load(key) if stored is None and self._file is not None else stored

    async def delete(self, response_id: str, owner: str) -> bool:
        """See `Responses`."""
        if await self.load(response_id, owner) is None:
            return False
        key = _key(response_id, owner)
        self._forget(key)
        if self._file is not None:
            await self._file.delete(key)
        return True

    def close(self) -> None:
        """Write what is left to be written."""
        if self._file is not None:
            self._file.close()

    def _forget(self, key: str) -> None:
        if (stored := self._kept.pop(key, None)) is not None:
            self._num_bytes -= stored.num_bytes


def _key(response_id: str, owner: str) -> str:
    return f"{owner}/{response_id}"


class _File:
    """The SQLite file; only its own thread touches it, in the order of the calls."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        try:
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._database.execute("pragma journal_mode = wal")
            self._database.execute("pragma synchronous = normal")
            self._database.execute(_TABLE)
            sizes = f"select coalesce(sum({_SIZE}), 0) from responses"
            [self._num_bytes] = self._database.execute(sizes).fetchone()
        except sqlite3.Error as error:
            raise ConfigError(f"the response store {path} cannot be used: {error}") from None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="response-store")

    def put(self, key: str, stored: Stored) -> None:
        self._thread.submit(self._put, key, stored)

    async def load(self, key: str) -> Stored | None:
        return await self._run(lambda: self._load(key))

    async def delete(self, key: str) -> None:
        await self._run(lambda: self._delete("key = ?", key))

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self._database.close()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _put(self, key: str, stored: Stored) -> None:
        try:
            self._delete("key = ?", key)
            row = (key, stored.response, stored.items, stored.num_input_items)
            columns = "key, response, items, num_input_items"
            self._database.execute(f"insert into responses ({columns}) values (?, ?, ?, ?)", row)
            self._num_bytes += stored.num_bytes
            while self._num_bytes > self._max_bytes:
                self._delete("number = (select min(number) from responses)")
        except sqlite3.Error as error:  # the client has its answer; only coming back to it will not work
            log.error("response not written to the response store", error=str(error))

    def _load(self, key: str) -> Stored | None:
        query = "select response, items, num_input_items from responses where key = ?"
        row = self._database.execute(query, (key,)).fetchone()
        return None if row is None else Stored(*row)

    def _delete(self, where: str, *values: str) -> None:
        returning = f"returning {_SIZE}"
        for [num_bytes] in self._database.execute(
            f"delete from responses where {where} {returning}", values
        ).fetchall():
            self._num_bytes -= num_bytes
