"""Devices that can make no group by themselves join one that goes on, and nobody's stream notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from loaded_groups import assert_same
from on_gpus import RESTARTED, of_cpus_alone
from transition_harness import TINY, Answer, Checked, again, checked_engine, make_requests

from kunserve.model.host_copy import HostCopy

REQUESTS = make_requests(6, seed=3, longest_prompt=20, most_tokens=40)
MEMORY_BYTES = 15 * TINY["chunk_bytes"]  # of a device: the weights take 16 chunks


@pytest.fixture(scope="module")
def expected(six_layers: Path) -> list[Answer]:
    async def main() -> list[Answer]:
        async with checked_engine(six_layers, "cpu:1", 600) as checked:
            return await checked.answer_all(again(REQUESTS))

    return asyncio.run(main())


@asynccontextmanager
async def chains_of_two(folder: Path, num_devices: int = 4, **settings: Any) -> AsyncIterator[Checked]:
    """Chains of two devices; none holds the weights alone."""
    settings |= {"num_blocks_override": None, "device_memory_bytes": MEMORY_BYTES}
    async with checked_engine(folder, f"cpu:{num_devices}", 0, **settings) as checked:
        yield checked


def lose(checked: Checked, *devices: int) -> None:
    for device in devices:
        checked.engine.device_health.lose(device, "the test says so")


def members(checked: Checked) -> list[list[int]]:
    """Return the devices of each group, in the order of its chain."""
    return [[stage.device for stage in group.stages] for group in checked.engine.groups]


async def loading(checked: Checked, kind: str = "add") -> None:
    """Wait until a transition loads weights."""
    while f"{kind}.load" not in checked.reconfigure.transitions.phases:
        await asyncio.sleep(0.002)


def slow_loads(checked: Checked) -> None:
    load: Callable[..., Any] = checked.reconfigure.loader.load

    async def slowly(*arguments: Any) -> None:
        await asyncio.sleep(0.05)
        await load(*arguments)

    checked.reconfigure.loader.load = slowly  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("host_copy", [HostCopy.MAPPED, HostCopy.NONE])
async def test_what_is_left_of_a_chain_joins_another(
    host_copy: HostCopy, six_layers: Path, expected: list[Answer]
) -> None:
    async with chains_of_two(six_layers, host_copy=host_copy) as checked:
        assert members(checked) == [[0, 1], [2, 3]]
        asked = again(REQUESTS)
        answering = asyncio.ensure_future(checked.answer_all(asked))
        await checked.commits(6)
        stay = [request for request in checked.engine.groups[0].running if request.finish_reason is None]
        before = checked.engine.groups[0].num_blocks
        lose(checked, 3)
        assert_same(await answering, expected)
        await checked.rebuilt()
        [chain] = checked.engine.groups
        assert members(checked) == [[0, 2, 1]] and chain.num_blocks > before
        assert stay and not any(request.num_preemptions for request in stay)  # their KV followed its layers
        assert [t.kind for t in checked.reconfigure.transitions.remembered] == ["lose", "add"]
        checked.assert_idle()
        assert_same(await checked.answer_all(again(REQUESTS)), expected)


@of_cpus_alone(RESTARTED)
async def test_the_pairs_are_back_once_the_lost_one_is(six_layers: Path, expected: list[Answer]) -> None:
    async with chains_of_two(six_layers) as checked:
        lose(checked, 3)
        await checked.rebuilt()
        assert members(checked) == [[0, 2, 1]]
        await checked.engine.add_device(3)
        await checked.rebuilt()
        assert [sorted(devices) for devices in members(checked)] == [[0, 1, 2, 3]]
        answering = asyncio.ensure_future(checked.answer_all(again(REQUESTS)))
        await checked.commits(6)
        await checked.engine.restore()
        assert_same(await answering, expected)
        await checked.rebuilt()
        assert [len(devices) for devices in members(checked)] == [2, 2]
        checked.assert_idle()
        assert_same(await checked.answer_all(again(REQUESTS)), expected)


async def test_two_that_are_left_of_three_join_together(six_layers: Path, expected: list[Answer]) -> None:
    settings = {"num_blocks_override": None, "device_memory_bytes": 9 * TINY["chunk_bytes"]}
    async with checked_engine(six_layers, "cpu:6", 0, pipeline_parallel_size=3, **settings) as checked:
        answering = asyncio.ensure_future(checked.answer_all(again(REQUESTS)))
        await checked.commits(4)
        before = checked.engine.groups[0].num_blocks
        lose(checked, 4)
        assert_same(await answering, expected)
        await checked.rebuilt()
        assert [sorted(devices) for devices in members(checked)] == [[0, 1, 2, 3, 5]]
        assert checked.engine.groups[0].num_blocks > before
        checked.assert_idle()


@pytest.mark.parametrize("lost", [0, 1, 2])
async def test_one_more_is_lost_while_it_loads(lost: int, six_layers: Path, expected: list[Answer]) -> None:
    async with chains_of_two(six_layers) as checked:
        slow_loads(checked)
        answering = asyncio.ensure_future(checked.answer_all(again(REQUESTS)))
        await checked.commits(4)
        lose(checked, 3)
        await loading(checked)
        lose(checked, lost)
        assert_same(await answering, expected)
        await checked.rebuilt()
        assert [sorted(devices) for devices in members(checked)] == [sorted({0, 1, 2} - {lost})]
        checked.assert_idle()


async def test_who_cannot_load_stays_idle(six_layers: Path, expected: list[Answer]) -> None:
    async with chains_of_two(six_layers) as checked:
        loader = checked.reconfigure.loader
        load: Callable[..., Any] = loader.load

        async def fail(*_: Any) -> None:
            raise OSError("the disk is gone")

        loader.load = fail  # type: ignore[method-assign,assignment]
        lose(checked, 3)
        await checked.rebuilt()
        assert members(checked) == [[0, 1]]
        assert_same(await checked.answer_all(again(REQUESTS)), expected)
        checked.assert_idle()
        loader.load = load  # type: ignore[method-assign]
        await checked.engine.add_device(2)
        await checked.rebuilt()
        assert members(checked) == [[0, 2, 1]]


@of_cpus_alone(RESTARTED)
async def test_nobody_ends_while_the_only_group_waits_to_be_replaced(six_layers: Path, expected: list[Answer]) -> None:
    async with chains_of_two(six_layers) as checked:
        lose(checked, 3)
        await checked.rebuilt()
        remap: Any = checked.control.membership.remap
        load = remap.load

        async def load_and_lose(*arguments: Any) -> int:
            remap.load = load
            lose(checked, 0)
            bytes_loaded: int = await load(*arguments)
            return bytes_loaded

        remap.load = load_and_lose
        answering = asyncio.ensure_future(checked.answer_all(again(REQUESTS)))
        await checked.commits(2)
        await checked.engine.add_device(3)
        assert_same(await answering, expected)
        await checked.rebuilt()
        assert sorted(device for devices in members(checked) for device in devices) == [1, 2, 3]
        checked.assert_idle()
