"""Migrate: running requests move from a loaded group to a free one while they run, and nobody can tell."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from crowd import PLENTY, CopyGate, make_crowd, make_request, read, read_all, serving, until
from transition_harness import next_round

from kunserve.engine.engine import Engine
from kunserve.engine.launch.launch import Served
from kunserve.engine.regroup import migrate
from kunserve.engine.regroup.boundary import Boundary
from kunserve.engine.regroup.migrate import LAST_ROUND_BLOCKS, Migration
from kunserve.engine.regroup.transfer import Transfers
from kunserve.engine.request import Request
from kunserve.engine.schedule.policy import is_decoding
from kunserve.errors import DeviceError
from kunserve.policies import OverloadPolicy
from kunserve.sampling import FinishReason


@asynccontextmanager
async def migrating(six_layers: Path, num_blocks: int = PLENTY, **settings: Any) -> AsyncIterator[Served]:
    settings = {"overload_policy": OverloadPolicy.MIGRATE, **settings}
    async with serving(six_layers, num_blocks, **settings) as served:
        yield served


def mover(engine: Engine) -> Migration:
    assert isinstance(engine.mover, Migration)
    return engine.mover


async def alone(six_layers: Path, request: Request) -> list[int]:
    async with serving(six_layers, PLENTY, "cpu:1") as served:
        return await read(served.engine, request)


async def begin_one(engine: Engine, request: Request) -> asyncio.Task[list[int]]:
    """Run `request` on group 0 until it has an output, and begin to move it to group 1."""
    source, destination = engine.groups
    engine.fleet.set_admitting(destination, False)
    reader = asyncio.create_task(read(engine, request))
    await until(engine, lambda: is_decoding(request))
    assert request in source.running
    engine.fleet.set_admitting(destination, True)
    mover(engine).begin(request, source, destination)
    return reader


async def test_a_crowd_with_pairing_after_every_step_gets_the_same_tokens(six_layers: Path) -> None:
    async with serving(six_layers, PLENTY, "cpu:1") as served:
        expected = await read_all(served.engine, make_crowd())
    async with migrating(six_layers, num_blocks=40) as served:
        engine = served.engine
        engine.fleet.set_admitting(engine.groups[1], False)  # all crowd into the first group
        readers = asyncio.create_task(read_all(engine, make_crowd()))
        await until(engine, lambda: engine.scheduler.num_preemptions > 0)
        engine.fleet.set_admitting(engine.groups[1], True)
        while not readers.done():
            mover(engine).pair()
            await asyncio.wait(
                [readers, asyncio.ensure_future(engine.signals.next_commit())], return_when="FIRST_COMPLETED"
            )
        assert await readers == expected
        assert engine.state()["requests"]["migrations"] == engine.scheduler.num_migrations > 0
        assert mover(engine).num_bytes > 0


async def test_a_long_request_runs_while_it_is_copied_and_stops_for_the_rest(
    six_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[tuple[bool, int]] = []
    copy, request = Transfers.between, make_request("long", 101, 50)

    async def recorded(self: Transfers, *arguments: Any, **more: Any) -> bool:
        copies.append((request.is_moving, len(arguments[3])))  # ids of the blocks that are read
        return await copy(self, *arguments, **more)

    monkeypatch.setattr(Transfers, "between", recorded)
    expected = await alone(six_layers, make_request("long", 101, 50))
    async with migrating(six_layers) as served:
        engine = served.engine
        reader = await begin_one(engine, request)
        await until(engine, lambda: engine.scheduler.num_migrations == 1)
        assert request in engine.groups[1].running and not engine.groups[0].running
        assert engine.groups[0].num_used == 0
        assert await reader == expected
    (was_stopped, num_first), (is_stopped, num_last) = copies
    assert not was_stopped and num_first == 25  # complete blocks of the 101 tokens; the 26th stays behind
    assert is_stopped and 0 < num_last < LAST_ROUND_BLOCKS


async def test_it_generates_while_its_complete_blocks_are_copied(six_layers: Path) -> None:
    async with migrating(six_layers) as served:
        engine = served.engine
        gate, request = CopyGate(engine.memories[1].device), make_request("long", 101, 50)
        reader = await begin_one(engine, request)
        await gate.reached.wait()
        num_output_tokens = request.num_output_tokens
        await until(engine, lambda: request.num_output_tokens > num_output_tokens + 3)
        assert engine.scheduler.num_migrations == 0
        gate.open()
        await reader
        assert engine.scheduler.num_migrations == 1


async def test_given_up_when_it_grows_faster_than_it_is_copied(
    six_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "LAST_ROUND_BLOCKS", 0)  # never few enough
    expected = await alone(six_layers, make_request("long", 101, 50))
    async with migrating(six_layers) as served:
        reader = await begin_one(served.engine, make_request("long", 101, 50))
        await until(served.engine, lambda: mover(served.engine).num_given_up == 1)
        assert served.engine.groups[1].num_used == 0
        assert await reader == expected
        assert served.engine.scheduler.num_migrations == 0


async def test_given_up_when_the_destination_has_no_blocks(six_layers: Path) -> None:
    expected = await alone(six_layers, make_request("long", 101, 20))
    async with migrating(six_layers) as served:
        pool = served.engine.groups[1].stages[0].pool
        taken = pool.alloc(pool.num_free - 20)
        assert taken is not None
        request = make_request("long", 101, 20)
        source, destination = served.engine.groups
        tokens = [token async for token in _tokens_while_migrating(served.engine, request, source, destination)]
        assert mover(served.engine).num_given_up == 1 and pool.num_free == 20
        pool.free(taken)
        assert tokens == expected


async def _tokens_while_migrating(engine: Engine, request: Request, source: Any, destination: Any) -> Any:
    """As `begin_one`, without checks: blocks are held by nobody the engine knows."""
    stream = engine.submit(request)
    is_begun = False
    async for output in stream:
        for token in output.token_ids:
            yield token
        if not is_begun and is_decoding(request):
            mover(engine).begin(request, source, destination)
            is_begun = True


async def test_a_failed_copy_leaves_the_request_where_it_is(six_layers: Path) -> None:
    expected = await alone(six_layers, make_request("short", 30, 30))
    async with migrating(six_layers) as served:
        CopyGate(served.engine.memories[1].device).open(DeviceError("the copy failed"))
        reader = await begin_one(served.engine, make_request("short", 30, 30))
        assert await reader == expected
        assert (mover(served.engine).num_given_up, served.engine.scheduler.num_migrations) == (1, 0)


@pytest.mark.parametrize("num_prompt", [101, 30])  # while it runs; while it is stopped
async def test_who_leaves_on_the_way_frees_both_ends(six_layers: Path, num_prompt: int) -> None:
    async with migrating(six_layers) as served:
        engine = served.engine
        gate, request = CopyGate(engine.memories[1].device), make_request("r", num_prompt, 50)
        reader = await begin_one(engine, request)
        await gate.reached.wait()
        assert request.is_moving is (num_prompt == 30) and engine.groups[1].num_used > 0
        engine.check()
        engine.abort("r")
        engine.check()
        gate.open()
        await reader
        await until(engine, lambda: mover(engine).num_given_up == 1)
        assert request.finish_reason is FinishReason.ABORT


async def test_who_is_preempted_on_the_way_is_recomputed(six_layers: Path) -> None:
    expected = await alone(six_layers, make_request("long", 101, 50))
    async with migrating(six_layers) as served:
        engine = served.engine
        gate, request = CopyGate(engine.memories[1].device), make_request("long", 101, 50)
        reader = await begin_one(engine, request)
        await gate.reached.wait()
        with Boundary(engine.fleet, engine.signals, None).paused(engine.groups[:1]):
            await until(engine, lambda: request.num_in_flight == 0)
            engine.scheduler.preempt(engine.groups[0], request)
        gate.open()
        assert await reader == expected
        assert mover(engine).num_given_up == 1 and request.num_preemptions == 1


@pytest.mark.parametrize("num_prompt", [101, 30])
async def test_a_drop_waits_for_copies_and_then_takes_all_along(six_layers: Path, num_prompt: int) -> None:
    expected = await alone(six_layers, make_request("r", num_prompt, 50))
    async with migrating(six_layers) as served:
        engine = served.engine
        gate = CopyGate(engine.memories[1].device)
        reader = await begin_one(engine, make_request("r", num_prompt, 50))
        await gate.reached.wait()
        drop = asyncio.create_task(engine.drop())
        while not all(group.is_paused and not group.num_in_flight for group in engine.groups):
            await next_round()
        assert not drop.done() and mover(engine).is_busy(engine.groups)
        gate.open()
        await drop
        assert [len(group.stages) for group in engine.groups] == [2]
        assert engine.scheduler.num_migrations == (1 if num_prompt == 30 else 0)
        assert await reader == expected


async def test_stopping_on_the_way_frees_everything(six_layers: Path) -> None:
    async with migrating(six_layers) as served:
        gate = CopyGate(served.engine.memories[1].device)
        reader = await begin_one(served.engine, make_request("short", 30, 50))
        await gate.reached.wait()
        await served.engine.stop()
        with pytest.raises(Exception, match="the server is stopping"):
            await reader
        assert served.engine.groups[1].num_used == 0 and not mover(served.engine).is_busy(served.engine.groups)


async def test_the_timer_runs_only_while_something_does(six_layers: Path) -> None:
    async with migrating(six_layers) as served:
        engine = served.engine
        assert not mover(engine).is_watching
        reader = asyncio.create_task(read(engine, make_request("r", 30, 50)))
        await until(engine, lambda: engine.num_running == 1)
        assert mover(engine).is_watching
        await reader
        mover(engine).pair()  # what the timer calls
        assert not mover(engine).is_watching


async def test_chains_do_not_migrate(six_layers: Path) -> None:
    async with migrating(six_layers, num_blocks=1, devices="cpu:4", pipeline_parallel_size=2) as served:
        engine = served.engine
        engine.fleet.set_admitting(engine.groups[1], False)
        reader = asyncio.create_task(read(engine, make_request("r", 30, 50)))
        await until(engine, lambda: engine.num_running == 1)
        engine.fleet.set_admitting(engine.groups[1], True)
        engine.groups[0].stages[0].pool.set_limit(1)  # no step remains
        mover(engine).pair()
        assert not mover(engine).is_busy(engine.groups)
        engine.groups[0].stages[0].pool.set_limit(PLENTY)
        await reader


async def test_a_request_whose_step_fails_while_it_stops_starts_over(six_layers: Path) -> None:
    expected = await alone(six_layers, make_request("long", 101, 50))
    async with migrating(six_layers) as served:
        engine, request = served.engine, make_request("long", 101, 50)
        execute: Any = engine.executor.execute
        num_failed = 0

        async def fail_once_stopped(group: Any, inputs: Any, stage_s: list[float] | None = None) -> Any:
            nonlocal num_failed
            tokens = await execute(group, inputs, stage_s)
            if request.is_moving and not num_failed:
                num_failed += 1
                raise DeviceError("the step failed")
            return tokens

        engine.executor.execute = fail_once_stopped  # type: ignore[method-assign, misc]
        reader = await begin_one(engine, request)
        assert await reader == expected
        assert num_failed == 1 and request.num_preemptions == 1 and mover(engine).num_given_up == 1
        assert not mover(engine).is_busy(engine.groups) and not request.is_moving
        engine.check()
