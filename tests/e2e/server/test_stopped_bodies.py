"""Many clients stop in the middle of their bodies: memory stays within the flag's bound, and others are served."""

from __future__ import annotations

import asyncio
from io import BytesIO

import orjson

from e2e.client import Json, is_idle, metrics_of, session_of, stream_tokens, until
from e2e.memory import resident_bytes_beside_pools
from e2e.server_process import POLL_S, running_server
from e2e.tiny import random_prompt

MIB = 1 << 20
NUM_STOPPED = 200
BOUND_BYTES = 16 * MIB
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
REQUEST: Json = {"prompt": random_prompt(20), "max_tokens": 20, "ignore_eos": True, "seed": 1}


async def stop_in_the_middle(port: int, num_bytes: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that has sent so many bytes of a body of 8 MiB, or has been refused before."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(HEAD % (8 * MIB) + b" " * num_bytes)
    await writer.drain()
    return reader, writer


async def test_200_stopped_bodies_of_a_mebibyte(tiny_flags: tuple[str, ...]) -> None:
    with running_server(*tiny_flags, "--max-body-memory", "16MiB") as server:
        async with session_of(server) as session:
            expected = await stream_tokens(session, REQUEST)
            before = resident_bytes_beside_pools(server.pid)
            stopped = [await stop_in_the_middle(server.port, MIB) for _ in range(NUM_STOPPED)]
            held = 0.0
            while held <= BOUND_BYTES - 4 * MIB:  # nearly all that large bodies may have
                held = (await metrics_of(session))["kunserve:body_bytes"]
                await asyncio.sleep(POLL_S)
            assert held <= BOUND_BYTES
            assert resident_bytes_beside_pools(server.pid) - before < 100 * MIB  # and not 200
            assert await stream_tokens(session, REQUEST) == expected

            answers = [asyncio.create_task(reader.readuntil(b"\r\n\r\n")) for reader, _ in stopped]
            while sum(answer.done() for answer in answers) < NUM_STOPPED - 16:
                await asyncio.sleep(POLL_S)
            for answer in answers:
                if answer.done():
                    fields = answer.result().lower().split(b"\r\n")
                    assert fields[0].startswith(b"http/1.1 503 ")
                    assert b"retry-after: 2" in fields and b"connection: close" in fields

            # Whoever has stopped gives way to who goes on, with a body as large.
            large = orjson.dumps({**REQUEST, "user": "x" * MIB})

            async def ask() -> int:
                async with session.post("/v1/completions", data=BytesIO(large)) as response:
                    assert response.status == 200 or response.headers["Retry-After"] == "2"
                    return response.status

            while (status := await ask()) == 503:
                await asyncio.sleep(POLL_S)
            assert status == 200

            for answer in answers:
                answer.cancel()
            for _, writer in stopped:
                writer.close()
            while (await metrics_of(session))["kunserve:body_bytes"]:
                await asyncio.sleep(POLL_S)
            assert await ask() == 200
            await until(session, is_idle)
