"""An engine from its start to its end: draining, halting, health, what it shows."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from engine_fakes import ScriptedExecutor, assert_idle, make_request, read, scripted_engine, token_ids

from kunserve.compute.sampler import SampledToken
from kunserve.engine.group import Group
from kunserve.engine.occupancy import Passage
from kunserve.engine.regroup.boundary import Boundary
from kunserve.engine.request import Output, Request
from kunserve.engine.signals import loop_time
from kunserve.engine.step.microbatch import StepInputs
from kunserve.errors import EngineError, OverloadedError
from kunserve.sampling import FinishReason, TokenMask


async def test_stop_drains_what_is_accepted_and_refuses_what_is_new() -> None:
    async with scripted_engine() as (engine, executor):
        stream = engine.submit(make_request(max_tokens=2))
        step = await executor.next_step()
        stopping = asyncio.create_task(engine.stop(drain_s=60))
        await asyncio.sleep(0)
        assert not engine.is_ready
        with pytest.raises(OverloadedError, match="stopping"):
            engine.submit(make_request("late"))
        step.finish(7)
        (await executor.next_step()).finish(8)
        await stopping
        outputs = await read(stream)
        assert token_ids(outputs) == [7, 8] and outputs[-1].finish_reason is FinishReason.LENGTH
        assert not engine.is_running
        assert_idle(engine)


async def test_stop_without_time_to_drain_ends_everything_with_an_error() -> None:
    async with scripted_engine(chunks_per_layer=1) as (engine, executor):
        streams = [engine.submit(make_request(name, 30)) for name in ("running", "waiting")]
        await executor.next_step()
        await engine.stop()
        for stream in streams:
            with pytest.raises(OverloadedError, match="stopping"):
                await read(stream)
        assert not engine.is_running and not engine.scheduler.waiting
        await engine.stop()  # again: nothing happens


async def test_an_engine_that_breaks_ends_every_request_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scripted_engine() as (engine, executor):
        stream = engine.submit(make_request())
        step = await executor.next_step()

        def broken(*_: object) -> None:
            raise RuntimeError("a bug of ours")

        monkeypatch.setattr(engine.scheduler, "schedule", broken)
        step.finish(7)
        assert await anext(stream) == Output("", (7,))
        with pytest.raises(EngineError, match="the engine has stopped"):
            await read(stream)
        assert engine.health() == "the engine has stopped" and not engine.is_ready
        with pytest.raises(OverloadedError):
            engine.submit(make_request("late"))


async def test_a_first_step_after_idle_hours_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scripted_engine() as (engine, executor):
        monkeypatch.setattr("kunserve.engine.engine.loop_time", lambda: loop_time() + 7200.0)
        stream = engine.submit(make_request(max_tokens=1))
        step = await executor.next_step()
        assert engine.health() is None
        step.finish(7)
        await read(stream)


async def test_health_reports_a_stall_only_while_there_is_work() -> None:
    async with scripted_engine(stall_s=-1.0) as (engine, executor):  # any silence is too long
        assert engine.health() is None
        stream = engine.submit(make_request(max_tokens=1))
        step = await executor.next_step()
        assert "no step has finished for 0 s although 1 requests are not done" in str(engine.health())
        step.finish(7)
        await read(stream)
        assert engine.health() is None
    assert engine.health() == "the engine has stopped"


async def test_state_and_stats_say_the_same() -> None:
    async with scripted_engine(num_groups=2, num_stages=2) as (engine, executor):
        request: Request = make_request(num_prompt=9)
        engine.submit(request)
        await executor.next_step()
        state, stats = engine.state(), engine.stats()
        assert [[stage["layers"] for stage in group["stages"]] for group in state["groups"]] == [[[0, 2], [2, 4]]] * 2
        assert sum(group["blocks"]["used"] for group in state["groups"]) == stats.num_used_blocks == 3
        assert sum(group["blocks"]["total"] for group in state["groups"]) == stats.num_blocks == 32
        assert state["requests"]["running"] == stats.num_running == 1
        for device, seen in zip(state["devices"], stats.devices, strict=True):
            chunks = device["chunks"]
            assert chunks["weights"] + chunks["kv"] + chunks["free"] == chunks["budget"] == 400
            assert seen.weight_bytes == chunks["weights"] * device["chunk_bytes"]
            assert seen.kv_bytes == chunks["kv"] * device["chunk_bytes"] > 0


async def test_who_waits_for_a_token_that_nobody_will_accept_is_let_go_when_the_engine_halts() -> None:
    """A device's thread that waits for a grammar's next mask cannot be cancelled: the loop has to tell it."""

    class Grammar:
        def __init__(self) -> None:
            self.is_finished, self.error, self.closed = False, None, asyncio.Event()

        def mask(self, num_accepted: int) -> TokenMask:
            return lambda: None

        def accept(self, token_id: int) -> None:
            pass

        async def decided(self) -> None:
            pass

        def release(self) -> None:
            pass

        def close(self) -> None:
            self.closed.set()

    class Waiting(ScriptedExecutor):
        async def pass_through(self, group: Group, inputs: StepInputs, passage: Passage) -> list[SampledToken]:
            try:
                return await super().pass_through(group, inputs, passage)
            finally:
                await grammar.closed.wait()

    grammar = Grammar()
    async with scripted_engine() as (engine, _):
        engine.executor = executor = Waiting()
        request = make_request()
        request.constraint = grammar
        stream = engine.submit(request)
        await executor.next_step()
        engine.halt()
        async with asyncio.timeout(5):
            with pytest.raises(EngineError, match="has stopped"):
                await read(stream)
            await engine.wait()
        assert not engine.is_running


async def test_a_group_goes_on_when_the_last_who_paused_it_has_left() -> None:
    async with scripted_engine() as (engine, executor):
        boundary = Boundary(engine.fleet, engine.signals, None)
        with suppress(ValueError), boundary.paused(engine.groups):
            stream = engine.submit(make_request(max_tokens=1))
            with boundary.paused(engine.groups):
                await boundary.reached(engine.groups)
            for _ in range(5):
                await asyncio.sleep(0)
            assert executor.num_pending == 0
            raise ValueError
        (await executor.next_step()).finish(7)
        assert token_ids(await read(stream)) == [7]
