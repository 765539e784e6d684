"""Weights leave and come back with each `--host-copy`: the same bits, and every byte from where it was said to come."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hooks import around_copies
from on_gpus import of_cpus_alone
from seeds import seeds
from structlog.testing import capture_logs
from tiny_models import make_tiny_model
from transition_harness import (
    Answer,
    Checked,
    Failures,
    again,
    answer_while,
    checked_engine,
    make_requests,
    on_host,
    regroup_forever,
    regroup_in_order,
)

from kunserve.errors import DeviceError
from kunserve.model.checkpoint import SafetensorsSource
from kunserve.model.hf_config import load_hf_config
from kunserve.model.host_copy import HostCopy

KINDS = [HostCopy.PINNED, HostCopy.MAPPED, HostCopy.NONE]
REQUESTS = make_requests(24, seed=3, longest_prompt=20, most_tokens=9)
SEEDS = seeds(8)


@pytest.fixture(scope="module")
def expected(six_layers: Path) -> list[Answer]:
    """What an undisturbed server answers."""

    async def ask() -> list[Answer]:
        async with checked_engine(six_layers, "cpu:1", 1280) as checked:
            return await checked.answer_all(again(REQUESTS))

    return asyncio.run(ask())


def unit_bytes(checked: Checked, device: int, units: Iterable[str]) -> int:
    """Bytes of the tensors of some units."""
    weights = checked.engine.memories[device].weights
    return sum(weights.tensor(unit, spec.name).nbytes for unit in units for spec in weights.specs(unit))


def total_bytes(checked: Checked) -> int:
    return unit_bytes(checked, 0, checked.engine.memories[0].weights.chunks_of_unit)


def sources(checked: Checked) -> dict[str, int]:
    """As `/kunserve/state` shows them."""
    shown: dict[str, int] = checked.engine.state()["weight_sources"]
    return shown


def assert_weights_are_the_files(checked: Checked, folder: Path) -> None:
    """What is present on any device has the bits that the checkpoint has in that dtype."""
    source = SafetensorsSource(folder, load_hf_config(folder))
    for memory in checked.engine.memories:
        assert not memory.weights.unfilled
        for unit in memory.weights.present:
            for spec in memory.weights.specs(unit):
                tensor = on_host(memory.weights.tensor(unit, spec.name))
                expected = torch.empty_like(tensor)
                source.copy_into(spec.name, expected)
                assert torch.equal(tensor, expected), (memory.device.name, spec.name)


async def drop(checked: Checked) -> dict[int, list[str]]:
    """Drop; returns the units that each device has lost."""
    before = [memory.weights.present for memory in checked.engine.memories]
    await checked.control.drop()
    await wait(checked)
    after = [memory.weights.present for memory in checked.engine.memories]
    return {i: [u for u in units if u not in after[i]] for i, units in enumerate(before)}


async def wait(checked: Checked) -> None:
    """Until no transition is under way; what happened stays on record."""
    while tasks := checked.control.tasks:
        await asyncio.wait(set(tasks))


# --- whatever happens, the same bits ----------------------------------------------------------------------------------


@pytest.mark.drawn
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("devices", ["cpu:2", "cpu:3"])
async def test_regrouping_changes_no_answer_and_no_weight(
    devices: str, kind: HostCopy, six_layers: Path, expected: list[Answer]
) -> None:
    async with checked_engine(six_layers, devices, 160, host_copy=kind) as checked:
        for seed in SEEDS:
            regroup = partial(regroup_in_order if seed % 2 else regroup_forever, checked, random.Random(seed))
            for answer, its in zip(await answer_while(checked, again(REQUESTS), regroup), expected, strict=True):
                answer.assert_same(its)
            await checked.undo_drops()
            assert_weights_are_the_files(checked, six_layers)
        assert checked.num_outcomes("drop", "done") > 0 and checked.num_outcomes("restore", "done") > 0


@pytest.mark.parametrize("kind", KINDS)
async def test_weights_are_converted_to_the_same_bits_wherever_they_come_from(kind: HostCopy, tmp_path: Path) -> None:
    folder = make_tiny_model("qwen3-tied", tmp_path, dtype=torch.bfloat16, num_hidden_layers=6)
    async with checked_engine(folder, "cpu:2", 160, host_copy=kind, dtype="float32") as checked:
        assert_weights_are_the_files(checked, folder)
        for _ in range(2):
            await drop(checked)
            await checked.undo_drops()
            assert_weights_are_the_files(checked, folder)


@pytest.mark.parametrize("kind", KINDS)
async def test_dummy_weights_come_back_too(kind: HostCopy, six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:2", 160, host_copy=kind, load_format="dummy") as checked:
        weights = [memory.weights for memory in checked.engine.memories]
        before = [[on_host(w.content(unit)) for unit in w.present] for w in weights]
        await drop(checked)
        await checked.undo_drops()
        for w, contents in zip(weights, before, strict=True):
            assert all(
                torch.equal(on_host(w.content(unit)), its) for unit, its in zip(w.present, contents, strict=True)
            )


@pytest.mark.parametrize("kind", ["drop", "restore"])
async def test_any_call_may_fail_without_a_host_copy(kind: str, six_layers: Path) -> None:
    """The first call of a transition fails, then the second, and so on: what comes back comes from whole copies."""
    async with checked_engine(six_layers, "cpu:2", 320, host_copy=HostCopy.NONE) as checked:
        failures, number, num_rolled_back = Failures(checked.engine), 0, 0
        while True:
            if kind == "restore":
                await drop(checked)
            epoch = checked.engine.epoch
            failures.arm(number)
            try:
                await getattr(checked.control, kind)()
            except (DeviceError, OSError):
                num_rolled_back += 1
            await checked.settled()
            is_over, is_old = not failures.failed, checked.engine.epoch == epoch
            failures.arm(None)
            assert_weights_are_the_files(checked, six_layers)
            assert is_old == (not is_over) or kind == "drop"  # a drop may fail after its commit
            await checked.undo_drops()
            assert_weights_are_the_files(checked, six_layers)
            if is_over:
                break
            number += 1
        assert num_rolled_back >= 10
        assert sources(checked)["disk"] == total_bytes(checked)  # of the launch alone: a mate had all that came back


# --- every byte from where it was said to come ------------------------------------------------------------------------


@pytest.mark.parametrize("devices", ["cpu:2", "cpu:3"])
async def test_without_a_host_copy_mates_have_all_that_comes_back(devices: str, six_layers: Path) -> None:
    async with checked_engine(six_layers, devices, 160, host_copy=HostCopy.NONE) as checked:
        num_devices, total, at_start = int(devices[-1]), total_bytes(checked), sources(checked)
        timed = checked.control.would_drop()
        sampled = sum(min(unit_bytes(checked, device, [unit]) for unit in units) for device, units in timed.items())
        assert at_start == {"host": 0, "mate": (num_devices - 1) * total + sampled, "disk": total}
        lost = await drop(checked)
        assert {device: units for device, units in lost.items() if units} == timed
        assert sources(checked) == at_start
        await checked.control.restore()
        await wait(checked)
        num_bytes = sum(unit_bytes(checked, device, units) for device, units in lost.items())
        dropped, restored = checked.reconfigure.transitions.remembered
        assert (dropped.weight_sources, restored.weight_sources) == ({}, {"mate": num_bytes})
        assert num_bytes > 0.9 * total
        assert sources(checked) == at_start | {"mate": at_start["mate"] + num_bytes}
        assert restored.state()["weight_sources"] == {"mate": num_bytes}


@pytest.mark.parametrize("kind", [HostCopy.PINNED, HostCopy.MAPPED])
async def test_with_a_host_copy_all_comes_from_it(kind: HostCopy, six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:2", 160, host_copy=kind) as checked:
        assert checked.engine.state()["host_copy"] == str(kind)
        before, lost = sources(checked), await drop(checked)
        await checked.control.restore()
        await wait(checked)
        num_bytes = sum(unit_bytes(checked, device, units) for device, units in lost.items())
        assert checked.reconfigure.transitions.remembered[-1].weight_sources == {"host": num_bytes}
        assert sources(checked) == {"host": before["host"] + num_bytes, "mate": 0, "disk": 0}


async def test_what_no_mate_has_whole_is_read_from_disk_and_only_once(six_layers: Path) -> None:
    """A device of the chain has lost the content of a unit: both read it again, one of them from the files."""
    async with checked_engine(six_layers, "cpu:2", 160, host_copy=HostCopy.NONE) as checked:
        lost, before = await drop(checked), sources(checked)
        weights = checked.engine.memories[1].weights
        in_doubt = next(unit for unit in lost[0] if unit in weights.present)
        weights.drop(in_doubt)
        weights.map(in_doubt)  # its chunks are back, their content is whatever was there
        await checked.control.restore()
        await wait(checked)
        doubted = unit_bytes(checked, 0, [in_doubt])
        num_bytes = sum(unit_bytes(checked, device, units) for device, units in lost.items())
        assert checked.reconfigure.transitions.remembered[-1].weight_sources == {"disk": doubted, "mate": num_bytes}
        assert sources(checked)["disk"] == before["disk"] + doubted
        assert_weights_are_the_files(checked, six_layers)
        checked.assert_idle()


async def test_a_restore_that_was_cancelled_is_done_again_from_mates(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:2", 160, host_copy=HostCopy.NONE) as checked:
        lost, before = await drop(checked), sources(checked)
        num_copies = 0

        async def cancel_after_two(copy: Callable[[], Awaitable[Any]]) -> Any:
            nonlocal num_copies
            num_copies += 1
            if num_copies == 2:
                checked.reconfigure.cancel_restore()
            return await copy()

        undo = around_copies(checked.engine.memories[0].device.inner, cancel_after_two)
        await checked.control.restore()
        await wait(checked)
        undo()
        cancelled = checked.reconfigure.transitions.remembered[-1]
        num_bytes = sum(unit_bytes(checked, i, units) for i, units in lost.items())
        assert cancelled.outcome == "cancelled" and 0 < cancelled.weight_sources["mate"] < num_bytes
        assert all(not checked.engine.memories[i].weights.is_filled(u) for i, units in lost.items() for u in units)
        await checked.control.restore()
        await wait(checked)
        assert checked.reconfigure.transitions.remembered[-1].weight_sources == {"mate": num_bytes}
        assert sources(checked)["disk"] == before["disk"]
        assert_weights_are_the_files(checked, six_layers)


# --- what the start says ----------------------------------------------------------------------------------------------


async def said_at_start(folder: Path, devices: str, **settings: Any) -> tuple[dict[str, Any], Checked]:
    with capture_logs() as lines:
        async with checked_engine(folder, devices, 160, **settings) as checked:
            pass
    (line,) = [line for line in lines if line["event"] == "host copy of the weights"]
    return dict(line), checked


@pytest.mark.parametrize("kind", KINDS)
async def test_the_start_says_what_is_kept_and_how_long_a_restore_takes(kind: HostCopy, six_layers: Path) -> None:
    said, checked = await said_at_start(six_layers, "cpu:2", host_copy=kind)
    assert (said["kind"], said["because"]) == (str(kind), f"--host-copy {kind}")
    assert said["restore_from"] == ["mate" if kind is HostCopy.NONE else "host"]
    assert said["restore_s"] > 0 and 0 < said["restore_bytes"] < 2 * total_bytes(checked)
    assert (said["host_bytes"] >= total_bytes(checked)) == (kind is HostCopy.PINNED)
    assert said["host_bytes"] == 0 or kind is HostCopy.PINNED
    files = (six_layers / "model.safetensors").stat().st_size
    assert said["mapped_bytes"] == (files if kind is HostCopy.MAPPED else 0)


@of_cpus_alone("GPUs have pinned memory if the machine has room for it")
async def test_the_start_says_why_when_it_chose(six_layers: Path) -> None:
    said, _ = await said_at_start(six_layers, "cpu:2")
    assert (said["kind"], said["because"]) == ("mapped", "CPU devices have no use for pinned memory")


async def test_nothing_is_timed_where_nothing_can_be_dropped(six_layers: Path) -> None:
    said, checked = await said_at_start(six_layers, "cpu:1", host_copy=HostCopy.NONE)
    assert (said["restore_s"], said["restore_bytes"], said["restore_from"]) == (None, 0, [])
    assert checked.control.reconfigure.loader.num_bytes == {"disk": total_bytes(checked)}
