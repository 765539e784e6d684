"""KV of live requests follows its layers: in every order, with new requests beside it, and with clients that leave."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hooks import around_copies
from loaded_groups import asked, assert_same, loaded, two_devices
from structlog.testing import capture_logs
from transition_harness import Answer, Checked, again, checked_engine, next_round

from kunserve.engine.group import Group
from kunserve.engine.regroup.remap import Layouts
from kunserve.engine.request import Request
from kunserve.errors import ConflictError, DeviceError
from kunserve.planner.exchange import LiveRequest
from kunserve.planner.layouts import merged_layouts
from kunserve.planner.plan import ExchangeMode, ExchangePlan, KvMove, Merge
from kunserve.planner.snapshot import Lineage, Snapshot, StageView
from kunserve.policies import OverloadPolicy
from kunserve.sampling import FinishReason, SamplingParams


class Gate:
    """Holds back every copy between devices until it is opened."""

    def __init__(self, checked: Checked) -> None:
        self.is_open = asyncio.Event()
        self.num_waiting = 0
        for memory in checked.engine.memories:
            around_copies(memory.device.inner, self._copy)

    async def _copy(self, copy: Callable[[], Awaitable[Any]]) -> Any:
        self.num_waiting += 1
        await self.is_open.wait()
        self.num_waiting -= 1
        return await copy()


def long_requests(number: int, num_prompt_tokens: int, num_tokens: int, name: str = "r") -> list[Request]:
    """Requests of equal length, half of them greedy."""
    return [
        Request(
            f"{name}{i}",
            [3 + (7 * i + 11 * j) % 300 for j in range(num_prompt_tokens)],
            SamplingParams(num_tokens, temperature=i % 2, seed=i, ignore_eos=True, num_logprobs=2),
        )
        for i in range(number)
    ]


async def expected(folder: Path, requests: Sequence[Request]) -> list[Answer]:
    """What one device answers that has room for all."""
    num_blocks = sum(request.num_prompt_tokens + request.params.max_tokens + 4 for request in requests) // 4
    async with checked_engine(folder, "cpu:1", max(130, num_blocks), max_model_len=512) as checked:
        return await checked.answer_all(again(requests))


async def test_new_requests_run_while_kv_is_exchanged(six_layers: Path) -> None:
    old, new = long_requests(8, 30, 20), long_requests(4, 12, 8, "new")
    its = await expected(six_layers, old + new)
    async with two_devices(six_layers, 320) as checked:
        answers, gate = await loaded(checked, old), Gate(checked)
        await checked.control.drop()
        before = [r.num_output_tokens for r in old]
        first = await checked.answer_all(new)
        assert gate.num_waiting == 2 and checked.reconfigure.transitions.current is not None
        assert [r.num_output_tokens for r in old] == before and all(r.is_moving for r in old)
        gate.is_open.set()
        assert_same(await answers + first, its)
        await checked.settled()
        assert checked.outcomes == {("drop", "done", "by_request"): 1}
        await checked.undo_drops()


async def test_each_request_runs_on_when_its_own_layers_have_arrived(six_layers: Path) -> None:
    requests = long_requests(8, 30, 12)
    async with two_devices(six_layers, 320) as checked:
        answers = await loaded(checked, requests)
        moving: list[int] = []
        arrive = checked.engine.fleet.arrive

        def arrive_and_count(request: Request, group: Group) -> None:
            arrive(request, group)
            moving.append(sum(r.is_moving for r in requests))

        checked.engine.fleet.arrive = arrive_and_count  # type: ignore[method-assign]
        await checked.control.drop()
        await answers
        await checked.settled()
        assert moving == list(range(len(moving)))[::-1] and len(moving) >= 6


# Freed are 8 chunks of a device; KV has 24: three times as much. All of it is in use.
async def test_kv_larger_than_the_freed_weights_goes_layer_by_layer(six_layers: Path) -> None:
    old, new = long_requests(8, 112, 14), long_requests(1, 5, 4, "new")
    its = await expected(six_layers, old + new)
    async with two_devices(six_layers, 128) as checked:
        engine = checked.engine
        answers = await loaded(checked, old)
        kv, weights = engine.memories[0].counts.kv, engine.memories[0].counts.weights
        gate = Gate(checked)
        state = await checked.control.drop()
        freed = weights - engine.memories[0].counts.weights
        assert kv >= 3 * freed > 0
        first = await asked(checked, new)
        gate.is_open.set()
        assert_same(await answers + await first, its)
        await checked.settled()
        assert state["exchange_mode"] == "by_layer" and checked.num_outcomes("drop", "done", "by_layer") == 1
        assert engine.scheduler.num_preemptions == 0
        await checked.undo_drops()


async def test_a_prompt_under_way_does_not_wait_for_all_layers(six_layers: Path) -> None:
    old, late = long_requests(7, 112, 14), long_requests(8, 112, 4, "late")[7:]  # which begins like none of them
    its = await expected(six_layers, old + late)
    async with two_devices(six_layers, 128) as checked:
        engine = checked.engine
        answers = await loaded(checked, old)
        engine.scheduler.limits = replace(engine.scheduler.limits, max_num_batched_tokens=16)
        last = await asked(checked, late)
        while not late[0].num_computed_tokens:
            await checked.commits(1)
        gate = Gate(checked)
        await checked.control.drop()
        assert late[0].num_preemptions == 1 and late[0].num_output_tokens == 0
        await last  # with the first token of which nobody else has got a new one
        assert gate.num_waiting and all(r.is_moving for r in old)
        gate.is_open.set()
        assert_same(await answers + await last, its)
        await checked.settled()
        assert engine.scheduler.num_preemptions == 1 and checked.num_outcomes("drop", "done", "by_layer") == 1
        await checked.undo_drops()


@pytest.mark.parametrize("is_during_remap", [True, False])
async def test_a_client_that_leaves_while_layers_move(
    is_during_remap: bool, six_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = long_requests(8, 112, 14)
    its = await expected(six_layers, requests)
    async with two_devices(six_layers, 128) as checked:
        answers, gate = await loaded(checked, requests), Gate(checked)
        remap = checked.reconfigure.remap
        apply = remap.apply

        async def leave_and_apply(layouts: Layouts) -> None:
            checked.engine.abort("r3")
            await apply(layouts)

        if is_during_remap:
            monkeypatch.setattr(remap, "apply", leave_and_apply)
        await checked.control.drop()
        checked.engine.abort("r3")
        checked.check()
        gate.is_open.set()
        done = await answers
        assert done[3].finish == (FinishReason.ABORT, None)
        assert_same(done[:3] + done[4:], its[:3] + its[4:])
        await checked.undo_drops()
        assert checked.num_outcomes("drop", "done", "by_layer") == 1
        assert checked.engine.scheduler.num_preemptions == 0  # nobody else noticed


async def test_kv_that_fits_in_no_order_is_recomputed_if_an_operator_insists(six_layers: Path) -> None:
    requests = long_requests(8, 370, 26)
    its = await expected(six_layers, requests)
    async with two_devices(six_layers, 384, max_model_len=400) as checked:
        answers = await loaded(checked, requests)
        with pytest.raises(
            ConflictError, match=r"to free \d+.* of weights, \d+ tokens of 8 requests .*\"force\": true"
        ):
            await checked.control.drop()
        assert not checked.engine.state()["transitions"] and len(checked.engine.groups) == 2
        await checked.control.drop(is_forced=True)
        assert_same(await answers, its)
        await checked.settled()
        assert checked.outcomes == {("drop", "done", "infeasible"): 1}
        assert checked.engine.scheduler.num_preemptions >= 8
        await checked.undo_drops()


async def test_a_failed_remap_loses_nothing_of_kv_that_fits_in_no_order(six_layers: Path) -> None:
    """Its ranges are unmapped by then: whoever ran must not read what is mapped there now."""
    requests = long_requests(8, 370, 26)
    its = await expected(six_layers, requests)
    async with two_devices(six_layers, 384, max_model_len=400) as checked:
        answers = await loaded(checked, requests)
        device: Any = checked.engine.memories[1].device
        map_ = device.map

        def refuse_once(address: int, chunks: Sequence[int]) -> None:
            device.map = map_
            raise DeviceError("refused")

        device.map = refuse_once
        with pytest.raises(DeviceError, match="refused"):
            await checked.control.drop(is_forced=True)
        assert_same(await answers, its)
        await checked.undo_drops()
        assert checked.num_outcomes("drop", "rolled back") == 1


async def test_a_failed_copy_recomputes_only_its_request(six_layers: Path) -> None:
    requests = long_requests(8, 30, 20)
    its = await expected(six_layers, requests)
    async with two_devices(six_layers, 320) as checked:
        answers = await loaded(checked, requests)

        async def fail_once(_: Callable[[], Awaitable[Any]]) -> Any:
            undo()
            raise OSError("lost")

        undo = around_copies(checked.engine.memories[0].device.inner, fail_once)
        await checked.control.drop()
        assert_same(await answers, its)
        await checked.undo_drops()
        assert checked.num_outcomes("drop", "done") == 1
        assert [r.num_preemptions for r in requests].count(1) == sum(r.num_preemptions for r in requests) == 1


@pytest.mark.parametrize(
    ("error", "has_traceback"),
    [(DeviceError("refused"), False), (OSError("refused"), False), (TypeError("a bug"), True)],
)
@pytest.mark.parametrize(("num_blocks", "num_prompt_tokens", "mode"), [(320, 30, "by_request"), (128, 112, "by_layer")])
async def test_a_transition_that_lost_everybody_says_so(
    error: Exception, has_traceback: bool, num_blocks: int, num_prompt_tokens: int, mode: str, six_layers: Path
) -> None:
    requests = long_requests(8, num_prompt_tokens, 14)
    its = await expected(six_layers, requests)
    async with two_devices(six_layers, num_blocks) as checked:
        answers = await loaded(checked, requests)

        async def fail(*_: Any, **__: Any) -> bool:
            raise error

        checked.reconfigure.exchange.transfers.between = fail  # type: ignore[method-assign]
        with capture_logs() as logs:
            await checked.control.drop()
            assert_same(await answers, its)
            while checked.reconfigure.transitions.current is not None:
                await next_round()
        [state] = checked.engine.state()["transitions"]
        assert (state["outcome"], state["exchange_mode"] or "by_request", state["exchange_bytes"]) == ("done", mode, 0)
        assert state["num_lost"] == len(requests) == lost_requests(checked)
        assert [log["num_lost"] for log in logs if log["event"] == "transition"] == [len(requests)]
        failures = [log for log in logs if "failed, recomputing" in log["event"]]
        assert failures and all(("exc_info" in log) is has_traceback for log in failures)
        assert {log["log_level"] for log in failures} == {"error" if has_traceback else "warning"}
        await checked.settled()


async def test_a_transition_that_moved_everybody_lost_nobody(six_layers: Path) -> None:
    requests = long_requests(8, 30, 14)
    async with two_devices(six_layers, 320) as checked:
        answers = await loaded(checked, requests)
        await checked.control.drop()
        await answers
        while checked.reconfigure.transitions.current is not None:
            await next_round()
        [state] = checked.engine.state()["transitions"]
        assert state["exchange_bytes"] > 0 and state["num_lost"] == lost_requests(checked) == 0
        await checked.settled()


def lost_requests(checked: Checked) -> int:
    [value] = re.findall(rb"^kunserve:exchange_lost_requests_total{.*} (.*)$", checked.engine.metrics.render(), re.M)
    return int(float(value))


# --- uneven splits: some have to wait for room ------------------------------------------------------------------------


async def drop_unevenly(checked: Checked) -> asyncio.Task[Any]:
    """Merge both groups; device 0 keeps four of six layers, so it has hardly more room than before."""
    snapshot = checked.control.snapshot()
    stages = (StageView(0, 0, 4), StageView(1, 4, 6))
    lineage = Lineage((), tuple(group.lineage for group in snapshot.groups if group.lineage))
    merge = Merge((0, 1), stages, 0, lineage)
    committed = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(checked.reconfigure.drop(snapshot, merge, committed.set_result))
    await asyncio.wait([task, committed], return_when=asyncio.FIRST_COMPLETED)
    return task


async def test_requests_that_do_not_fit_yet_wait_for_room(six_layers: Path) -> None:
    old, new = long_requests(10, 112, 14), long_requests(2, 5, 4, "new")
    its = await expected(six_layers, old + new)
    async with two_devices(six_layers, 256) as checked:
        answers = await loaded(checked, old, 3)
        gate = Gate(checked)
        await drop_unevenly(checked)
        (group,) = checked.engine.groups
        held = [m.has_blocks for m in checked.reconfigure.exchange.moving.values()]
        assert 0 < held.count(False) < len(held) and not group.is_admitting
        late = await asked(checked, new)
        assert len(checked.engine.scheduler.waiting) == 2  # the blocks are for those on their way
        gate.is_open.set()
        assert_same(await answers + await late, its)
        await checked.undo_drops()
        assert checked.num_outcomes("drop", "done", "by_request") == 1
        assert checked.engine.scheduler.num_preemptions == 0


async def test_a_client_that_leaves_while_its_kv_waits_for_room(six_layers: Path) -> None:
    """Nothing else is in flight then: only its leaving tells the exchange to look again."""
    requests = long_requests(10, 112, 14)
    its = await expected(six_layers, requests)
    async with two_devices(six_layers, 256) as checked:
        answers = await loaded(checked, requests, 3)
        gate = Gate(checked)
        await drop_unevenly(checked)
        late = [m.request for m in checked.reconfigure.exchange.moving.values() if not m.has_blocks]
        for request in late:
            checked.engine.abort(request.request_id)
        gate.is_open.set()
        for request, answer, other in zip(requests, await answers, its, strict=True):
            if request in late:
                assert answer.finish == (FinishReason.ABORT, None)
            else:
                answer.assert_same(other)
        await checked.undo_drops()


def one_by_one(
    snapshot: Snapshot, merge: Merge, live: Sequence[LiveRequest], cached_groups: frozenset[int]
) -> ExchangePlan:
    """A plan that did not look whether it fits."""
    moves = tuple(KvMove((request.request_id,), 0, 0, 0, 0) for request in live)
    layouts = merged_layouts(snapshot, merge, {request.group_id for request in live})
    return ExchangePlan(ExchangeMode.BY_REQUEST, moves, layouts=layouts)


@pytest.mark.parametrize(
    "requests",
    [
        pytest.param(long_requests(10, 84, 40), id="those that arrived grow into the blocks that others wait for"),
        pytest.param(long_requests(2, 388, 12), id="everybody is on the way and waits for the other"),
    ],
)
async def test_an_order_that_does_not_fit_after_all(
    requests: list[Request], six_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody gives way, and nobody waits for ever."""
    its, requests = await expected(six_layers, requests), again(requests)
    monkeypatch.setattr("kunserve.engine.regroup.reconfigure.plan_exchange", one_by_one)
    async with two_devices(six_layers, 128, max_model_len=400) as checked:
        answers = await loaded(checked, requests)
        await checked.control.drop()
        assert_same(await answers, its)
        await checked.undo_drops()
        assert checked.num_outcomes("drop", "done", "by_request") == 1
        assert checked.engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("policy", [OverloadPolicy.SWAP, OverloadPolicy.QUEUE])
async def test_who_arrived_and_lacks_a_block_that_others_hold(
    policy: OverloadPolicy, six_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These policies preempt nobody: then one of those on their way gives way."""
    requests = (
        long_requests(1, 150, 200, "grows") + long_requests(1, 140, 8, "waits") + long_requests(1, 498, 12, "long")
    )
    its, requests = await expected(six_layers, requests), again(requests)
    for request in requests:  # they begin alike, and shall not share that
        request.cache_salt = request.request_id
    monkeypatch.setattr("kunserve.engine.regroup.reconfigure.plan_exchange", one_by_one)
    async with two_devices(six_layers, 128, max_model_len=512, overload_policy=policy) as checked:
        answers = await loaded(checked, requests, 1)
        await checked.control.drop()
        assert_same(await answers, its)
        await checked.undo_drops()
        assert checked.engine.scheduler.num_preemptions > 0


async def test_ranges_that_are_resized_at_the_same_time_are_both_resized(six_layers: Path) -> None:
    async with two_devices(six_layers, 64) as checked:
        remap, kv = checked.reconfigure.remap, checked.engine.memories[0].kv
        before = [kv.num_chunks(layer) for layer in range(6)]
        await asyncio.gather(*(remap.resize_kv(0, {layer: 0}) for layer in (1, 3)))
        assert [kv.num_chunks(layer) for layer in range(6)] == [0 if i in (1, 3) else n for i, n in enumerate(before)]
        await asyncio.gather(*(remap.resize_kv(0, {layer: before[layer]}) for layer in (1, 3)))
        assert [kv.num_chunks(layer) for layer in range(6)] == before
