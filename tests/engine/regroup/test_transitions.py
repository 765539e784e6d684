"""A plan is applied whole or not at all: any one call to a device fails, and no stream notices."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hooks import around_copies
from transition_harness import Answer, Checked, Failures, again, checked_engine, make_requests, next_round, on_host

from kunserve.engine.blocks.block_table import BlockTable
from kunserve.engine.group import Group, Stage
from kunserve.engine.request import Request
from kunserve.errors import ConflictError, DeviceError, OverloadedError
from kunserve.gpu.device_memory import Layout
from kunserve.planner.drop import plan_drop_of
from kunserve.planner.plan import RestorePlan

NUM_REQUESTS = 8
REQUESTS = make_requests(NUM_REQUESTS, seed=1, longest_prompt=32, most_tokens=16)


@pytest.fixture(scope="module")
def expected(six_layers: Path) -> list[Answer]:
    """What an undisturbed server answers."""

    async def ask() -> list[Answer]:
        async with checked_engine(six_layers, "cpu:1", 320) as checked:
            return await checked.answer_all(again(REQUESTS))

    return asyncio.run(ask())


def contents(checked: Checked) -> dict[str, torch.Tensor]:
    """Copies of all weights that are present, by device and tensor."""
    return {
        f"{memory.device.name} {unit} {spec.name}": on_host(memory.weights.tensor(unit, spec.name))
        for memory in checked.engine.memories
        for unit in memory.weights.present
        for spec in memory.weights.specs(unit)
    }


def names(checked: Checked) -> list[str]:
    return [memory.device.name for memory in checked.engine.memories]


def layouts(checked: Checked) -> list[Layout]:
    return [memory.layout for memory in checked.engine.memories]


async def finish(checked: Checked, answers: Sequence[asyncio.Task[Answer]], expected: Sequence[Answer]) -> None:
    """Every stream ends as if nothing had been; then nothing is left over."""
    for answer, its in zip(await asyncio.gather(*answers), expected, strict=True):
        answer.assert_same(its)
    await checked.undo_drops()


async def begin(checked: Checked, requests: Sequence[Request]) -> list[asyncio.Task[Answer]]:
    """Ask, and wait for some steps."""
    answers = [asyncio.create_task(checked.answer(request)) for request in requests]
    await checked.commits(3)
    return answers


@pytest.mark.parametrize("kind", ["drop", "restore"])
async def test_any_call_may_fail(kind: str, six_layers: Path, expected: list[Answer]) -> None:
    """The first call of a transition fails, then the second, and so on until there is no such call any more."""
    async with checked_engine(six_layers, "cpu:2", 320) as checked:
        engine, original = checked.engine, contents(checked)
        failures = Failures(engine)
        failed_on: set[tuple[str, str]] = set()
        number = num_rolled_back = num_after_commit = 0
        while True:
            answers = await begin(checked, again(REQUESTS))
            if kind == "restore":
                await checked.control.drop()
                await checked.settled()
            epoch, before, held = engine.epoch, layouts(checked), contents(checked)
            groups = list(engine.groups)
            failures.arm(number)
            with suppress(DeviceError, OSError):
                await getattr(checked.control, kind)()
            await checked.settled()
            checked.check()
            failed_on.update(failures.failed)
            is_over = not failures.failed
            failures.arm(None)
            if engine.epoch == epoch:
                num_rolled_back += 1
                assert engine.groups == groups and layouts(checked) == before
                now = contents(checked)
                assert now.keys() == held.keys() and all(torch.equal(held[name], now[name]) for name in held)
                assert not any(group.is_paused for group in groups)
            elif not is_over:
                num_after_commit += 1
            await finish(checked, answers, expected)
            now = contents(checked)
            assert all(torch.equal(original[name], now[name]) for name in original)
            if is_over:
                break
            number += 1
        assert num_rolled_back >= 10 and num_after_commit >= (5 if kind == "drop" else 1)
        calls = {"run", "map", "unmap", "run_copy"}
        assert {name for _, name in failed_on} == calls and {device for device, _ in failed_on} == set(names(checked))


async def test_chunks_that_were_not_reassigned_are_by_the_next_transition(
    six_layers: Path, expected: list[Answer]
) -> None:
    """All maps fail once the epoch is committed: the chain serves with less, and can be restored all the same."""
    async with checked_engine(six_layers, "cpu:2", 320) as checked:
        failures = Failures(checked.engine)
        answers = await begin(checked, again(REQUESTS))
        await checked.control.drop()
        failures.rate = 1.0
        await checked.settled()
        failures.rate = 0.0
        checked.check()
        assert checked.num_outcomes("drop", "failed after its commit") == 1
        await finish(checked, answers, expected)
        assert checked.num_outcomes("restore", "done") == 1


def refuse_to_map(checked: Checked, number: int) -> None:
    """Let the next so many maps on the second device fail."""
    device: Any = checked.engine.memories[1].device
    map_ = device.map

    def refuse(address: int, chunks: Sequence[int]) -> None:
        nonlocal number
        number -= 1
        if number >= 0:
            raise DeviceError("refused")
        map_(address, chunks)

    device.map = refuse


async def test_going_back_is_tried_again(six_layers: Path, expected: list[Answer]) -> None:
    async with checked_engine(six_layers, "cpu:2", 320) as checked:
        answers = await begin(checked, again(REQUESTS))
        refuse_to_map(checked, 3)
        with pytest.raises(DeviceError, match="refused"):
            await checked.control.drop()
        checked.check()
        await finish(checked, answers, expected)
        assert checked.outcomes == {("drop", "rolled back", "by_request"): 1}


async def test_nothing_runs_on_a_device_that_cannot_go_back(six_layers: Path, expected: list[Answer]) -> None:
    """It would read what is mapped there now, or nothing: it is lost, and the others go on without it."""
    async with checked_engine(six_layers, "cpu:2", 320) as checked:
        answers = await begin(checked, again(REQUESTS))
        refuse_to_map(checked, 1000)
        with pytest.raises(DeviceError, match="refused"):
            await checked.control.drop()
        await finish(checked, answers, expected)
        assert checked.engine.degraded() == f"{names(checked)[1]} is lost" and checked.engine.health() is None
        assert [[stage.device for stage in group.stages] for group in checked.engine.groups] == [[0]]


# --- clients that leave, operators that are early ---------------------------------------------------------------------


async def test_a_client_leaves_while_its_blocks_are_moved_out_of_the_tail(
    six_layers: Path, expected: list[Answer]
) -> None:
    async with checked_engine(six_layers, "cpu:2", 64) as checked:
        answers = await begin(checked, again(REQUESTS))
        await checked.control.drop()
        await checked.settled()
        (group,) = checked.engine.groups
        last = max(group.running, key=lambda request: request.params.max_tokens - request.num_output_tokens)
        with checked.reconfigure.boundary.paused([group]):
            await checked.reconfigure.boundary.reached([group])
            for stage in group.stages:
                await _move_to_tail(checked, stage, last.table)
            checked.check()
            transfers, copied = checked.reconfigure.exchange.transfers, []
            copy_within = transfers.within

            async def leave_and_copy(device: int, layers: Iterable[int], moved: Mapping[int, int]) -> None:
                copied.append(dict(moved))
                checked.check()  # blocks that are arriving are accounted for
                checked.engine.abort(last.request_id)
                await copy_within(device, layers, moved)

            transfers.within = leave_and_copy  # type: ignore[method-assign]
            await checked.control.restore()
        assert copied[0] and not copied[1]  # it was alone in the tail
        checked.check()
        done = await asyncio.gather(*answers)
        for request, answer, its in zip(REQUESTS, done, expected, strict=True):
            if request.request_id != last.request_id:
                answer.assert_same(its)
        assert checked.engine.scheduler.num_preemptions == 0
        await checked.undo_drops()


async def _move_to_tail(checked: Checked, stage: Stage, table: BlockTable) -> None:
    """Move a request's blocks on a stage to the last ids, as if the front had been full."""
    pool = stage.pool
    tail = pool.alloc(pool.num_free)
    assert tail is not None
    front, number = list(table.ids[stage.device]), len(table.blocks)
    moved = dict(zip(front, tail[-number:], strict=True))
    pool.free(tail[:-number])
    layers = range(stage.first_layer, stage.last_layer)
    await checked.reconfigure.exchange.transfers.within(stage.device, layers, moved)
    for block in table.blocks:
        block.ids[stage.device] = moved[block.ids[stage.device]]
    table.read_ids(list(table.ids))
    pool.free(front)


async def test_one_transition_at_a_time_and_of_the_present_epoch(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:4", 64) as checked:
        control, reconfigure = checked.control, checked.reconfigure
        first, second = asyncio.create_task(control.drop([0, 1])), asyncio.create_task(control.drop([2, 3]))
        await asyncio.wait([first, second])
        assert (await first)["kind"] == "drop"
        with pytest.raises(ConflictError, match="under way"):
            await second
        stale = control.snapshot()
        [merge] = plan_drop_of(stale, [2, 3]).merges
        await checked.settled()
        await control.drop([2, 3])
        await checked.settled()
        with pytest.raises(ConflictError, match="group 2 is not there any more"):
            await reconfigure.drop(stale, merge)
        with pytest.raises(ConflictError, match="epoch 7"):
            await reconfigure.restore(RestorePlan(7, ()))
        await checked.undo_drops()


async def test_merges_do_not_wait_for_each_others_steps(six_layers: Path, expected: list[Answer]) -> None:
    async with checked_engine(six_layers, "cpu:4", 64) as checked:
        engine, reconfigure, held = checked.engine, checked.reconfigure, asyncio.Event()
        execute: Any = engine.executor.execute

        async def hold(group: Group, inputs: Any, stage_s: list[float] | None = None) -> Any:
            if group.group_id == 0:
                await held.wait()
            return await execute(group, inputs, stage_s)

        engine.executor.execute = hold  # type: ignore[method-assign, misc]
        answers = [asyncio.create_task(checked.answer(request)) for request in again(REQUESTS)]
        while not (engine.groups[0].num_in_flight and all(group.running for group in engine.groups)):
            await next_round()
        snapshot = checked.control.snapshot()
        merges = [plan_drop_of(snapshot, ids).merges[0] for ids in ([0, 1], [2, 3])]
        slow, fast = [asyncio.create_task(reconfigure.drop(snapshot, merge)) for merge in merges]
        assert (await fast).old_groups == (2, 3)
        assert not slow.done() and [len(group.stages) for group in engine.groups] == [1, 1, 2]
        with pytest.raises(ConflictError, match="under way"):
            await reconfigure.drop(snapshot, merges[0])
        with pytest.raises(ConflictError, match="under way"):
            await checked.control.restore()
        held.set()
        assert (await slow).outcome == "done"
        assert [len(group.stages) for group in engine.groups] == [2, 2]
        await finish(checked, answers, expected)


async def test_one_merge_that_fails_leaves_the_others(six_layers: Path, expected: list[Answer]) -> None:
    async with checked_engine(six_layers, "cpu:4", 64) as checked:
        answers = await begin(checked, again(REQUESTS))
        snapshot = checked.control.snapshot()
        merges = [plan_drop_of(snapshot, ids).merges[0] for ids in ([0, 1], [2, 3])]
        device: Any = checked.engine.memories[0].device
        map_, num_failed = device.map, 0

        def refuse(*arguments: Any) -> None:
            nonlocal num_failed
            num_failed += 1
            device.map = map_  # its way back is open
            raise DeviceError("refused")

        device.map = refuse
        drops = [asyncio.create_task(checked.reconfigure.drop(snapshot, merge)) for merge in merges]
        failed, done = await asyncio.gather(*drops, return_exceptions=True)
        assert num_failed == 1 and isinstance(failed, DeviceError) and not isinstance(done, BaseException)
        states = {state["old_groups"]: state["outcome"] for state in checked.engine.state()["transitions"]}
        assert states == {(0, 1): "rolled back", (2, 3): "done"}
        assert sorted(len(group.stages) for group in checked.engine.groups) == [1, 1, 2]
        await finish(checked, answers, expected)


async def test_no_merge_drops_weights_while_another_one_goes_back(six_layers: Path, expected: list[Answer]) -> None:
    """Without a host copy the way back is over any device that still has the weights."""
    async with checked_engine(six_layers, "cpu:4", 64) as checked:
        answers = await begin(checked, again(REQUESTS))
        snapshot = checked.control.snapshot()
        merges = [plan_drop_of(snapshot, ids).merges[0] for ids in ([0, 1], [2, 3])]
        device: Any = checked.engine.memories[0].device
        loader, map_ = checked.reconfigure.loader, device.map
        load, is_loading, may_load = loader.load, asyncio.Event(), asyncio.Event()

        def refuse(*_: Any) -> None:
            device.map = map_
            raise DeviceError("refused")

        async def hold(*arguments: Any) -> None:
            is_loading.set()
            await may_load.wait()
            await load(*arguments)

        device.map, loader.load = refuse, hold  # type: ignore[method-assign, assignment]
        before = layouts(checked)[2:]
        first = asyncio.create_task(checked.reconfigure.drop(snapshot, merges[0]))
        await is_loading.wait()
        second = asyncio.create_task(checked.reconfigure.drop(snapshot, merges[1]))
        await asyncio.sleep(0)  # it has paused its groups
        await checked.until_no_step_runs()
        for _ in range(100):
            await next_round()
        assert layouts(checked)[2:] == before and not second.done()
        may_load.set()
        failed, done = await asyncio.gather(first, second, return_exceptions=True)
        assert isinstance(failed, DeviceError) and not isinstance(done, BaseException) and done.outcome == "done"
        await finish(checked, answers, expected)


async def test_a_stopping_engine_ends_a_transition_and_every_stream(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:2", 320) as checked:
        held = asyncio.Event()

        async def hold(copy: Callable[[], Awaitable[Any]]) -> Any:
            await held.wait()
            return await copy()

        answers = await begin(checked, again(REQUESTS))
        await checked.control.drop()
        around_copies(checked.engine.memories[0].device.inner, hold)
        await checked.engine.stop()
        for answer in await asyncio.gather(*answers):
            assert answer.finish is not None or isinstance(answer.error, OverloadedError)
        assert checked.reconfigure.transitions.current is None
        checked.assert_no_failure()
        assert not checked.reconfigure.exchange.moving
        assert not any(request.is_moving for group in checked.engine.groups for request in group.running)


async def test_an_operator_whose_restore_is_ended_by_the_stop_is_told(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:2", 320) as checked:
        await checked.control.drop()
        await checked.settled()
        loading = asyncio.Event()

        async def hold(_: Callable[[], Awaitable[Any]]) -> Any:
            loading.set()
            await asyncio.Event().wait()

        around_copies(checked.engine.memories[0].device.inner, hold)
        restore = asyncio.create_task(checked.control.restore())
        await loading.wait()
        await checked.engine.stop()
        with pytest.raises(OverloadedError, match="stopping"):
            await restore
        (group,) = checked.engine.groups
        assert len(group.stages) == 2 and checked.reconfigure.transitions.remembered[-1].outcome == "rolled back"


async def test_a_transition_that_runs_says_what_it_is_at_and_how_many_weights_it_is_about(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:2", 320) as checked:
        copies = checked.engine.state()["copies"]
        assert (copies["now"], copies["at_launch"]) == (2, 2)
        answers = await begin(checked, again(REQUESTS))
        drop = await watched(checked, checked.control.drop)
        copies = checked.engine.state()["copies"]
        assert (copies["now"], copies["at_launch"]) == (1, 2)
        restore = await watched(checked, checked.control.restore)
        await asyncio.gather(*answers)
    for seen, steps in ((drop, ["boundary", "remap", "exchange"]), (restore, ["remap", "load"])):
        done, running = seen[-1], seen[:-1]
        shown = list(dict.fromkeys(state["step"] for state in running))
        assert [step for step in steps if step in shown] == steps
        assert {state["planned_bytes"] for state in running} == {done["weight_bytes"]} and done["weight_bytes"] > 0
        assert done["outcome"] == "done" and not done.keys() & {"step", "planned_bytes"}


async def watched(checked: Checked, begin: Callable[[], Awaitable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The states of a transition in every round of the event loop, the last when it was over."""
    before = len(checked.reconfigure.transitions.remembered)
    asked, seen = asyncio.ensure_future(begin()), list[dict[str, Any]]()
    while not seen or seen[-1]["outcome"] == "running":
        await next_round()
        seen += checked.engine.state()["transitions"][before:]
    await asked
    await checked.settled()
    return seen
