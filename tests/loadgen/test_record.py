from __future__ import annotations

import asyncio
from pathlib import Path

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from states import state

from kunserve.command.replay import read_recording
from kunserve.loadgen.record import recording
from kunserve.observe.frame import frame_of


async def test_what_the_feed_says_is_what_replay_reads(tmp_path: Path) -> None:
    frame = frame_of(state(), model="m", rates={"tok_s": 0.0})
    is_read, is_over = asyncio.Event(), asyncio.Event()

    async def serve_feed(request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == "Bearer k"
        response = web.StreamResponse()
        await response.prepare(request)
        text = b"event: snapshot\ndata: %s\n\nevent: delta\ndata: " % orjson.dumps(frame)
        for part in (text[:20], text[20:], b'{"epoch":7}\n\n'):  # however it is cut
            await response.write(part)
            await asyncio.sleep(0)
        is_read.set()
        await is_over.wait()
        return response

    app = web.Application()
    app.router.add_get("/kunserve/events", serve_feed)
    path = tmp_path / "run.jsonl"
    async with TestServer(app) as server:
        async with recording(str(server.make_url("")).rstrip("/"), {"Authorization": "Bearer k"}, path):
            await is_read.wait()
            while not path.exists() or path.read_bytes().count(b"\n") < 2:
                await asyncio.sleep(0.01)
        is_over.set()
    events = read_recording(path.read_bytes().splitlines())
    assert events == [("snapshot", orjson.loads(orjson.dumps(frame))), ("delta", {"epoch": 7})]


async def test_a_server_without_a_feed_is_no_server_to_record(tmp_path: Path) -> None:
    async with TestServer(web.Application()) as server:
        url = str(server.make_url("")).rstrip("/")
        with pytest.raises(ValueError, match="/kunserve/events answers HTTP 404"):
            async with recording(url, {}, tmp_path / "run.jsonl"):
                pass
    with pytest.raises(ValueError, match="cannot record"):
        async with recording(url, {}, tmp_path / "run.jsonl"):
            pass
