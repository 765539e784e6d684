"""Devices that hang or die under a server: clients get all their tokens, health says it, and the process still ends."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from e2e.client import Json, events_of, metrics_of, post, session_of, until
from e2e.server_process import ServerProcess, running_server
from e2e.tiny import random_prompt

FLAGS = ("--devices", "cpu:2", "--num-gpu-blocks-override", "64", "--admin-key", "boss")
ADMIN = {"Authorization": "Bearer boss"}


def question(number: int) -> Json:
    return {"prompt": random_prompt(8), "max_tokens": 120, "ignore_eos": True, "seed": number, "temperature": 0.8}


@pytest.fixture
def flags(tiny_flags: tuple[str, ...]) -> tuple[str, ...]:
    return (*tiny_flags, *FLAGS)


@pytest.mark.parametrize("fault", ["lost", "hang"])
async def test_clients_notice_nothing_and_health_says_it(
    fault: str, flags: tuple[str, ...], tiny_server: ServerProcess
) -> None:
    questions = [question(i) for i in range(12)]
    async with session_of(tiny_server) as session:
        answers = await asyncio.gather(*(post(session, "/v1/completions", q) for q in questions))
        expected = [answer["choices"] for answer in answers]
    faults = ("--inject-faults", f"1:{fault}@0.1s", "--device-timeout", "1")
    with running_server(*flags, *faults) as server, server.log_shown():
        async with session_of(server) as session:
            answers = await asyncio.gather(*(post(session, "/v1/completions", q) for q in questions))
            assert [answer["choices"] for answer in answers] == expected
            await until(session, lambda state: len(state["groups"]) == 1)
            async with session.get("/health") as response:
                assert response.status == 200
                assert await response.json() == {"status": "degraded", "reason": "cpu:1 is lost"}
            async with session.get("/ready") as response:  # new requests are welcome nevertheless
                assert (response.status, (await response.json())["status"]) == (200, "degraded")
            assert (await metrics_of(session))["kunserve:devices/lost"] == 1
            added = await session.post("/kunserve/devices/1/add", headers=ADMIN)
            assert (added.status, (await added.json())["outcome"]) == (200, "done")
            async with session.get("/health") as response:
                assert await response.json() == {"status": "ok"}
            again = await asyncio.gather(*(post(session, "/v1/completions", q) for q in questions))
            assert [answer["choices"] for answer in again] == expected
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0


@pytest.mark.parametrize("num_signals", [1, 2])
async def test_a_server_ends_whatever_hangs(num_signals: int, flags: tuple[str, ...]) -> None:
    faults = ("--inject-faults", "0:hang@0.1s,1:hang@0.1s", "--device-timeout", "0")
    drain_s = "1" if num_signals == 1 else "600"
    with running_server(*flags, *faults, "--shutdown-timeout", drain_s) as server, server.log_shown():
        async with session_of(server) as session:
            asked = question(0) | {"stream": True, "n": 16, "max_tokens": 2000}
            async with session.post("/v1/completions", json=asked) as response:
                events = events_of(response)
                await anext(events)
                await asyncio.sleep(1)
                for _ in range(num_signals):
                    server.send_signal(signal.SIGTERM)
                    await asyncio.sleep(0.3)
                rest = [event async for event in events]
                assert rest[-1]["error"]["code"] == 503
        assert server.wait() == 0
        assert "the process ends without them" in server.log


async def test_without_any_device_the_process_says_so_and_fails(flags: tuple[str, ...]) -> None:
    with running_server(*flags, "--inject-faults", "0:lost@0.1s,1:lost@0.1s") as server, server.log_shown():
        async with session_of(server) as session:
            asked = question(0) | {"stream": True, "n": 16, "max_tokens": 2000}
            async with session.post("/v1/completions", json=asked) as response:
                rest = [event async for event in events_of(response)]
                assert rest[-1]["error"]["code"] == 500
        assert server.wait() == 1
        assert "no complete copy of the weights is left" in server.log


def test_what_cannot_be_added_or_removed(flags: tuple[str, ...], tmp_path: Path) -> None:
    async def main() -> None:
        with running_server(*flags) as server:
            async with session_of(server) as session:
                for path, status in (("0/add", 409), ("7/remove", 404), ("x/add", 404)):
                    assert (await session.post(f"/kunserve/devices/{path}", headers=ADMIN)).status == status, path
                assert (
                    await session.post("/kunserve/devices/0/remove", json={"drain_s": 0}, headers=ADMIN)
                ).status == 200
                last = await session.post("/kunserve/devices/1/remove", headers=ADMIN)
                assert last.status == 409 and "last complete copy" in (await last.json())["error"]["message"]
                assert (await session.get("/health")).status == 200
                assert (await session.post("/kunserve/devices/0/add", headers=ADMIN)).status == 200

    asyncio.run(main())
