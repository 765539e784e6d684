"""Faults that are injected on purpose: how they are written, when they are due, and what each does to a device."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import torch

from kunserve.command.arguments import make_parser, parse_args
from kunserve.config import EngineConfig, parse_devices
from kunserve.engine.launch import faults as faults_module
from kunserve.engine.launch.faults import Faults, FaultyDevice
from kunserve.engine.launch.host_machine import HostMachine
from kunserve.engine.launch.placement import model_shape
from kunserve.errors import ConfigError, DeviceError, DeviceLostError
from kunserve.faults import PHASES, Fault, FaultKind, parse_faults
from kunserve.gpu.copies import BlockCopy
from kunserve.gpu.device import Device
from kunserve.gpu.host import HostDevice
from kunserve.gpu.kv_memory import KVShape
from kunserve.model.config import ModelConfig

CHUNK = 1 << 16
MODEL = ModelConfig("llama", 64, 16, 32, 2, 2, 1, 8, 64)
COPIES = ("run_copy", "copy", "copy_tensor")
Open = Callable[[str], tuple[FaultyDevice, Faults]]


@pytest.fixture
def open_faulty() -> Iterator[Open]:
    """Open device 1 with the faults that a text says; the first request is there."""
    opened: list[FaultyDevice] = []

    def open_one(text: str) -> tuple[FaultyDevice, Faults]:
        faults = Faults(parse_faults(text))
        device = faults.wrap(1, HostDevice(81, 4, CHUNK))
        assert isinstance(device, FaultyDevice)
        opened.append(device)
        faults.begin()
        return device, faults

    yield open_one
    for device in opened:
        device.close()


def queued(device: Device, work: Callable[[], Any] = lambda: None) -> dict[str, Callable[[], Awaitable[Any]]]:
    """All ways to give a device something to do; `work`, if the way takes any."""
    tensor = torch.zeros(2, 4)
    return {
        "run": lambda: device.run(work),
        "run_copy": lambda: device.run_copy(work),
        "copy": lambda: device.copy([BlockCopy(tensor, [0], tensor, [1])]),
        "copy_tensor": lambda: device.copy_tensor(tensor[0], tensor[1], device),
    }


class FakeTime:
    """As much of the module `time` as there is to fake."""

    def __init__(self, monotonic: Callable[[], float], sleep: Callable[[float], None] = time.sleep) -> None:
        self.monotonic, self.sleep = monotonic, sleep


# --- how they are written -------------------------------------------------------------------------------------------


def test_faults_are_read_as_they_are_written() -> None:
    assert parse_faults("1:lost@5s, 2:hang@drop.remap,0:hang-then-return@0.5s") == (
        Fault(1, FaultKind.LOST, 5.0),
        Fault(2, FaultKind.HANG, "drop.remap"),
        Fault(0, FaultKind.HANG_THEN_RETURN, 0.5),
    )
    for kind in FaultKind:
        for when in (*PHASES, "5s", "0.5s"):
            (fault,) = parse_faults(f"3:{kind}@{when}")
            assert str(fault) == f"3:{kind}@{when}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a fault: '' (write DEVICE:FAULT@WHEN, for instance 1:lost@5s)"),
        ("1:lost@5s,", "not a fault: ''"),
        ("1:lost", "not a fault: '1:lost'"),
        ("lost@5s", "not a fault: 'lost@5s'"),
        ("-1:lost@5s", "not a fault: '-1:lost@5s'"),
        ("cpu:1:lost@5s", "not a fault: 'cpu:1:lost@5s'"),
        ("1:dead@5s", "no such fault: 'dead' in '1:dead@5s' (possible are raise, raise-always, hang, "),
        ("1:lost@5", "no such moment: '5' in '1:lost@5' (possible are seconds, for instance 5s, and drop.boundary, "),
        ("1:lost@-5s", "no such moment: '-5s'"),
        ("1:lost@drop", "no such moment: 'drop'"),
        ("0:hang@1s,1:lost@drop.load", "no such moment: 'drop.load' in '1:lost@drop.load'"),
    ],
)
def test_what_is_no_fault_is_told(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_faults(text)
    assert str(caught.value).startswith(message)


def test_the_flag_becomes_faults_of_the_engine() -> None:
    def faults(text: str) -> tuple[Fault, ...]:
        return parse_args(["m", *text.split()]).engine.faults

    assert faults("") == faults("--devices cuda") == ()
    assert faults("--devices cpu:2 --inject-faults 1:lost@5s") == (Fault(1, FaultKind.LOST, 5.0),)
    for devices in ("auto", "cuda", "cuda:0*2"):
        with pytest.raises(ConfigError, match=r"^--inject-faults is for CPU devices: give --devices cpu:N$"):
            faults(f"--devices {devices} --inject-faults 1:lost@5s")
    with pytest.raises(ConfigError, match=r"^--inject-faults 2:lost@5s: no such device; --devices cpu:2 are 0 to 1$"):
        faults("--devices cpu:2 --inject-faults 1:hang@1s,2:lost@5s")


def test_a_wrong_flag_ends_with_a_line_and_help_does_not_show_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["m", "--inject-faults", "1:dead@5s"])
    assert "argument --inject-faults: no such fault: 'dead' in '1:dead@5s' (possible are" in capsys.readouterr().err
    assert "inject" not in make_parser("kunserve").format_help()


# --- when they are due ----------------------------------------------------------------------------------------------


def test_seconds_are_counted_from_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(faults_module, "time", FakeTime(lambda: now_s))
    fault = Fault(1, FaultKind.LOST, 5.0)
    faults = Faults([fault])
    assert not faults.is_due(fault)
    faults.begin()
    now_s = 104.0
    faults.begin()  # of the second request
    assert not faults.is_due(fault)
    now_s = 105.0
    assert faults.is_due(fault)


def test_work_of_a_transition_is_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator may drop before the first request: the clock does not run then."""
    now_s = 100.0
    monkeypatch.setattr(faults_module, "time", FakeTime(lambda: now_s))
    fault = Fault(1, FaultKind.LOST, 5.0)
    faults = Faults([fault], phases=lambda: phases)
    phases = ["drop.remap"]
    faults.begin()
    now_s = 110.0
    assert not faults.is_due(fault)
    phases = []
    faults.begin()
    now_s = 115.0
    assert faults.is_due(fault)


def test_a_phase_is_one_of_a_transition() -> None:
    remap, exchange = Fault(1, FaultKind.LOST, "drop.remap"), Fault(1, FaultKind.LOST, "exchange")
    faults = Faults([remap, exchange])
    assert not faults.is_due(remap) and not faults.is_due(exchange)
    for phases, due in (
        (["restore.remap"], [False, False]),
        (["restore.load", "drop.remap"], [True, False]),
        (["restore.exchange"], [False, True]),
        (["drop.exchange"], [False, True]),
    ):
        faults.phases = lambda phases=phases: phases  # type: ignore[misc]
        assert [faults.is_due(remap), faults.is_due(exchange)] == due


async def test_what_was_due_once_stays_so(open_faulty: Open) -> None:
    device, faults = open_faulty("1:raise-always@drop.remap,1:raise@1000s")
    assert await device.run(lambda: 7) == 7
    faults.phases = lambda: ["drop.remap"]
    with pytest.raises(RuntimeError):
        await device.run(lambda: 7)
    faults.phases = lambda: ()
    with pytest.raises(RuntimeError):
        await device.run(lambda: 7)


def test_without_any_faults_a_device_stays_as_it_is(open_faulty: Open) -> None:
    device, _ = open_faulty("1:lost@1000s")
    assert Faults().wrap(0, device.inner) is device.inner


async def test_the_first_step_on_any_device_starts_the_clock(open_faulty: Open) -> None:
    inner, faults = open_faulty("1:lost@1000s")[0].inner, Faults(parse_faults("1:lost@0s"))
    device, other = faults.wrap(1, inner), faults.wrap(0, inner)
    assert await device.run_copy(lambda: 7) == 7
    assert await other.run(lambda: 7) == 7
    with pytest.raises(DeviceLostError):
        await device.run(lambda: 7)


# --- what they do ---------------------------------------------------------------------------------------------------


async def test_a_device_is_as_usual_until_then(open_faulty: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    device, _ = open_faulty(",".join(f"1:{kind}@1000s" for kind in FaultKind))
    inner = device.inner
    assert (device.name, device.chunk_bytes, device.num_chunks) == ("cpu:81", CHUNK, 4)
    assert device.torch_device == inner.torch_device
    address = device.reserve(2 * CHUNK)
    device.map(address, [3, 1])
    device.tensor(address, 2 * CHUNK).fill_(5)
    device.unmap(address, 1)
    assert inner.tensor(address, 2 * CHUNK)[CHUNK] == 5
    device.release(address, 2 * CHUNK)
    assert await device.run(lambda: threading.current_thread().name) == "cpu:81-compute"
    assert await device.run_copy(lambda: threading.current_thread().name) == "cpu:81-copy"
    read, write = torch.ones(2, 4), torch.zeros(2, 4)
    await device.copy([BlockCopy(read, [0], write, [1])], device)
    assert write.tolist() == [[0.0] * 4, [1.0] * 4]
    await device.copy_tensor(read, write, device)
    assert write.tolist() == read.tolist()
    calls: list[str] = []
    monkeypatch.setattr(inner, "abandon", lambda: calls.append("abandon"))
    device.abandon()
    assert calls == ["abandon"] and device.is_lost


async def test_work_fails_once_before_it_begins(open_faulty: Open) -> None:
    device, _ = open_faulty("1:raise@0s")
    done: list[str] = []
    for name in COPIES:
        await queued(device)[name]()
    with pytest.raises(RuntimeError, match=r"^cpu:81: work failed"):
        await device.run(lambda: done.append("first"))
    await device.run(lambda: done.append("second"))
    assert done == ["second"]


@pytest.mark.parametrize("name", ["run", *COPIES])
async def test_all_work_fails(name: str, open_faulty: Open) -> None:
    device, _ = open_faulty("1:raise-always@0s")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="an injected fault"):
            await queued(device)[name]()


async def test_only_copies_fail(open_faulty: Open) -> None:
    device, _ = open_faulty("1:copy-fails@0s")
    assert await device.run(lambda: 7) == 7
    for name in COPIES * 2:
        with pytest.raises(DeviceError, match=r"^cpu:81: a copy failed"):
            await queued(device)[name]()


async def test_only_mapping_fails_on_any_thread(open_faulty: Open) -> None:
    device, _ = open_faulty("1:map-fails@0s")
    address = device.reserve(CHUNK)
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"^cpu:81: map failed"):
            await device.run(lambda: device.map(address, [0]))
    device.inner.map(address, [0])
    device.unmap(address, 1)


async def test_nothing_is_left_of_a_lost_device(open_faulty: Open) -> None:
    device, faults = open_faulty("1:lost@drop.exchange")
    address = device.reserve(CHUNK)
    device.map(address, [0])
    faults.phases = lambda: ["drop.exchange"]
    calls: list[Callable[[], object]] = [
        lambda: device.reserve(CHUNK),
        lambda: device.map(address, [1]),
        lambda: device.unmap(address, 1),
        lambda: device.tensor(address, CHUNK),
        lambda: device.release(address, CHUNK),
    ]
    for call in calls:
        with pytest.raises(DeviceLostError, match=r"^cpu:81 is lost"):
            call()
    for submit in queued(device).values():
        with pytest.raises(DeviceLostError, match=r"^cpu:81 is lost"):
            await submit()
    device.close()


async def test_a_slow_device_sleeps_after_its_work(open_faulty: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, slept = 100.0, list[float]()

    def work() -> int:
        nonlocal now_s
        now_s += 0.25
        return 7

    device, faults = open_faulty("1:slow@drop.remap")
    faults.phases = lambda: ["drop.remap"]
    monkeypatch.setattr(faults_module, "time", FakeTime(lambda: now_s, slept.append))
    assert await device.run(work) == 7 and slept == [2.5]
    assert await device.run_copy(work) == 7 and slept == [2.5]


@pytest.mark.parametrize("name", ["run", *COPIES])
@pytest.mark.parametrize("kind", [FaultKind.HANG, FaultKind.HANG_THEN_RETURN])
async def test_what_hangs_holds_up_all_that_comes_behind_it(
    kind: FaultKind, name: str, open_faulty: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults_module, "HANG_S", 1000.0)  # no test waits for that
    device, faults = open_faulty(f"1:{kind}@0s")
    order: list[str] = []
    first = asyncio.ensure_future(queued(device, lambda: order.append("work"))[name]())
    await asyncio.sleep(0)  # it is in the queue
    behind = "run" if name == "run" else "run_copy"
    second = asyncio.ensure_future(queued(device.inner, lambda: order.append("behind"))[behind]())
    done, _ = await asyncio.wait([first, second], timeout=0.05)
    assert not done
    order.append("released")
    faults.release()
    await asyncio.gather(first, second)
    assert order[0] == "released" and order[-1] == "behind"
    for submit in queued(device).values():
        await submit()  # nothing hangs any more


@pytest.mark.parametrize("kind", [FaultKind.HANG, FaultKind.HANG_THEN_RETURN])
async def test_both_queues_hang(kind: FaultKind, open_faulty: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults_module, "HANG_S", 1000.0)
    device, faults = open_faulty(f"1:{kind}@0s")
    hanging = [asyncio.ensure_future(queued(device)["run"]())]
    while kind is FaultKind.HANG_THEN_RETURN and not device.hang_ends_s:  # until the first one hangs
        await asyncio.sleep(0.001)
    hanging += [asyncio.ensure_future(queued(device)[name]()) for name in ("run", *COPIES)]
    done, _ = await asyncio.wait(hanging, timeout=0.05)
    assert not done
    faults.release()
    await asyncio.gather(*hanging)


async def test_a_hang_ends_by_itself_once(open_faulty: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults_module, "HANG_S", 0.01)
    device, _ = open_faulty("1:hang-then-return@0s")
    assert await device.run(lambda: 7) == 7
    monkeypatch.setattr(faults_module, "HANG_S", 1000.0)
    for submit in queued(device).values():
        await submit()


async def test_closing_ends_what_hangs(open_faulty: Open) -> None:
    device, _ = open_faulty("1:hang@0s")
    hanging = asyncio.ensure_future(device.run(lambda: 7))
    await asyncio.sleep(0)
    await asyncio.to_thread(device.close)
    assert await hanging == 7


async def test_one_device_that_is_closed_leaves_the_others_hanging(open_faulty: Open) -> None:
    device, faults = open_faulty("1:hang@0s,2:hang@0s")
    other = faults.wrap(2, HostDevice(82, 4, CHUNK))
    hanging = asyncio.ensure_future(device.run(lambda: 7))
    await asyncio.sleep(0)
    other.close()
    done, _ = await asyncio.wait([hanging], timeout=0.05)
    assert not done
    faults.release()
    assert await hanging == 7


# --- on a machine ---------------------------------------------------------------------------------------------------


async def test_a_machine_opens_devices_with_their_faults_and_closes_them() -> None:
    config = EngineConfig(
        "m",
        devices=parse_devices("cpu:2"),
        num_blocks_override=4,
        chunk_bytes=CHUNK,
        faults=parse_faults("1:hang@exchange"),
    )
    machine = HostMachine(MODEL, config)
    machine.views(model_shape(MODEL, KVShape.of(MODEL, 16, machine.dtype), CHUNK, shares_head=True))
    healthy, faulty = machine.open()
    assert isinstance(healthy, FaultyDevice) and isinstance(faulty, FaultyDevice)
    machine.faults.phases = lambda: ["drop.exchange"]
    hanging = asyncio.ensure_future(faulty.run(lambda: 7))
    await asyncio.sleep(0)
    machine.faults.release()
    await asyncio.to_thread(machine.close)
    assert await hanging == 7 and not machine.stuck()
