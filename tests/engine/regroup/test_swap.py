"""Swap: victims' KV goes to host memory and comes back, and nobody can tell; then the queue and the budget alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from crowd import PLENTY, CopyGate, make_crowd, make_request, read, read_all, serving, until
from structlog.testing import capture_logs

from kunserve.engine.blocks.block_pool import BlockPool
from kunserve.engine.engine import Engine
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group, Stage
from kunserve.engine.launch.launch import Served
from kunserve.engine.regroup.swap import CopyBudget, SwapMover
from kunserve.engine.request import Request
from kunserve.engine.schedule.swap_queue import SwapQueue
from kunserve.errors import DeviceError
from kunserve.policies import OverloadPolicy
from kunserve.sampling import FinishReason

SWAP = OverloadPolicy.SWAP
NO_PRICES: dict[str, Any] = {"microbatching": "tokens"}  # a model this tiny is sooner computed again than copied
LAYOUTS: dict[str, dict[str, Any]] = {
    "cpu:2": {"num_blocks": 40},
    "chain": {"num_blocks": 1, "pipeline_parallel_size": 2},
}


@asynccontextmanager
async def swapping(six_layers: Path, num_blocks: int = 40, **settings: Any) -> AsyncIterator[Served]:
    async with serving(six_layers, num_blocks, overload_policy=SWAP, **settings) as served:
        yield served
        assert not buffers(served.engine)


def buffers(engine: Engine) -> dict[str, Any]:
    assert isinstance(engine.mover, SwapMover)
    return engine.mover.buffers


_known: dict[int, dict[str, list[int]]] = {}  # what a crowd of a size gets with plenty of memory, once it was seen


async def uncontended(six_layers: Path, size: int = 16) -> dict[str, list[int]]:
    if size not in _known:
        async with serving(six_layers, 2 * PLENTY, "cpu:1", overload_policy=SWAP) as served:
            _known[size] = await read_all(served.engine, make_crowd(size))
            assert served.engine.scheduler.swapped.num_swaps == served.engine.scheduler.num_preemptions == 0
    return _known[size]


# --- in an engine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
async def test_tokens_are_those_of_a_run_with_plenty_of_memory(name: str, six_layers: Path) -> None:
    size = 28 if name == "chain" else 16
    expected = await uncontended(six_layers, size)
    async with swapping(six_layers, **LAYOUTS[name]) as served:
        engine = served.engine
        with capture_logs() as logs:
            assert await read_all(engine, make_crowd(size)) == expected
        assert engine.state()["requests"]["swaps"] > 3
        # Who has just been admitted has no KV that could be swapped: it waits again.
        assert not [entry for entry in logs if entry["event"] == "preempted" and entry["lost_tokens"] > 0]
        assert isinstance(engine.mover, SwapMover) and engine.mover.num_bytes > 0


async def test_without_room_on_the_host_victims_are_recomputed(six_layers: Path) -> None:
    expected = await uncontended(six_layers)
    async with swapping(six_layers, swap_space_bytes=20 * 1024 * 6) as served:  # 20 blocks of six layers
        engine = served.engine
        assert engine.scheduler.swapped.num_blocks == 20
        assert await read_all(engine, make_crowd()) == expected
        assert engine.scheduler.swapped.num_swaps > 0 and engine.scheduler.num_preemptions > 0
    async with swapping(six_layers, swap_space_bytes=0) as served:
        assert await read_all(served.engine, make_crowd()) == expected
        assert served.engine.scheduler.swapped.num_swaps == 0 and served.engine.scheduler.num_preemptions > 0


async def test_a_failed_copy_costs_a_recomputation_and_nothing_else(six_layers: Path) -> None:
    expected = await uncontended(six_layers)
    async with swapping(six_layers) as served:
        engine = served.engine
        gates = [CopyGate(memory.device) for memory in engine.memories]
        gates[0].open(DeviceError("the copy failed"))
        gates[1].open()
        assert await read_all(engine, make_crowd()) == expected
        assert gates[0].num_copies > 0 and gates[1].num_copies > 0
        assert engine.scheduler.num_preemptions == gates[0].num_copies  # of those that leave, and of those that return


async def test_who_leaves_while_being_copied_or_on_the_host_frees_everything(six_layers: Path) -> None:
    """One device, whose copies wait at a gate: four requests grow until some have to make way."""
    async with swapping(six_layers, devices="cpu:1") as served:
        engine, swapped = served.engine, served.engine.scheduler.swapped
        gate = CopyGate(engine.memories[0].device)
        requests = [make_request(f"r{i}", 30, 70) for i in range(4)]
        readers = [asyncio.create_task(read(engine, request)) for request in requests]
        await gate.reached.wait()
        (leaving,) = [r for r in requests if r.is_moving]
        assert leaving.group_id is not None and swapped.num_leaving(engine.groups[0]) > 0
        engine.abort(leaving.request_id)
        engine.check()  # it holds its blocks until the copy is done
        gate.open()
        await until(engine, lambda: leaving.group_id is None and not leaving.block_tables)
        assert leaving.request_id not in buffers(engine)

        await until(engine, lambda: len(swapped.ready) > 0)
        on_host = swapped.ready[0]
        assert on_host.request_id in buffers(engine)
        engine.abort(on_host.request_id)
        assert on_host not in swapped.ready and on_host.request_id not in buffers(engine)
        engine.check()
        await asyncio.gather(*readers)
        assert {r.request_id for r in requests if r.finish_reason is FinishReason.ABORT} == {
            leaving.request_id,
            on_host.request_id,
        }


async def test_who_leaves_while_coming_back_frees_everything(six_layers: Path) -> None:
    async with swapping(six_layers, devices="cpu:1") as served:
        engine = served.engine
        gate = CopyGate(engine.memories[0].device, lets_out=True)
        requests = [make_request(f"r{i}", 30, 70) for i in range(3)]
        readers = [asyncio.create_task(read(engine, request)) for request in requests]
        await gate.reached.wait()
        returning = next(move.request for move in engine.scheduler.swapped.moving.values() if not move.is_out)
        assert returning.is_moving and returning.block_tables
        engine.abort(returning.request_id)
        engine.check()
        gate.open()
        await until(engine, lambda: not returning.is_moving)
        await asyncio.gather(*readers)
        assert [r.request_id for r in requests if r.finish_reason is FinishReason.ABORT] == [returning.request_id]


async def test_stopping_in_the_middle_of_a_copy_frees_everything(six_layers: Path) -> None:
    async with swapping(six_layers, devices="cpu:1") as served:
        engine = served.engine
        gate = CopyGate(engine.memories[0].device)
        requests = [make_request(f"r{i}", 30, 70) for i in range(4)]
        readers = [asyncio.create_task(read(engine, request)) for request in requests]
        await gate.reached.wait()
        await engine.stop()
        results = await asyncio.gather(*readers, return_exceptions=True)
        assert all("the server is stopping" in str(result) for result in results)
        assert not any(request.is_moving for request in requests)
        assert engine.scheduler.swapped.num_free == engine.scheduler.swapped.num_blocks


async def test_who_is_on_the_host_comes_back_to_whatever_grouping_there_is(six_layers: Path) -> None:
    expected = await uncontended(six_layers)
    async with swapping(six_layers) as served:
        engine = served.engine
        readers = asyncio.create_task(read_all(engine, make_crowd()))
        await until(engine, lambda: len(engine.scheduler.swapped.ready) > 0)
        await served.control.drop()
        assert [len(group.stages) for group in engine.groups] == [2]
        assert await readers == expected


async def test_with_nothing_to_drop_kv_goes_to_the_host_and_hardly_any_is_computed_twice(six_layers: Path) -> None:
    """Who has to make way before anything of it is computed has nothing to copy, and starts over."""
    expected = await uncontended(six_layers)
    async with serving(six_layers, 40, "cpu:1", **NO_PRICES) as served:
        assert await read_all(served.engine, make_crowd()) == expected
        scheduler = served.engine.scheduler
        assert scheduler.swapped.num_swaps > 3 * scheduler.num_preemptions and not buffers(served.engine)


async def test_what_does_not_fit_after_a_drop_either_goes_to_the_host(six_layers: Path) -> None:
    expected = await uncontended(six_layers, 64)
    async with serving(six_layers, 40, **NO_PRICES) as served:
        engine, swapped = served.engine, served.engine.scheduler.swapped
        readers = asyncio.create_task(read_all(engine, make_crowd(64)))
        await until(engine, lambda: len(swapped.ready) > 0)
        await served.control.drop(is_forced=True)
        num_swaps = swapped.num_swaps
        assert await readers == expected
        assert swapped.num_swaps > num_swaps and not buffers(engine)


async def test_who_is_on_the_host_counts_as_waiting_for_blocks(six_layers: Path) -> None:
    async with serving(six_layers, 40, "cpu:1", **NO_PRICES) as served:
        engine, scheduler = served.engine, served.engine.scheduler
        readers = asyncio.create_task(read_all(engine, make_crowd()))
        await until(engine, lambda: len(scheduler.swapped.ready) > 0)
        on_host = list(scheduler.swapped.ready)
        assert list(scheduler.queued())[: len(on_host)] == on_host
        assert scheduler.num_waiting_tokens == sum(request.num_tokens for request in scheduler.queued())
        assert scheduler.waiting_of(None).num_tokens == scheduler.num_waiting_tokens
        in_groups = sum(group.num_used for group in engine.groups) / engine.groups[0].num_blocks
        assert served.control.demand_over_undropped() > max(1.0, in_groups)
        await readers


# --- the queue ------------------------------------------------------------------------------------------------------


def admitted(fleet: Fleet, group: Group, name: str, num_tokens: int, arrival_s: float = 0.0) -> Request:
    request = make_request(name, num_tokens, 9)
    request.arrival_s = arrival_s
    request.num_computed_tokens = request.num_scheduled_tokens = num_tokens
    fleet.admit(request, group)
    return request


def test_the_queue_keeps_to_its_space_and_to_the_order_of_arrival() -> None:
    group = Group(0, (Stage(0, 0, 4, BlockPool(16)),), 4)
    fleet = Fleet([group])
    queue = SwapQueue(fleet, 7)
    late, early = admitted(fleet, group, "late", 12, 2.0), admitted(fleet, group, "early", 9, 1.0)
    too_long, fresh = admitted(fleet, group, "too-long", 8), make_request("fresh", 4, 4)
    assert queue.begin_out(group, late) and queue.begin_out(group, early)
    assert (queue.num_free, queue.num_leaving(group), queue.num_swaps) == (1, 6, 2)
    assert not queue.begin_out(group, too_long) and not queue.begin_out(group, fresh)
    moves = queue.take_begun()
    assert [(m.request, m.num_blocks, m.is_out) for m in moves] == [(late, 3, True), (early, 3, True)]
    assert queue.take_begun() == []
    queue.check()
    for move in moves:
        fleet.release(move.request)
        queue.end(move, is_kept=True)
        queue.check()
    assert list(queue.ready) == [early, late] and queue.num_leaving(group) == 0
    queue.begin_in(group)
    assert early.is_moving and early.group_id == 0 and len(early.block_tables[0]) == 3
    (move,) = queue.take_begun()
    queue.end(move, is_kept=False)
    queue.remove(late)
    queue.remove(late)
    queue.check()
    assert queue.num_free == 7 and not early.is_moving


# --- the budget -----------------------------------------------------------------------------------------------------


def test_who_is_on_the_host_goes_back_by_priority() -> None:
    group = Group(0, (Stage(0, 0, 4, BlockPool(16)),), 4)
    fleet = Fleet([group])
    queue = SwapQueue(fleet, 16)
    requests = [admitted(fleet, group, name, 4, arrival_s) for name, arrival_s in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    for request, priority in zip(requests, (1, 1, 0), strict=True):
        request.priority = priority
        assert queue.begin_out(group, request)
    for move in reversed(queue.take_begun()):
        fleet.release(move.request)
        queue.end(move, is_kept=True)
    assert [request.request_id for request in queue.ready] == ["c", "a", "b"] and queue.head is requests[2]


def test_of_a_window_only_what_is_in_it_takes_space_on_the_host() -> None:
    group = Group(0, (Stage(0, 0, 4, BlockPool(64)),), 4)
    fleet = Fleet([group], window=16)
    queue = SwapQueue(fleet, 8)
    request = admitted(fleet, group, "long", 128)
    fleet.computed(request, group)
    assert request.num_blocks == 4 and queue.begin_out(group, request) and queue.num_free == 4
    [move] = queue.take_begun()
    assert (move.num_behind, move.num_blocks) == (28, 32)


def test_an_iteration_copies_what_fits_into_its_forward_time_and_at_least_one_layer() -> None:
    budget = CopyBudget()
    assert [budget.take(100, 9), budget.take(100, 9)] == [1, 0]  # nothing is measured yet
    budget.copied(1000, 0.001)  # a million bytes per second
    budget.stepped(0.0005)
    assert [budget.take(100, 3), budget.take(100, 9), budget.take(100, 9)] == [3, 2, 0]
    budget.stepped(0.0005)
    assert [budget.take(501, 9), budget.take(1, 9)] == [1, 0]  # larger than the budget: alone in its iteration


def test_measurements_are_smoothed() -> None:
    budget = CopyBudget()
    budget.copied(1000, 1.0)
    budget.copied(2000, 1.0)
    budget.stepped(1.0)
    assert budget.bytes_per_s == pytest.approx(1200) and budget.num_bytes_left == 1200
