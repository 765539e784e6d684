"""Host devices help each other: only those that have nothing to do, and only until they have."""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import pytest

from kunserve.gpu import host
from kunserve.gpu.host import HostDevice

T = TypeVar("T")
WAIT_S = 60


class RecordingTeam:
    """A team whose helpers stay until they are told to leave; `has_help` is set while there is one."""

    def __init__(self) -> None:
        self.has_help, self.num_ended = threading.Event(), 0

    def lead(self, work: Callable[[], T]) -> T:
        return work()

    def help(self, leave: ctypes.c_int32) -> None:
        self.has_help.set()
        while not leave.value:
            time.sleep(0)
        self.has_help.clear()
        self.num_ended += 1


@pytest.fixture
async def devices(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[HostDevice]]:
    monkeypatch.setattr(host, "IDLE_S", 0.0)
    devices = [HostDevice(index, 1) for index in range(2)]
    teams = [RecordingTeam() for _ in devices]
    for device, team in zip(devices, teams, strict=True):
        device.join(team, devices)
    yield devices
    for device in devices:
        device.close()


def team_of(device: HostDevice) -> RecordingTeam:
    assert isinstance(device.team, RecordingTeam)
    return device.team


async def test_an_idle_device_helps_until_the_work_has_ended(devices: list[HostDevice]) -> None:
    first, second = devices
    team = team_of(first)
    assert await first.run(lambda: team.has_help.wait(WAIT_S))
    assert await second.run(lambda: team.num_ended) == 1
    assert await first.run(lambda: team.has_help.wait(WAIT_S))  # and again with the next


async def test_a_helper_leaves_for_work_of_its_own(devices: list[HostDevice]) -> None:
    first, second = devices
    team, go_on = team_of(first), threading.Event()

    running = asyncio.ensure_future(first.run(lambda: go_on.wait(WAIT_S)))
    assert await asyncio.to_thread(team.has_help.wait, WAIT_S)
    assert await second.run(lambda: team.num_ended) == 1  # and not behind a helper that stays
    assert not team_of(second).has_help.is_set()  # the other one is not idle
    go_on.set()
    assert await running


async def test_a_device_that_paused_a_moment_ago_helps_nobody(
    devices: list[HostDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "IDLE_S", 3600.0)
    first, second = devices
    await second.run(lambda: None)
    await first.run(lambda: None)
    assert await second.run(lambda: team_of(first).num_ended) == 0


async def test_a_device_that_is_lost_or_closed_helps_no_more(devices: list[HostDevice]) -> None:
    first, second = devices
    team = team_of(first)

    def work() -> bool:
        return team.has_help.wait(WAIT_S)

    assert await first.run(work)
    second.abandon()
    second.close()
    assert not team.has_help.is_set()
    await first.run(lambda: None)
    assert not team.has_help.is_set()
