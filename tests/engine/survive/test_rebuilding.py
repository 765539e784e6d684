"""Rebuilds that come in each other's way, that fail half-way, or that leave less room than requests were promised."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hooks import step_call
from on_gpus import RESTARTED, of_cpus_alone
from transition_harness import Answer, Checked, checked_engine, next_round

from kunserve.engine.group import Group
from kunserve.engine.request import Request
from kunserve.errors import ConflictError, DeviceLostError, OverloadedError
from kunserve.model.host_copy import HostCopy
from kunserve.planner.drop import plan_drop_of
from kunserve.policies import OverloadPolicy
from kunserve.sampling import SamplingParams

NUM_BLOCKS = 320


def ask(name: str, num_tokens: int, num_prompt_tokens: int = 5) -> Request:
    """Return a greedy request that goes on for so many tokens."""
    params = SamplingParams(num_tokens, temperature=0.0, ignore_eos=True)
    return Request(name, list(range(3, 3 + num_prompt_tokens)), params)


def lose(checked: Checked, *devices: int) -> None:
    """Declare devices lost."""
    for device in devices:
        checked.engine.device_health.lose(device, "the test says so")


def members(checked: Checked) -> list[set[int]]:
    """Return the devices of each group."""
    return [{stage.device for stage in group.stages} for group in checked.engine.groups]


def slow_loads(checked: Checked, seconds: float) -> None:
    """Let each unit of weights take longer to load."""
    load = checked.reconfigure.loader.load

    async def slowly(*arguments: Any) -> None:
        await asyncio.sleep(seconds)
        await load(*arguments)

    checked.reconfigure.loader.load = slowly  # type: ignore[method-assign,assignment]


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for a condition."""
    while not is_so():
        await asyncio.sleep(0.005)


def at_step(checked: Checked, phase: str) -> Callable[[], bool]:
    """Return what tells whether a transition is at this step now."""
    return lambda: phase in checked.reconfigure.transitions.phases


@of_cpus_alone(RESTARTED)
async def test_two_rebuilds_never_take_the_same_device(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:3", NUM_BLOCKS) as checked:
        lose(checked, 2)
        await checked.rebuilt()
        slow_loads(checked, 0.02)
        adding = asyncio.ensure_future(checked.engine.add_device(2))
        await until(at_step(checked, "add.load"))
        lose(checked, 1)
        await adding
        await checked.rebuilt()
        assert members(checked) == [{0}, {2}]
        answers = await checked.answer_all([ask(f"r{i}", 30) for i in range(6)])
        assert all(len(answer.token_ids) == 30 for answer in answers)
        checked.assert_idle()


@asynccontextmanager
async def one_beside_a_chain(folder: Path) -> AsyncIterator[tuple[Checked, asyncio.Future[Answer]]]:
    """Device 0 alone, 1 and 2 in a chain, and a request of 100 tokens that is being answered."""
    async with checked_engine(folder, "cpu:3", NUM_BLOCKS) as checked:
        await checked.control.drop([g.group_id for g in checked.engine.groups if g.stages[0].device], is_forced=True)
        await checked.settled()
        answering = asyncio.ensure_future(checked.answer(ask("r", 100)))
        await checked.commits(3)
        yield checked, answering


async def test_what_is_left_of_two_groups_makes_one(six_layers: Path) -> None:
    async with one_beside_a_chain(six_layers) as (checked, answering):
        lose(checked, 0, 1)  # the last device that has all weights, and one of the others
        assert len((await answering).token_ids) == 100
        await checked.rebuilt()
        assert members(checked) == [{2}]
        checked.assert_idle()


async def test_a_second_loss_at_the_boundary_of_the_first_does_not_end_the_server(six_layers: Path) -> None:
    async with one_beside_a_chain(six_layers) as (checked, answering):
        lose(checked, 0)
        while not at_step(checked, "lose.boundary")():
            await next_round()
        lose(checked, 1)
        assert len((await answering).token_ids) == 100
        await checked.rebuilt()
        assert members(checked) == [{2}]


async def test_streams_of_a_lost_device_go_first(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:2", NUM_BLOCKS) as checked:
        answering = asyncio.ensure_future(checked.answer_all([ask(f"r{i}", 60) for i in range(8)]))
        await checked.commits(8)
        begun = {r for g in checked.engine.groups if g.stages[0].device == 0 for r in g.running if r.num_output_tokens}
        hurried = set()
        preempt = checked.engine.scheduler.preempt

        def seen(group: Group, request: Request, **how: bool) -> None:
            preempt(group, request, **how)
            hurried.update([request] if request.is_hurried else [])

        checked.engine.scheduler.preempt = seen  # type: ignore[method-assign]
        lose(checked, 0)
        assert all(len(answer.token_ids) == 60 for answer in await answering)
        assert begun and hurried == begun and not any(request.is_hurried for request in hurried)


async def test_a_probe_that_hangs_does_not_hold_up_the_end(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:2", NUM_BLOCKS) as checked:
        engine, ends = checked.engine, threading.Event()

        async def hang(group: Group | None, device: int) -> None:
            await engine.memories[device].device.run(ends.wait)

        engine.executor.probe = hang  # type: ignore[method-assign]
        engine.device_health.fails([0])
        await until(lambda: engine.memories[0].device.has_work)
        await engine.stop(last_step_s=0.1)
        await asyncio.to_thread(checked.machine.close)
        assert checked.machine.stuck() == [engine.memories[0].device.name]
        ends.set()


async def test_a_suspected_or_idle_device_can_be_taken_out(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:2", NUM_BLOCKS) as checked:
        checked.engine.device_health.fails([1])
        assert (await checked.engine.remove_device(1, 0.0))["outcome"] == "done"
        assert members(checked) == [{0}]
        with pytest.raises(ConflictError, match="taken out already"):
            await checked.engine.remove_device(1, 0.0)


async def test_nothing_begins_once_the_server_stops(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:2", NUM_BLOCKS) as checked:
        await checked.engine.stop()
        for asked in (checked.engine.drop(is_forced=True), checked.engine.add_device(1)):
            with pytest.raises(OverloadedError, match="stopping"):
                await asked


async def test_a_request_that_reserves_more_than_is_left_blocks_nobody(six_layers: Path) -> None:
    settings = {"pipeline_parallel_size": 2, "max_model_len": 256, "overload_policy": OverloadPolicy.QUEUE}
    async with checked_engine(six_layers, "cpu:4", 32, **settings) as checked:
        lose(checked, 3)
        await checked.rebuilt()
        lose(checked, 0)
        await checked.rebuilt()
        answers = await checked.answer_all([ask("long", 240), *(ask(f"short{i}", 5) for i in range(3))])
        assert isinstance(answers[0].error, OverloadedError)
        assert all(len(answer.token_ids) == 5 for answer in answers[1:])


async def test_a_device_that_dies_before_the_commit_is_in_no_new_group(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:3", NUM_BLOCKS, pipeline_parallel_size=3) as checked:
        slow_loads(checked, 0.02)
        answering = asyncio.ensure_future(checked.answer(ask("r", 100)))
        await checked.commits(3)
        lose(checked, 0)
        await until(at_step(checked, "lose.load"))
        lose(checked, 1)
        assert len((await answering).token_ids) == 100
        await checked.rebuilt()
        assert members(checked) == [{2}]
        checked.assert_idle()


async def test_a_removal_that_fails_leaves_the_group_as_it_was(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:3", NUM_BLOCKS, pipeline_parallel_size=3) as checked:
        loader = checked.reconfigure.loader
        load, failures = loader.load, [OSError("no such file")] * 2

        async def fail(*arguments: Any) -> None:
            if failures:
                raise failures.pop()
            await load(*arguments)

        loader.load = fail  # type: ignore[method-assign,assignment]
        answering = asyncio.ensure_future(checked.answer_all([ask(f"r{i}", 60) for i in range(8)]))
        await checked.commits(3)
        with pytest.raises(OSError, match="no such file"):
            await checked.engine.remove_device(2, 0.0)
        assert members(checked) == [{0, 1, 2}]
        assert checked.engine.degraded() is None
        assert all(len(answer.token_ids) == 60 for answer in await answering)
        checked.assert_idle()
        assert (await checked.engine.remove_device(2, 0.0))["outcome"] == "done"
        assert members(checked) == [{0}, {1}]


async def test_the_last_copy_cannot_be_taken_out(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:2", NUM_BLOCKS) as checked:
        lose(checked, 1)
        await checked.rebuilt()
        with pytest.raises(ConflictError, match="last complete copy"):
            await checked.engine.remove_device(0, 0.0)
        assert checked.engine.degraded() == f"{checked.engine.memories[1].device.name} is lost"
        assert len((await checked.answer(ask("r", 10))).token_ids) == 10


async def test_two_removals_at_once_leave_a_copy(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:2", NUM_BLOCKS) as checked:
        answering = asyncio.ensure_future(checked.answer_all([ask(f"r{i}", 60) for i in range(4)]))
        await checked.commits(3)
        removals = [checked.engine.remove_device(i, 5.0) for i in range(2)]
        first, second = await asyncio.gather(*removals, return_exceptions=True)
        assert isinstance(first, dict) and isinstance(second, ConflictError)
        assert all(len(answer.token_ids) == 60 for answer in await answering)


async def test_a_device_that_drains_holds_up_no_other_transition(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:4", NUM_BLOCKS) as checked:
        answering = [asyncio.ensure_future(checked.answer(ask(f"r{i}", 110))) for i in range(4)]
        await checked.commits(4)
        removing = asyncio.ensure_future(checked.engine.remove_device(3, 60.0))
        await asyncio.sleep(0)
        drop = await checked.engine.drop([0, 1], is_forced=True)
        assert drop["outcome"] == "running" and not removing.done()
        lose(checked, 2)
        answers = await asyncio.gather(*answering)
        assert [len(answer.token_ids) for answer in answers] == [110] * 4
        assert (await removing)["outcome"] == "done"
        await checked.rebuilt()
        assert members(checked) == [{0, 1}]


async def test_no_drop_takes_weights_that_a_rebuild_copies(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:4", NUM_BLOCKS, host_copy=HostCopy.NONE) as checked:
        await checked.control.drop([0, 1], is_forced=True)
        await checked.settled()
        slow: Any = checked.engine.memories[0].device.inner
        copy_tensor = slow.copy_tensor

        async def copy_slowly(*arguments: Any) -> None:
            await slow.run_copy(partial(time.sleep, 0.2))
            await copy_tensor(*arguments)

        slow.copy_tensor = copy_slowly
        answering = asyncio.ensure_future(checked.answer_all([ask(f"r{i}", 60) for i in range(6)]))
        await checked.commits(3)
        lose(checked, 1)
        await until(at_step(checked, "lose.load"))
        groups = [group.group_id for group in checked.engine.groups if not group.is_lost]
        with pytest.raises(ConflictError, match="the loss of a device is under way"):
            await checked.reconfigure.drop(*_forced_merge(checked, groups))
        await checked.rebuilt()
        assert all(len(answer.token_ids) == 60 for answer in await answering)
        checked.assert_idle()


def _forced_merge(checked: Checked, group_ids: list[int]) -> tuple[Any, Any]:
    snapshot = checked.control.snapshot()
    [merge] = plan_drop_of(snapshot, group_ids).merges
    return snapshot, merge


async def test_whoever_outgrows_what_is_left_ends_and_blocks_nobody(six_layers: Path) -> None:
    settings = {"pipeline_parallel_size": 2, "max_model_len": 256}
    async with checked_engine(six_layers, "cpu:4", 32, **settings) as checked:
        engine = checked.engine
        lose(checked, 3)
        await checked.rebuilt()
        answering = asyncio.ensure_future(checked.answer_all([ask(f"r{i}", 240) for i in range(4)]))
        brief = asyncio.ensure_future(checked.answer(ask("brief", 60)))
        await checked.commits(8)
        lose(checked, 0)
        await checked.rebuilt()
        most_tokens = max(group.num_blocks for group in engine.groups) * engine.fleet.block_size
        assert most_tokens < 245
        for answer in await answering:  # as far as anything can hold them
            assert isinstance(answer.error, OverloadedError) and len(answer.token_ids) == most_tokens + 1 - 5
        assert len((await brief).token_ids) == 60  # it asked for no more than that
        too_long: Answer = await checked.answer(ask("long", 5, most_tokens + 1))
        assert isinstance(too_long.error, OverloadedError)
        # Whoever may go on for longer than any group can hold is taken: it may end before.
        assert (await checked.answer(ask("default", 250))).token_ids
        checked.assert_idle()


async def test_a_failure_of_another_kind_counts_for_no_death(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:2", NUM_BLOCKS) as checked:
        answering = asyncio.ensure_future(checked.answer(ask("r", 100)))
        await checked.commits(3)
        [here] = [group.group_id for group in checked.engine.groups if group.running]
        fail_once(checked.engine.memories[here].device.inner, RuntimeError("in passing"))
        fail_once(checked.engine.memories[1 - here].device.inner, DeviceLostError("dead"))
        answer = await answering
        assert answer.error is None and len(answer.token_ids) == 100


def fail_once(device: Any, error: Exception) -> None:
    """Let the next work of a device raise an error."""
    name = step_call(device)
    run = getattr(device, name)

    async def fail(work: Callable[[], Any], *after: Any) -> Any:
        setattr(device, name, run)

        def raising() -> None:
            raise error

        return await run(raising, *after)

    setattr(device, name, fail)


async def test_devices_that_get_no_weights_stay_idle_while_others_serve(
    six_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kunserve.engine.regroup.membership.RETRY_S", 0.0)
    async with checked_engine(six_layers, "cpu:3", NUM_BLOCKS) as checked:
        await checked.control.drop([1, 2], is_forced=True)
        await checked.settled()
        loader = checked.reconfigure.loader
        load = loader.load

        async def fail(*_: Any) -> None:
            raise OSError("the disk is gone")

        loader.load = fail  # type: ignore[method-assign,assignment]
        lose(checked, 1)
        await checked.rebuilt()
        assert members(checked) == [{0}]
        loader.load = load  # type: ignore[method-assign]
        assert (await checked.engine.add_device(2))["outcome"] == "done"
        assert members(checked) == [{0}, {2}]
        checked.assert_idle()


async def test_a_burst_drops_beside_a_rebuild(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:4", 32, is_pinned=False, restore_hold_s=3600.0) as checked:
        await checked.control.drop([0, 1], is_forced=True)
        await checked.settled()
        load, may_load = checked.reconfigure.loader.load, asyncio.Event()

        async def wait(*arguments: Any) -> None:
            await may_load.wait()
            await load(*arguments)

        checked.reconfigure.loader.load = wait  # type: ignore[method-assign,assignment]
        lose(checked, 1)
        await until(at_step(checked, "lose.load"))
        answering = asyncio.ensure_future(checked.answer_all([ask(f"r{i}", 60) for i in range(8)]))
        transitions = checked.reconfigure.transitions
        async with asyncio.timeout(120):
            await until(lambda: any(t.kind == "drop" and t.epoch for t in transitions.remembered))
        assert "lose.load" in transitions.phases
        may_load.set()
        assert all(len(answer.token_ids) == 60 for answer in await answering)
        await checked.rebuilt()
        assert sorted(map(sorted, members(checked))) == [[0], [2, 3]]
        checked.assert_idle()
