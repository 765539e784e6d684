"""Bytes of bodies count from the first to the last, whoever they are of, and on every way out they are given back."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

import orjson
import pytest
from api_fakes import STATS, Client, FakeEngine, error_of, serving

from kunserve.api.wire import body as reading
from kunserve.api.wire.backend import ApiSettings, ModelInfo
from kunserve.api.wire.body_memory import IDLE_S, MOST_BYTES, Body, BodyMemory
from kunserve.api.wire.context import API
from kunserve.errors import OverloadedError, PayloadTooLargeError
from kunserve.observe.metrics import Metrics

KIB, MIB = 1 << 10, 1 << 20


class Bodies:
    """A memory for bodies of 4 MiB, and who had to give way."""

    def __init__(self, api_keys: tuple[str, ...] = (), max_bytes: int = 4 * MIB) -> None:
        self.metrics = Metrics("tiny", 64, lambda: STATS, itertools.count().__next__)  # rendered anew every time
        settings = ApiSettings(max_body_memory_bytes=max_bytes, api_keys=api_keys)
        self.memory, self.stack = BodyMemory(self.metrics, settings), ExitStack()
        self.gave_way: list[str] = []

    def begin(self, name: str = "", owner: str = "") -> Body:
        return self.stack.enter_context(self.memory.held(owner, lambda: self.gave_way.append(name)))

    def gauge(self) -> float:
        [line] = [line for line in self.metrics.render().splitlines() if line.startswith(b"kunserve:body_bytes{")]
        return float(line.split()[-1])


def test_a_body_is_what_came_of_it_in_whatever_pieces() -> None:
    bodies = Bodies()
    for pieces in ([b"a"] * 9, [b"x" * MOST_BYTES], [b"x" * MOST_BYTES, b"y", b"", b"z" * 100_000], []):
        body = bodies.begin()
        for piece in pieces:
            body.add(piece, 0.0)
        assert bodies.memory.num_bytes == bodies.gauge() == sum(map(len, pieces))
        body.end()
        assert body.whole == b"".join(pieces)
        bodies.stack.close()
        assert bodies.memory.num_bytes == bodies.gauge() == 0 and body.whole == b""


def test_beyond_the_bound_nobody_grows() -> None:
    bodies = Bodies()
    first, second = bodies.begin(), bodies.begin()
    first.add(b"x" * (2 * MIB), 0.0)
    second.add(b"x" * MIB, 0.0)
    for body in (first, second, bodies.begin()):
        with pytest.raises(OverloadedError, match="memory for unfinished bodies") as caught:
            body.add(b"x" * MIB, 0.1)
        assert caught.value.retry_after_s == 2
    assert bodies.memory.num_bytes == 3 * MIB and bodies.gave_way == []
    assert b'reason="body_memory"} 3.0' in bodies.metrics.render()


def test_large_bodies_leave_room_for_small_ones() -> None:
    bodies = Bodies()
    bodies.begin().add(b"x" * (3 * MIB), 0.0)
    bodies.begin().add(b"x" * (MIB // 2), 0.0)
    with pytest.raises(OverloadedError):
        bodies.begin().add(b"x" * (MOST_BYTES + 1), 0.0)
    for _ in range(MIB // 2 // MOST_BYTES):
        bodies.begin().add(b"x" * MOST_BYTES, 0.0)
    with pytest.raises(OverloadedError):
        bodies.begin().add(b"x", 0.0)
    assert bodies.memory.num_bytes == 4 * MIB


def test_who_has_stopped_for_longest_gives_way_and_gets_nothing_back() -> None:
    bodies = Bodies()
    a, b, c = (bodies.begin(name) for name in "abc")
    for now_s, body in ((0.0, a), (1.0, b), (2.0, a), (3.0, c)):
        body.add(b"x" * (MIB // 2), now_s)
    new = bodies.begin("new")
    with pytest.raises(OverloadedError):
        new.add(b"x" * (2 * MIB), 1.0 + IDLE_S - 0.1)
    new.add(b"x" * (2 * MIB), 1.0 + IDLE_S)
    assert bodies.gave_way == ["b"] and bodies.memory.num_bytes == 3 * MIB + MIB // 2
    with pytest.raises(OverloadedError):
        b.add(b"x", 9.0)
    with pytest.raises(OverloadedError):
        b.end()
    assert bodies.memory.num_bytes == 3 * MIB + MIB // 2


def test_whole_bodies_give_way_to_nobody() -> None:
    bodies = Bodies()
    whole = bodies.begin("whole")
    whole.add(b"x" * (3 * MIB), 0.0)
    whole.end()
    with pytest.raises(OverloadedError):
        bodies.begin().add(b"x" * MIB, 99.0)
    assert bodies.gave_way == [] and len(whole.whole) == 3 * MIB


def test_one_key_leaves_room_for_others() -> None:
    bodies = Bodies(("key of a", "key of b"))
    mine = [bodies.begin(f"a{i}", "a") for i in range(4)]
    for body in mine[:3]:
        body.add(b"x" * (MIB - 1), 0.0)
    with pytest.raises(OverloadedError, match="this key's bodies"):
        mine[3].add(b"x" * 100, 0.1)
    assert b'reason="body_share"} 1.0' in bodies.metrics.render()
    other = bodies.begin("b0", "b")
    other.add(b"x" * (256 * KIB), 0.1)
    mine[3].add(b"x" * 100, 0.1 + IDLE_S)  # its own must give way to it, not the other's
    assert bodies.gave_way == ["a0"]


def test_what_can_never_be_read_is_too_large() -> None:
    body = Bodies().begin()
    with pytest.raises(PayloadTooLargeError, match=f"larger than {3 * MIB} bytes"):
        body.add(b"x" * (3 * MIB + 1), 0.0)
    body = Bodies(max_bytes=512 * MIB).begin()
    body.add(b"x" * (8 * MIB), 0.0)
    with pytest.raises(PayloadTooLargeError):
        body.add(b"x", 0.0)


# --- over HTTP ------------------------------------------------------------------------------------------------------

SETTINGS = ApiSettings(max_body_memory_bytes=MIB, body_timeout_s=0.5)
SMALL = orjson.dumps({"prompt": "x", "max_tokens": 2})


async def slow_body(num_bytes: int, go: asyncio.Event) -> AsyncIterator[bytes]:
    """A small request behind so many spaces; its last byte comes when it may."""
    yield b" " * num_bytes + SMALL[:-1]
    await go.wait()
    yield SMALL[-1:]


async def until_held(client: Client, num_bytes: int) -> None:
    memory = client.app[API].bodies
    while memory.num_bytes < num_bytes:
        await asyncio.sleep(0.001)


def bytes_held(client: Client) -> int:
    return client.app[API].bodies.num_bytes


async def test_every_way_out_gives_the_bytes_back() -> None:
    engine, go = FakeEngine(), asyncio.Event()
    async with serving(engine, SETTINGS) as client:
        timing_out = asyncio.create_task(client.post("/v1/completions", data=slow_body(9000, go)))
        leaving = asyncio.create_task(client.post("/v1/completions", data=slow_body(9000, go)))
        await until_held(client, 18_000)
        leaving.cancel()
        response = await timing_out
        assert "took longer than 0.5 s" in (await error_of(response))["message"] and response.status == 400
        while bytes_held(client):
            await asyncio.sleep(0.001)
        for data, status in ((b"no JSON", 400), (b" " * 200_000 + b"no JSON", 400), (b"[1]", 400), (SMALL, 200)):
            assert (await client.post("/v1/completions", data=data)).status == status
            assert bytes_held(client) == 0
        assert (await client.post("/v1/completions", data=b" " * (MIB * 3 // 4 + 1))).status == 413
        assert bytes_held(client) == 0


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_beyond_the_bound_503_and_the_others_are_served(is_chunked: bool) -> None:
    engine, go = FakeEngine(), asyncio.Event()
    async with serving(engine, ApiSettings(max_body_memory_bytes=MIB)) as client:
        num_bytes = 400 * KIB
        headers = {} if is_chunked else {"Content-Length": str(num_bytes + len(SMALL))}
        held = [
            asyncio.create_task(client.post("/v1/completions", data=slow_body(num_bytes, go), headers=headers))
            for _ in range(2)
        ]
        await until_held(client, 2 * num_bytes)
        refused = await client.post("/v1/completions", data=slow_body(num_bytes, go), headers=headers)
        assert (await error_of(refused))["code"] == 503 and refused.headers["Retry-After"] == "2"
        assert refused.headers["Connection"] == "close"
        assert (await client.post("/v1/completions", data=SMALL)).status == 200
        go.set()
        assert [response.status for response in await asyncio.gather(*held)] == [200, 200]
        assert bytes_held(client) == 0


async def test_who_has_stopped_is_told_when_it_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kunserve.api.wire.body_memory.IDLE_S", 0.0)
    engine, go = FakeEngine(), asyncio.Event()
    async with serving(engine, ApiSettings(max_body_memory_bytes=MIB)) as client:
        stopped = asyncio.create_task(client.post("/v1/completions", data=slow_body(700 * KIB, go)))
        await until_held(client, 700 * KIB)
        assert (await client.post("/v1/completions", data=b" " * (500 * KIB) + SMALL)).status == 200
        assert (await error_of(await stopped))["code"] == 503
        assert bytes_held(client) == 0


async def test_bodies_that_wait_for_a_thread_count_until_their_client_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    may_read, large = threading.Event(), reading.parse_large

    def slow(data: bytes) -> object:
        assert may_read.wait(60)
        return large(data)

    monkeypatch.setattr(reading, "parse_large", slow)
    model = ModelInfo(("tiny",), 10, "/", 0)
    data = b" " * (200 * KIB) + SMALL
    async with serving(FakeEngine(), ApiSettings(tokenizer_threads=1, logs_access=False), model=model) as client:
        asked = [asyncio.create_task(client.post("/v1/completions", data=data)) for _ in range(3)]
        await until_held(client, 3 * len(data))
        asked[2].cancel()
        while bytes_held(client) > 2 * len(data):
            await asyncio.sleep(0.001)
        may_read.set()
        assert [response.status for response in await asyncio.gather(*asked[:2])] == [200, 200]
        assert bytes_held(client) == 0


async def test_an_admin_who_brings_no_api_key_owns_a_body() -> None:
    settings: Any = ApiSettings(api_keys=("a", "b"), admin_keys=("root",))
    async with serving(FakeEngine(), settings) as client:
        headers = {"Authorization": "Bearer root"}
        response = await client.post("/kunserve/burst", json={"requests": 0}, headers=headers)
        assert (await error_of(response))["param"] == "requests"
