"""A device dies, hangs or lies, in whatever the server is at: every stream still ends with exactly its tokens."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from crowd import make_request
from loaded_groups import assert_same, loaded
from transition_harness import Answer, Checked, again, checked_engine, make_requests, patient_with_sound_devices

from kunserve.engine.request import Request
from kunserve.errors import ConflictError, EngineError, KunServeError
from kunserve.faults import Fault, FaultKind, parse_faults
from kunserve.policies import OverloadPolicy

NUM_BLOCKS = 320
REQUESTS = make_requests(14, seed=8, longest_prompt=40, most_tokens=40)
AFTER = slice(None, None, 4)  # those of them that are asked for once more when all is over
BY_LAYER = [make_request(f"r{i}", 104, 22, 0.8 * (i % 2)) for i in range(16)]  # four fill all blocks of a device
SWAPPED = [make_request(f"r{i}", 5 + i, 60, 0.8 * (i % 2)) for i in range(16)]
TIMEOUT_S = 0.6  # after which a device that ends nothing is lost
SILENT = (FaultKind.HANG, FaultKind.HANG_THEN_RETURN, FaultKind.SLOW)
LAYOUTS = {"cpu:2": "cpu:2", "cpu:3": "cpu:3", "cpu:4": "cpu:4", "chain of 2": "cpu:2", "chain of 3": "cpu:3"}


def undisturbed(folder: Path, requests: Sequence[Request]) -> list[Answer]:
    async def main() -> list[Answer]:
        async with checked_engine(folder, "cpu:1", 600) as checked:
            return await checked.answer_all(again(requests))

    return asyncio.run(main())


@pytest.fixture(scope="module")
def expected(six_layers: Path) -> list[Answer]:
    return undisturbed(six_layers, REQUESTS)


@pytest.fixture(scope="module")
def expected_by_layer(six_layers: Path) -> list[Answer]:
    return undisturbed(six_layers, BY_LAYER)


@pytest.fixture(scope="module")
def expected_swapped(six_layers: Path) -> list[Answer]:
    return undisturbed(six_layers, SWAPPED)


@asynccontextmanager
async def faulty_engine(folder: Path, layout: str, faults: Sequence[Fault], **settings: Any) -> AsyncIterator[Checked]:
    """A checked engine, in this layout, with faults; what hangs goes on at the end."""
    settings = {"num_blocks": NUM_BLOCKS, "device_timeout_s": TIMEOUT_S} | settings
    silent = {fault.device for fault in faults if fault.kind in SILENT}
    with patient_with_sound_devices(lambda device: int(re.split("[:.]", device.name)[-1]) in silent):
        async with checked_engine(folder, LAYOUTS.get(layout, layout), faults=faults, **settings) as checked:
            try:
                while layout.startswith("chain") and len(checked.engine.groups) > 1:
                    await checked.control.drop(is_forced=True)
                    await checked.settled()
                yield checked
            finally:
                machine: Any = checked.machine
                machine.faults.release()


async def answers_with(
    folder: Path, layout: str, faults: str, disturb: Callable[[Checked], Awaitable[None]] | None = None
) -> tuple[list[Answer], dict[int, str], list[str]]:
    """What is answered, the states of devices that are not ok then, and the transitions."""
    async with faulty_engine(folder, layout, parse_faults(faults)) as checked:
        answering = asyncio.ensure_future(checked.answer_all(again(REQUESTS)))
        if disturb is not None:
            await checked.commits(6)
            with suppress(KunServeError, OSError, RuntimeError):
                await disturb(checked)
        answers = await answering
        await checked.rebuilt()
        checked.assert_idle(check_chunks="map-fails" not in faults)
        machine: Any = checked.machine
        machine.faults.release()  # what comes back now changes nothing
        answers += await checked.answer_all(again(REQUESTS[AFTER]))
        await checked.rebuilt()
        checked.assert_idle(check_chunks="map-fails" not in faults)
        states = {i: device["state"] for i, device in enumerate(checked.engine.state()["devices"])}
        kinds = [f"{t.kind} {t.outcome}" for t in checked.reconfigure.transitions.remembered]
        return answers, {i: state for i, state in states.items() if state != "ok"}, kinds


def some(cases: Iterable[tuple[int, Any]]) -> list[Any]:
    """Every fourth case by the sum of its places, so that each pair is there; all by `make test-faults`."""
    return [case for place, case in cases if place % 4 == 0 or os.environ.get("KUNSERVE_ALL_FAULTS")]


@pytest.mark.parametrize(
    ("layout", "kind", "device"),
    some(
        (2 * (i + j), (layout, kind, (i + j) % 2))
        for i, layout in enumerate(LAYOUTS)
        for j, kind in enumerate(FaultKind)
    ),
)
async def test_a_device_fails_in_a_step(
    layout: str, kind: FaultKind, device: int, six_layers: Path, expected: list[Answer]
) -> None:
    answers, bad, transitions = await answers_with(six_layers, layout, f"{device}:{kind}@0.05s")
    assert_same(answers, [*expected, *expected[AFTER]])
    assert set(bad) <= {device}
    if kind in (FaultKind.LOST, FaultKind.HANG) or (kind is FaultKind.RAISE_ALWAYS and "chain" in layout):
        assert bad == {device: "lost"} and "lose done" in transitions
    elif kind in (FaultKind.RAISE, FaultKind.COPY_FAILS, FaultKind.MAP_FAILS):  # a step copies and maps nothing
        assert not bad


async def drop(checked: Checked) -> None:
    """All groups become one, as far as they can."""
    while len(checked.engine.groups) > 1:
        await checked.control.drop(is_forced=True)
        await checked.settled()


async def drop_and_restore(checked: Checked) -> None:
    """As `drop`, and back, while requests run."""
    await drop(checked)
    while any(group.lineage and group.lineage.merged_from for group in checked.engine.groups):
        try:
            await checked.control.restore()
        except ConflictError:
            if not checked.engine.live:  # no step would ever come
                break
            await checked.commits(1)
        await checked.settled()


PHASES = [
    *((phase, drop) for phase in ("drop.boundary", "drop.remap", "exchange")),
    *(
        (phase, drop_and_restore)
        for phase in ("restore.shrink", "restore.remap", "restore.load", "restore.split", "restore.exchange")
    ),
]


TRANSITION_CASES = some(
    (i + j + k, (devices, kind, *phase, (i + j + k // 4) % (i + 2)))  # the first of a chain, the last, one within
    for i, devices in enumerate(["cpu:2", "cpu:3", "cpu:4"])
    for j, kind in enumerate(FaultKind)
    for k, phase in enumerate(PHASES)
)


@pytest.mark.parametrize(("devices", "kind", "phase", "disturb", "device"), TRANSITION_CASES)
async def test_a_device_fails_in_a_transition(
    devices: str,
    kind: FaultKind,
    phase: str,
    disturb: Callable[[Checked], Awaitable[None]],
    device: int,
    six_layers: Path,
    expected: list[Answer],
) -> None:
    answers, bad, _ = await answers_with(six_layers, devices, f"{device}:{kind}@{phase}", disturb)
    assert_same(answers, [*expected, *expected[AFTER]])
    assert set(bad) <= {device}


@pytest.mark.parametrize(
    ("num_devices", "kind"),
    [(2, kind) for kind in FaultKind]
    + some((2 * (i + j), (i, kind)) for i in (3, 4) for j, kind in enumerate(FaultKind)),
)
async def test_a_device_fails_while_kv_goes_by_layer(
    num_devices: int, kind: FaultKind, six_layers: Path, expected_by_layer: list[Answer]
) -> None:
    settings = {"num_blocks": 128, "max_num_batched_tokens": 512}
    async with faulty_engine(
        six_layers, f"cpu:{num_devices}", parse_faults(f"1:{kind}@exchange"), **settings
    ) as checked:
        answering = await loaded(checked, again(BY_LAYER[: 4 * num_devices]))
        with suppress(KunServeError, OSError, RuntimeError):
            await drop(checked)
        assert_same(await answering, expected_by_layer[: 4 * num_devices])
        await checked.rebuilt()
        checked.assert_idle(check_chunks=kind is not FaultKind.MAP_FAILS)
        await checked.settled()
        assert ("drop", "by_layer") in {(kind, mode) for kind, _, mode in checked.outcomes}


@pytest.mark.parametrize(
    ("layout", "kind"),
    some(
        (2 * (i + j), (layout, kind))
        for i, layout in enumerate(["cpu:2", "cpu:3", "cpu:4"])
        for j, kind in enumerate(FaultKind)
    ),
)
async def test_a_device_fails_while_requests_are_swapped(
    layout: str, kind: FaultKind, six_layers: Path, expected_swapped: list[Answer]
) -> None:
    settings: dict[str, Any] = {"num_blocks": 32, "overload_policy": OverloadPolicy.SWAP}
    async with faulty_engine(six_layers, layout, [Fault(1, kind, "swap")], **settings) as checked:
        engine, machine = checked.engine, cast(Any, checked.machine)
        assert engine.mover is not None
        is_busy = engine.mover.is_busy
        machine.faults.phases = lambda: {"swap"} if is_busy(engine.groups) else set()
        assert_same(await checked.answer_all(again(SWAPPED)), expected_swapped)
        await checked.rebuilt()
        assert engine.scheduler.swapped.num_swaps > 0
        checked.assert_idle()


async def test_the_last_device_ends_the_engine(six_layers: Path) -> None:
    async with faulty_engine(six_layers, "cpu:2", parse_faults("0:lost@0.05s,1:hang@0.05s")) as checked:
        answers = await checked.answer_all(again(REQUESTS))
        await checked.engine.wait()
        assert all(answer.finish is not None or isinstance(answer.error, EngineError) for answer in answers)
        assert any(answer.error for answer in answers) and checked.engine.health() == "the engine has stopped"
