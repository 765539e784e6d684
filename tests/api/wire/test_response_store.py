"""Stored responses: bounded, each seen by its owner only, and in a file beyond the life of the server."""

from __future__ import annotations

from pathlib import Path

import pytest

from kunserve.api.wire.response_store import ResponseStore, Stored
from kunserve.errors import ConfigError


def stored(text: str, size: int = 0) -> Stored:
    return Stored(text.encode(), b"[" + b" " * size + b"]", 1)


async def test_the_oldest_make_room() -> None:
    store = ResponseStore(10_000)
    for number in range(5):
        store.put(f"r{number}", "", stored(str(number), 2000))
    assert [await store.load(f"r{number}", "") is not None for number in range(5)] == [False, False, True, True, True]
    store.put("huge", "", stored("huge", 20_000))
    assert await store.load("huge", "") is None and await store.load("r4", "") is None


async def test_an_owner_sees_and_replaces_only_what_is_its_own(tmp_path: Path) -> None:
    for path in (None, tmp_path / "responses.db"):
        store = ResponseStore(10_000, path)
        store.put("r", "a", stored("a"))
        store.put("r", "b", stored("b"))
        assert await store.load("r", "a") == stored("a") and await store.load("r", "c") is None
        assert not await store.delete("r", "c") and await store.delete("r", "b")
        assert await store.load("r", "a") == stored("a") and await store.load("r", "b") is None
        store.close()


async def test_a_file_outlives_the_server_within_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "responses.db"
    store = ResponseStore(10_000, path)
    for number in range(5):
        store.put(f"r{number}", "", stored(str(number), 2000))
    store.close()
    store = ResponseStore(10_000, path)
    assert [await store.load(f"r{number}", "") is not None for number in range(5)] == [False, False, True, True, True]
    store.put("r5", "", stored("5", 2000))
    assert await store.delete("r4", "")
    store.close()
    store = ResponseStore(10_000, path)
    assert [await store.load(f"r{number}", "") is not None for number in range(2, 6)] == [False, True, False, True]
    store.close()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is a text, and a long one, so that nobody takes it for an empty database" * 9)
    for path in (tmp_path / "text", tmp_path / "no" / "folder"):
        with pytest.raises(ConfigError, match="response store"):
            ResponseStore(10_000, path)
