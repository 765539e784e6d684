"""A front before servers that die again and again: its clients are told what they would be told undisturbed.

Front, sockets, server and engine are real. A death is a connection that breaks off behind so many bytes of the answer.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from front_client import ask
from seeds import asked_seed

from e2e.engine.test_resume import CASES, app_serving, told
from e2e.engines import assert_idle
from e2e.tiny import TinyModels
from kunserve.ray.front import Front, ReplicaGoneError
from kunserve.ray.upstream import Head, Headers, answer_of

ROUNDS, MOST_DEATHS = 3, 4


@dataclass
class MortalServer:
    """One server; each answer of it breaks off after the bytes that `lives` has for it, the last do not."""

    socket: str
    lives: list[int] = field(default_factory=list)
    num_bytes: int = 0  # of the last answer

    async def answer(self, method: str, path: str, headers: Headers, body: bytes) -> AsyncGenerator[Head | bytes, None]:
        """See `front.Replicas`."""
        life = self.lives.pop(0) if self.lives else None
        self.num_bytes = 0
        async with aclosing(answer_of(self.socket, method, path, headers, body)) as parts:
            async for part in parts:
                if isinstance(part, bytes):
                    self.num_bytes += len(part)
                    if life is not None and self.num_bytes > life:
                        yield part[: len(part) - (self.num_bytes - life)]
                        raise ReplicaGoneError("dead")
                yield part


async def test_clients_are_told_the_same_however_often_servers_die(
    tiny_models: TinyModels, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kunserve.ray.front.FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr("kunserve.ray.front.time", SimpleNamespace(time=lambda: 1234.0))
    chance, num_resumed = random.Random(asked_seed() or 0), 0
    async with app_serving(tiny_models.folder("llama")) as (app, engine):
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        server = MortalServer(str(tmp_path / "http"))
        await web.UnixSite(runner, server.socket).start()
        front = Front({"tiny": server}, "front")

        async def say(path: str, body: Any) -> bytes:
            # The same ids and seeds each time.
            monkeypatch.setattr("kunserve.ray.front.random", random.Random(17))
            answer = await ask(front, path, body)
            assert answer.status == 200
            return answer.body

        for name, (path, body) in CASES.items():
            body = {"model": "tiny", **body, "stream": True}
            await say(path, body)  # so that its prompt is cached: usage tells
            whole, num_bytes = await say(path, body), server.num_bytes
            assert b"kunserve" not in whole and len(told(whole)[0]) > 0, name
            for _ in range(ROUNDS):
                lives = [chance.randrange(num_bytes) for _ in range(chance.randint(1, MOST_DEATHS))]
                server.lives = list(lives)
                assert told(await say(path, body)) == told(whole), f"{name}: {lives}"
            num_resumed, front.num_resumed = num_resumed + front.num_resumed, 0
        assert num_resumed > len(CASES)
        await runner.cleanup()
        await assert_idle(engine)
