from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from aiohttp import ClientResponse, web
from api_fakes import Client, FakeEngine, error_of, serving
from states import state
from structlog.testing import capture_logs

from kunserve.api.operate import feed as feed_module
from kunserve.api.operate.feed import BEHIND_BYTES, FEED, Feed
from kunserve.api.wire.backend import ApiSettings
from kunserve.api.wire.context import OPERATED
from kunserve.observe.frame import Frame, apply

URL = "/kunserve/events"


class Scene(FakeEngine):
    """An engine that shows one state after the other, the last one for ever."""

    def __init__(self, *states: dict[str, Any]) -> None:
        super().__init__()
        self.states = list(states) or [state()]
        self.num_looks = 0

    def state(self, num_transitions: int | None = None) -> dict[str, Any]:
        self.num_looks += 1
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The feed ticks when a test says so."""
    monkeypatch.setattr(feed_module, "TICK_S", 3600.0)
    monkeypatch.setattr(feed_module, "PAST_TICK_S", 3600.0)


@asynccontextmanager
async def watched(engine: Scene, settings: ApiSettings | None = None) -> AsyncIterator[tuple[Client, Feed]]:
    async with serving(engine, settings) as client:
        application = client.app
        assert isinstance(application, web.Application)
        yield client, application[FEED]


async def next_event(response: ClientResponse) -> tuple[str, Any]:
    assert response.status == 200
    lines = [(await response.content.readline()).decode() for _ in range(3)]
    assert lines[0].startswith("event: ") and lines[1].startswith("data: ") and lines[2] == "\n"
    return lines[0].removeprefix("event: ").strip(), orjson.loads(lines[1].removeprefix("data: "))


async def test_deltas_make_of_a_snapshot_what_a_later_viewer_gets() -> None:
    scenes = [state(1.0), state(1.1, used=3, waiting=2), state(1.2, is_dropped=True, used=40), state(1.3)]
    async with watched(Scene(*scenes)) as (client, feed):
        early = await client.get(URL)
        name, frame = await next_event(early)
        assert name == "snapshot"
        for _ in range(3):
            await feed.tick()
            name, delta = await next_event(early)
            assert name == "delta"
            apply(frame, delta)
            late = await client.get(URL)
            assert await next_event(late) == ("snapshot", frame)
            late.close()
        assert frame["groups"].keys() == {"0", "1"} and frame["transitions"] == {}


async def test_who_comes_later_sees_the_last_minutes() -> None:
    engine = Scene(*(state(at_s, waiting=round(10 * at_s)) for at_s in (1.0, 2.0, 3.0, 4.0, 4.1, 5.0)))
    async with watched(engine) as (client, feed):
        for _ in range(3):
            feed.remember()
        viewer = await client.get(URL, params={"past": ""})
        name, past = await next_event(viewer)
        assert (name, [frame["at_s"] for frame in past]) == ("past", [1.0, 2.0, 3.0])
        name, frame = await next_event(viewer)
        assert (name, frame["at_s"]) == ("snapshot", 4.0)
        assert all(frame.keys() > row.keys() for row in past) and past[1]["requests"]["waiting"] == 20
        await feed.tick()
        feed.remember()  # what the viewers know: nobody looks once more for it
        assert engine.num_looks == 5
        later = await client.get(URL, params={"past": ""})
        _, past = await next_event(later)
        assert [frame["at_s"] for frame in past] == [1.0, 2.0, 3.0, 4.1]


async def test_the_past_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "PAST_TICK_S", 0.0)
    engine = Scene(*(state(float(i)) for i in range(2 * feed_module.NUM_PAST)))
    async with watched(engine) as (client, _):
        while len(engine.states) > 1:
            await asyncio.sleep(0)
        _, past = await next_event(await client.get(URL, params={"past": ""}))
        assert len(past) == feed_module.NUM_PAST and past[0]["at_s"] >= feed_module.NUM_PAST


async def test_no_frame_is_made_while_nobody_watches() -> None:
    engine = Scene()
    async with watched(engine) as (client, feed):
        assert engine.num_looks == 0
        viewers = [await client.get(URL) for _ in range(3)]
        assert engine.num_looks == 1  # for all of them
        await feed.tick()
        assert engine.num_looks == 2
        for viewer in viewers:
            viewer.close()
        while feed.num_viewers:
            await asyncio.sleep(0)


async def test_the_ticker_ends_with_the_last_viewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "TICK_S", 0.0)
    engine = Scene()
    async with watched(engine) as (client, _):
        viewer = await client.get(URL)
        [ticker] = [task for task in asyncio.all_tasks() if task.get_name() == "feed"]
        viewer.close()
        await ticker
        looks = engine.num_looks
        for _ in range(10):
            await asyncio.sleep(0)
        assert engine.num_looks == looks
        assert (await next_event(await client.get(URL)))[0] == "snapshot"  # and it starts again


async def test_time_alone_is_told_once_a_second() -> None:
    scenes = [state(at_s) for at_s in (1.0, 1.1, 1.9, 2.0, 2.1)]
    async with watched(Scene(*scenes)) as (client, feed):
        viewer = await client.get(URL)
        await next_event(viewer)
        for _ in range(4):
            await feed.tick()
        await feed.close()
        rest = (await viewer.content.read()).decode()
        assert rest == 'event: delta\ndata: {"at_s":2.0}\n\n'


async def test_a_viewer_that_does_not_read_is_cut_off_and_nobody_waits_for_it() -> None:
    def padded(i: int) -> dict[str, Any]:
        return state(float(i), requests={"pad": f"{i}" + "x" * BEHIND_BYTES})

    async with watched(Scene(*map(padded, range(400)))) as (client, feed):
        small = socket.socket()
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # else the kernel reads megabytes for it
        small.setblocking(False)
        await asyncio.get_running_loop().sock_connect(small, (client.server.host, client.server.port))
        _, writer = await asyncio.open_connection(sock=small, limit=1024)
        try:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(f"GET {URL} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            while not feed.num_viewers:
                await asyncio.sleep(0)
            viewer = await client.get(URL)
            await next_event_of_any_size(viewer)
            num_seen = 0
            while feed.num_viewers == 2:
                await asyncio.wait_for(feed.tick(), 5)
                await next_event_of_any_size(viewer)
                num_seen += 1
            assert 0 < num_seen < 399
            await feed.tick()
            await next_event_of_any_size(viewer)  # the one that reads goes on
        finally:
            writer.transport.abort()


class Slow:
    """A viewer's request of which so many bytes wait to be sent."""

    def __init__(self, num_waiting: int) -> None:
        self.num_waiting, self.written, self.is_aborted = num_waiting, b"", False
        self.transport = self.writer = self

    def get_write_buffer_size(self) -> int:
        return self.num_waiting

    async def write(self, data: bytes) -> None:
        self.written += data

    def abort(self) -> None:
        self.is_aborted = True


async def test_the_past_does_not_count_as_behind() -> None:
    scenes = [state(float(i), used=i) for i in range(1, 4)]
    async with watched(Scene(*scenes)) as (_, feed):
        feed.remember()
        patient, behind = Slow(BEHIND_BYTES + 5000), Slow(BEHIND_BYTES + 5000)
        for slow, past_bytes in ((patient, 5000), (behind, 4999)):
            viewer: Any = feed_module.Viewer(slow, asyncio.Event(), past_bytes)  # type: ignore[arg-type]
            feed.viewers.add(viewer)
        await feed.tick()
        assert (patient.is_aborted, behind.is_aborted) == (False, True)
        assert patient.written.startswith(b"event: delta") and not behind.written
        feed.viewers.clear()


async def next_event_of_any_size(response: ClientResponse) -> None:
    end = b""
    while not end.endswith(b"\n\n"):
        end = (end + await response.content.readany())[-2:]


async def test_a_server_that_stops_ends_its_streams() -> None:
    async with watched(Scene()) as (client, feed):
        viewer = await client.get(URL)
        await feed.close()
        assert (await viewer.content.read()).startswith(b"event: snapshot\n")
        assert viewer.content.at_eof()


async def test_a_feed_that_fails_says_so_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "TICK_S", 0.0)
    with capture_logs() as lines:
        async with watched(Scene(state(), {})) as (client, _):
            viewer = await client.get(URL)
            assert (await viewer.content.read()).count(b"event:") == 1
    assert "feed stopped" in [line["event"] for line in lines]


async def test_viewers_bring_the_key_and_are_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "MAX_VIEWERS", 1)
    async with watched(Scene(), ApiSettings(api_keys=("k",))) as (client, _):
        assert (await client.get(URL)).status == 401
        key = {"Authorization": "Bearer k"}
        _, frame = await next_event(await client.get(URL, headers=key))
        assert (frame["model"], frame["has_admin"]) == ("tiny", False)
        assert (await error_of(await client.get(URL, headers=key)))["code"] == 503


def ticks(metrics: Any, times: Sequence[float]) -> list[Frame]:
    rates = feed_module.RecentRates(metrics)
    shown = []
    for at_s in times:
        metrics.generation_tokens(10)
        shown.append(rates.at(at_s))
    return shown


async def test_rates() -> None:
    async with serving(FakeEngine()) as client:
        application = client.app
        assert isinstance(application, web.Application)
        metrics = application[OPERATED].metrics
        metrics.inter_tokens([9.0])  # while nobody watched
        shown = ticks(metrics, [5.0, 6.0, 7.0, 8.0])
        assert [rates["tok_s"] for rates in shown] == [0.0, 10.0, 10.0, 10.0]
        assert all(rates.keys() == {"tok_s"} for rates in shown)
        metrics.inter_tokens([0.25])
        metrics.recent.first_token(9.0, 0.5)
        [rates] = ticks(metrics, [9.0])
        assert "gap_s" not in rates  # RecentRates began anew: the gap was of the time before
        assert (rates["ttft_p50_s"], rates["ttft_p99_s"]) == (0.5, 0.5)
        again = feed_module.RecentRates(metrics)
        metrics.inter_tokens([0.25])
        assert again.at(9.1)["gap_s"] == 0.25 == again.at(11.0)["gap_s"]
        assert "gap_s" not in again.at(11.2)


async def test_a_state_that_cannot_be_seen_is_an_error_not_a_broken_stream() -> None:
    async with watched(Scene({})) as (client, _):
        assert (await error_of(await client.get(URL)))["code"] == 500


async def test_times_to_first_token_stay_while_none_comes() -> None:
    """In an overload nobody gets a first token for longer than the window: just then they are looked for."""
    async with watched(Scene()) as (client, _):
        application = client.app
        assert isinstance(application, web.Application)
        metrics = application[OPERATED].metrics
        rates = feed_module.RecentRates(metrics)
        assert not rates.at(0.0).keys() & {"ttft_p50_s", "ttft_p99_s", "ttft_at_s"}
        for at_s, ttft_s in ((1.0, 9.0), (14.0, 2.0), (15.0, 0.5)):
            metrics.recent.first_token(at_s, ttft_s)
        fresh = rates.at(15.0)
        assert (fresh["ttft_p50_s"], fresh["ttft_p99_s"], "ttft_at_s" in fresh) == (2.0, 2.0, False)
        old = rates.at(60.0)
        assert (old["ttft_p50_s"], old["ttft_p99_s"], old["ttft_at_s"]) == (2.0, 2.0, 15.0)
        assert rates.at(90.0)["ttft_at_s"] == 15.0  # a moment, not an age: nothing new has to be told meanwhile
        metrics.recent.first_token(95.0, 70.0)
        new = rates.at(96.0)
        assert (new["ttft_p50_s"], "ttft_at_s" in new) == (70.0, False)
