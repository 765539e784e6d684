"""Nobody asks: the server drops when a burst comes, restores after it, and changes its mind when it has to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
from transition_harness import Answer, Checked, again, checked_engine, next_round

from kunserve.engine.group import Group
from kunserve.engine.regroup import control as control_module
from kunserve.engine.regroup import reconfigure as reconfigure_module
from kunserve.engine.request import Request
from kunserve.engine.signals import loop_time
from kunserve.errors import ConflictError, DeviceError
from kunserve.planner.drop import plan_drop
from kunserve.planner.plan import DropPlan
from kunserve.planner.snapshot import Snapshot
from kunserve.sampling import FinishReason, SamplingParams

# Twice as much as two devices hold undropped, and nobody ends so soon that waiting would do.
BURST = [
    Request(
        f"r{i}",
        [3 + (7 * i + j) % 300 for j in range(24)],
        SamplingParams(40, temperature=i % 2, seed=i, ignore_eos=True),
    )
    for i in range(16)
]


@pytest.fixture(scope="module")
def expected(six_layers: Path) -> list[Answer]:
    """What an undisturbed server answers to the burst."""

    async def ask() -> list[Answer]:
        async with checked_engine(six_layers, "cpu:1", 1280) as checked:
            return await checked.answer_all(again(BURST))

    return asyncio.run(ask())


def automatic(folder: Path, devices: str = "cpu:2", hold_s: float = 0.0) -> AbstractAsyncContextManager[Checked]:
    """A server that decides by itself; all its devices hold 128 blocks together."""
    return checked_engine(folder, devices, 128 // int(devices[-1]), is_pinned=False, restore_hold_s=hold_s)


def assert_same(answers: Sequence[Answer], its: Sequence[Answer]) -> None:
    for answer, other in zip(answers, its, strict=True):
        answer.assert_same(other)


async def until_launched(checked: Checked, num_groups: int = 2) -> None:
    """Wait until it has restored everything by itself."""
    while len(checked.engine.groups) < num_groups:
        await next_round()  # a hold of nothing is over at once
        if checked.control.tasks:
            await asyncio.wait(checked.control.tasks)
    await checked.settled()
    await checked.until_no_step_runs()
    checked.assert_idle()


@pytest.mark.parametrize(("devices", "num_groups"), [("cpu:2", 2), ("cpu:4", 4)])
async def test_a_burst_is_answered_with_a_drop_and_undone_after_it(
    devices: str, num_groups: int, six_layers: Path, expected: list[Answer]
) -> None:
    async with automatic(six_layers, devices) as checked:
        for number in range(1, 3):
            assert_same(await checked.answer_all(again(BURST)), expected)
            await until_launched(checked, num_groups)
            assert checked.num_outcomes("drop", "done") >= number
            assert checked.num_outcomes("restore", "done") >= number
        assert max(checked.steps) > 1


async def test_little_load_changes_nothing(six_layers: Path, expected: list[Answer]) -> None:
    async with automatic(six_layers) as checked:
        for request, its in list(zip(again(BURST), expected, strict=True))[:4]:
            (await checked.answer(request)).assert_same(its)
        await checked.settled()
        assert not checked.outcomes and checked.engine.epoch == 0


async def test_it_restores_when_the_hold_time_is_over_and_not_before(
    six_layers: Path, expected: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with automatic(six_layers, hold_s=1000.0) as checked:
        engine = checked.engine
        late = 0.0
        monkeypatch.setattr("kunserve.engine.regroup.control.loop_time", lambda: loop_time() + late)
        assert_same(await checked.answer_all(again(BURST)), expected)
        await checked.settled()
        assert len(engine.groups) == 1
        late = 990.0
        engine.signals.wake()
        await asyncio.sleep(0)
        assert not checked.control.tasks
        late = 2000.0  # the engine may have found itself calm only when it was woken
        engine.signals.wake()
        await until_launched(checked)
        assert checked.num_outcomes("restore", "done") == 1


class HeldLoads:
    """Holds back all loading of weights until it is opened."""

    def __init__(self, checked: Checked) -> None:
        self.has_begun, self.may_end = asyncio.Event(), asyncio.Event()
        for memory in checked.engine.memories:
            device: Any = memory.device.inner
            device.run_copy = self._holding(device.run_copy)

    def _holding(self, run_copy: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        async def hold(work: Any) -> Any:
            if "fill" in getattr(getattr(work, "func", None), "__name__", ""):
                self.has_begun.set()
                await self.may_end.wait()
            return await run_copy(work)

        return hold


async def test_a_burst_cancels_a_restore_and_a_later_one_drops_again(six_layers: Path, expected: list[Answer]) -> None:
    async with automatic(six_layers) as checked:
        loads = HeldLoads(checked)
        assert_same(await checked.answer_all(again(BURST)), expected)
        await loads.has_begun.wait()  # it is over: the weights come back
        assert checked.reconfigure.is_cancellable
        answers = asyncio.create_task(checked.answer_all(again(BURST)))
        await until_cancelled(checked)
        loads.may_end.set()
        assert_same(await answers, expected)
        await until_launched(checked)
        assert checked.num_outcomes("restore", "cancelled") == 1
        num_drops = checked.num_outcomes("drop", "done")
        assert_same(await checked.answer_all(again(BURST)), expected)
        await until_launched(checked)
        assert checked.num_outcomes("drop", "done") == num_drops + 1


async def until_cancelled(checked: Checked) -> None:
    """Wait until the restore under way has been told to give way."""
    while checked.reconfigure.is_cancellable:
        await checked.commits(1)
    assert checked.reconfigure.transitions.current is not None


async def test_a_transition_that_failed_is_tried_again(
    six_layers: Path, expected: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "RETRY_S", 0.0)
    async with automatic(six_layers) as checked:
        failing: list[str] = []
        for name in ("drop", "restore"):
            begin = getattr(checked.reconfigure, name)

            def fail_once(*arguments: Any, name: str = name, begin: Any = begin, **more: Any) -> Any:
                setattr(checked.reconfigure, name, begin)
                _refuse_once(checked.engine.memories[0].device, failing)
                return begin(*arguments, **more)

            setattr(checked.reconfigure, name, fail_once)
        assert_same(await checked.answer_all(again(BURST)), expected)
        await until_launched(checked)
        assert len(failing) == 2
        for kind in ("drop", "restore"):
            assert checked.num_outcomes(kind, "rolled back") == 1 and checked.num_outcomes(kind, "done") >= 1


def _refuse_once(device: Any, failing: list[str]) -> None:
    map_ = device.map

    def refuse(address: int, chunks: Sequence[int]) -> None:
        device.map = map_
        failing.append(device.name)
        raise DeviceError("refused")

    device.map = refuse


async def test_an_operator_and_the_server_do_not_get_into_each_others_way(
    six_layers: Path, expected: list[Answer]
) -> None:
    """It sees the overload in the moment in which an operator has asked for something else."""
    async with automatic(six_layers, "cpu:4") as checked:
        control = checked.control
        control.is_automatic = False
        answers = asyncio.create_task(checked.answer_all(again(BURST)))
        while not control.pressure.is_too_high(checked.engine.groups):
            await next_round()
        asked = asyncio.create_task(control.drop([2, 3]))
        await asyncio.sleep(0)  # it is about to begin
        assert control.tasks and control.reconfigure.transitions.current is None
        control.is_automatic = True
        control.observe(checked.engine.groups)
        assert not any(group.is_paused for group in checked.engine.groups)
        assert (await asked)["old_groups"] == (2, 3)
        assert_same(await answers, expected)
        await until_launched(checked, 4)


@pytest.mark.parametrize("way", ["refused", "failed", "bug", "cancelled", "stopped", "done"])
async def test_no_way_out_of_a_drop_leaves_a_group_paused(
    way: str, six_layers: Path, expected: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with automatic(six_layers) as checked:
        control, engine = checked.control, checked.engine
        control.is_automatic = False
        answers = asyncio.create_task(checked.answer_all(again(BURST)))
        while not control.pressure.is_too_high(engine.groups):
            await next_round()
        groups, other = list(engine.groups), ExitStack()
        control.begin_drop(loop_time())
        assert all(group.is_paused for group in groups)  # from this very step on
        [task] = control.tasks
        if way == "refused":  # one of its groups is in another transition by now
            other.enter_context(checked.reconfigure.transitions.begin("drop", [groups[0].group_id]))
        elif way == "failed":
            _refuse_once(engine.memories[0].device, [])
        elif way == "bug":
            monkeypatch.setattr(reconfigure_module, "plan_exchange", lambda *_, **__: 1 // 0)
        elif way == "cancelled":  # before its first step
            task.cancel()
        elif way == "stopped":
            await engine.stop()
        await asyncio.wait([task])
        other.close()
        await asyncio.sleep(0)
        assert not any(group.is_paused for group in (*groups, *engine.groups))
        kinds = {"refused": ConflictError, "failed": DeviceError, "bug": ZeroDivisionError}
        if way in kinds:
            assert isinstance(task.exception(), kinds[way])
        else:
            assert task.cancelled() is (way != "done")
        if way == "stopped":
            assert all(answer.error is not None for answer in await answers)
            return
        monkeypatch.undo()
        assert_same(await answers, expected)
        await checked.settled()


async def test_more_than_the_largest_chain_holds_is_preempted_and_ends(
    six_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        Request(f"r{i}", [3 + i] * 60, SamplingParams(40, temperature=0, seed=i, ignore_eos=True)) for i in range(14)
    ]
    in_vain = list[int]()  # epochs in which a drop was asked for that cannot be

    def plan(snapshot: Snapshot, need_blocks: int, room_blocks: int) -> DropPlan:
        found = plan_drop(snapshot, need_blocks, room_blocks)
        if not found.merges:
            in_vain.append(snapshot.epoch)
        return found

    monkeypatch.setattr(control_module, "plan_drop", plan)
    async with automatic(six_layers) as checked:
        answers = await checked.answer_all(requests)
        assert all(answer.finish == (FinishReason.LENGTH, None) for answer in answers)
        assert checked.engine.scheduler.num_preemptions > 0
        assert in_vain and len(in_vain) == len(set(in_vain))  # demand of everybody is not measured in every step
        await until_launched(checked)


async def test_a_suspected_device_asks_for_no_more_servers(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:2", 64, pipeline_parallel_size=2) as checked:
        engine, control = checked.engine, checked.control
        answers = asyncio.create_task(checked.answer_all(again(BURST)))
        await checked.commits(2)
        before = control.demand_over_undropped()
        engine.device_health.fails([0])
        assert engine.groups[0].is_suspect and control.demand_over_undropped() == before > 0
        engine.device_health.lose(0, "the test says so")  # the only group: what is left of it forms another
        assert engine.groups[0].is_lost and control.demand_over_undropped() == before
        answers.cancel()


async def test_a_lost_group_is_no_capacity(six_layers: Path) -> None:
    async with checked_engine(six_layers, "cpu:2", 64) as checked:
        answers = asyncio.create_task(checked.answer_all(again(BURST)))
        await checked.commits(2)
        before = checked.control.demand_over_undropped()
        checked.engine.device_health.lose(0, "the test says so")
        assert checked.control.demand_over_undropped() == 2 * before
        await answers


async def test_a_group_that_was_suspected_for_a_while_is_split_like_any_other(six_layers: Path) -> None:
    async with automatic(six_layers) as checked:
        engine, control = checked.engine, checked.control
        control.is_automatic = False
        await control.drop(is_forced=True)
        await checked.settled()

        async def hang(group: Group | None, device: int) -> None:
            await asyncio.Event().wait()

        engine.executor.probe = hang  # type: ignore[method-assign]
        engine.device_health.fails([0])
        control.is_automatic = True
        control.observe(engine.groups)
        assert not control.tasks
        engine.device_health.trust([0])
        control.observe(engine.groups)
        assert control.tasks
        await until_launched(checked)


async def test_a_group_in_another_transition_counts_with_what_it_holds(
    six_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = list[DropPlan]()

    def plan(snapshot: Snapshot, need_blocks: int, room_blocks: int) -> DropPlan:
        plans.append(plan_drop(snapshot, need_blocks, room_blocks))
        return plans[-1]

    monkeypatch.setattr(control_module, "plan_drop", plan)
    monkeypatch.setattr(control_module, "MERGE_HEADROOM", (1.0, 1.0))
    async with checked_engine(six_layers, "cpu:4", 32) as checked:
        control = checked.control
        capacity = control.snapshot().capacity_blocks()
        for demand in (capacity, capacity + 1):
            monkeypatch.setattr(control.pressure, "demand", lambda headroom=1.0, demand=demand: demand)
            with checked.reconfigure.transitions.begin("add", [0]):
                control.begin_drop(loop_time())
        assert [[merge.group_ids for merge in plan.merges] for plan in plans] == [[], [(1, 2)]]
        assert all(plan.meets_need for plan in plans)
        if control.tasks:
            await asyncio.wait(control.tasks)
