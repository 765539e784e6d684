"""Clients that leave, and many at once: the server is as clean after them as before."""

from __future__ import annotations

import asyncio
import random
from statistics import median

import aiohttp

from e2e.client import Json, events_of, is_idle, post, session_of, state_of, stream_tokens, until
from e2e.memory import resident_bytes_beside_pools
from e2e.server_process import ServerProcess
from e2e.tiny import random_prompt

NUM_STREAMS, NUM_ROUNDS = 200, 10
GROWTH_BYTES = 8 << 20

SAMPLED: Json = {"prompt": random_prompt(30), "seed": 11, "max_tokens": 12, "ignore_eos": True}


async def test_two_hundred_streams_a_third_of_them_cut_ten_times_over(tiny_server: ServerProcess) -> None:
    rng = random.Random(5)
    resident: list[int] = []
    async with session_of(tiny_server) as session:
        expected = await stream_tokens(session, SAMPLED)

        async def stay() -> None:
            assert await stream_tokens(session, SAMPLED) == expected

        for _ in range(NUM_ROUNDS):
            cut = set(rng.sample(range(NUM_STREAMS), NUM_STREAMS // 3))
            async with asyncio.TaskGroup() as tasks:
                for i in range(NUM_STREAMS):
                    tasks.create_task(leave_early(session, rng.randrange(12)) if i in cut else stay())
            await until(session, is_idle)
            resident.append(resident_bytes_beside_pools(tiny_server.pid))
        async with session.get("/health") as response:
            assert response.status == 200
    assert median(resident[-3:]) - median(resident[1:4]) < GROWTH_BYTES, resident


async def leave_early(session: aiohttp.ClientSession, num_events: int) -> None:
    """Close the connection of a stream that has far to go, after so many events."""
    body = {"prompt": random_prompt(30, seed=num_events), "max_tokens": 1000, "ignore_eos": True, "stream": True}
    async with session.post("/v1/completions", json=body) as response:
        async for _ in events_of(response):
            num_events -= 1
            if num_events <= 0:
                break
        response.close()


async def test_a_client_that_leaves_before_its_answer_in_one_piece(tiny_server: ServerProcess) -> None:
    body = {"prompt": random_prompt(30), "max_tokens": 2000, "ignore_eos": True, "n": 8}
    async with session_of(tiny_server) as session:
        task = asyncio.create_task(post(session, "/v1/completions", body))
        await until(session, lambda state: state["requests"]["running"] == 8)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        state = await until(session, is_idle)
        assert state["requests"]["waiting"] == 0


async def test_a_client_that_leaves_while_its_request_waits(tiny_server: ServerProcess) -> None:
    """More choices than fit: some run, the others wait; all of them end with their client."""
    body = {"prompt": random_prompt(1000), "max_tokens": 1000, "ignore_eos": True, "n": 100}
    async with session_of(tiny_server) as session:
        blocks = sum(group["blocks"]["total"] for group in (await state_of(session))["groups"])
        assert blocks * 16 < 100 * 1000
        task = asyncio.create_task(post(session, "/v1/completions", body))
        await until(session, lambda state: state["requests"]["running"] > 0 and state["requests"]["waiting"] > 0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(session, is_idle)
