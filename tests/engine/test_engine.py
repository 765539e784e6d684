"""The engine on scripted devices: every request gets exactly one ending, whatever ends it, and frees its blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from engine_fakes import EOS, ScriptedExecutor, assert_idle, make_request, read, scripted_engine, token_ids
from structlog.testing import capture_logs

from kunserve.compute.sampler import SampledToken
from kunserve.engine.batch import Microbatch
from kunserve.engine.group import Group
from kunserve.engine.occupancy import Occupancy, Passage
from kunserve.engine.request import Output
from kunserve.engine.step.microbatch import StepInputs
from kunserve.engine.survive.retries import MOST_FAILURES
from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.errors import DeviceError, EngineError, InvalidRequestError, OverloadedError
from kunserve.sampling import FinishReason


async def test_a_request_from_submit_to_its_last_token() -> None:
    async with scripted_engine() as (engine, executor):
        request = make_request(num_prompt=5, max_tokens=3)
        stream = engine.submit(request)
        step = await executor.next_step()
        assert (step.num_tokens, step.inputs.positions.tolist()) == (5, [0, 1, 2, 3, 4])
        assert engine.stats().num_running == 1 and engine.stats().num_used_blocks == 2
        engine.check()
        step.finish(7)
        assert await anext(stream) == Output("", (7,))
        step = await executor.next_step()
        assert (step.inputs.token_ids.tolist(), step.inputs.positions.tolist()) == ([7], [5])
        step.finish(8)
        (await executor.next_step()).finish(9)
        outputs = await read(stream)
        assert token_ids(outputs) == [8, 9]
        assert outputs[-1].finish_reason is request.finish_reason is FinishReason.LENGTH
        assert_idle(engine)
        assert executor.num_pending == 0


@pytest.mark.parametrize(
    ("params", "tokens", "reason", "stop_reason"),
    [
        ({}, [7, EOS], FinishReason.STOP, None),
        ({"stop_token_ids": frozenset({7})}, [7], FinishReason.STOP, 7),
        ({"ignore_eos": True}, [EOS, 7, 8], FinishReason.LENGTH, None),
        ({"min_tokens": 2}, [EOS, EOS], FinishReason.STOP, None),
    ],
)
async def test_endings(
    params: dict[str, Any], tokens: list[int], reason: FinishReason, stop_reason: int | None
) -> None:
    async with scripted_engine() as (engine, executor):
        stream = engine.submit(make_request(max_tokens=3, **params))
        for token in tokens:
            (await executor.next_step()).finish(token)
        outputs = await read(stream)
        assert token_ids(outputs) == tokens
        assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (reason, stop_reason)
        assert_idle(engine)


async def test_a_request_ends_at_the_model_length() -> None:
    async with scripted_engine(chunks_per_layer=8, max_num_batched_tokens=256) as (engine, executor):
        stream = engine.submit(make_request(num_prompt=254, max_tokens=50))
        (await executor.next_step()).finish(7)
        (await executor.next_step()).finish(7)
        outputs = await read(stream)
        assert token_ids(outputs) == [7, 7] and outputs[-1].finish_reason is FinishReason.LENGTH
        assert_idle(engine)


async def test_text_ends_at_a_stop_string() -> None:
    async with scripted_engine(tokenizer=Tokenizer.dummy(100)) as (engine, executor):
        stream = engine.submit(make_request(max_tokens=30, stop=("st",)))
        for char in b"first":
            (await executor.next_step()).finish(char - 32)  # the model's vocabulary ends at 100: "FIRST"
        await asyncio.sleep(0)
        engine.abort("r")
        assert "".join(output.text for output in await read(stream)) == "FIRST"
        stream = engine.submit(make_request(max_tokens=30, stop=("ST",)))
        for char in b"FIRST":
            (await executor.next_step()).finish(char)
        outputs = await read(stream)
        assert "".join(output.text for output in outputs) == "FIR"
        assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, "ST")
        assert token_ids(outputs) == list(b"FIRST")
        assert_idle(engine)


async def test_abort_while_waiting_running_and_in_flight() -> None:
    async with scripted_engine(chunks_per_layer=1) as (engine, executor):  # 8 blocks of 4
        running, waiting = make_request("running", 20, 9), make_request("waiting", 20, 9)
        streams = [engine.submit(running), engine.submit(waiting)]
        step = await executor.next_step()
        assert (engine.num_running, len(engine.scheduler.waiting)) == (1, 1)
        engine.abort("waiting")
        assert await read(streams[1]) == [Output(finish_reason=FinishReason.ABORT)]
        assert not engine.scheduler.waiting
        engine.abort("running")
        engine.abort("running")
        engine.abort("unknown")
        assert await read(streams[0]) == [Output(finish_reason=FinishReason.ABORT)]
        assert engine.num_running == 1 and engine.groups[0].num_used == 5  # its step still writes there
        engine.check()
        step.finish(7)
        third = engine.submit(make_request("third", 20, 1))
        (await executor.next_step()).finish(7)
        assert token_ids(await read(third)) == [7]
        assert_idle(engine)


async def finish_all(executor: ScriptedExecutor) -> None:
    while True:
        (await executor.next_step()).finish(7)


async def test_prompt_tokens_count_when_they_are_computed_and_once() -> None:
    async with scripted_engine(chunks_per_layer=1, max_num_batched_tokens=16) as (engine, executor):  # 8 blocks of 4
        metrics = engine.metrics
        streams = [engine.submit(make_request(name, 14, 8)) for name in ("first", "second")]
        assert metrics.num_prompt_tokens == 0  # they have only come
        seen = list[int]()
        while len(seen) < 3:
            step = await executor.next_step()
            engine.check()
            step.finish(7)
            await engine.signals.next_commit()
            seen.append(metrics.num_prompt_tokens)
        assert seen == [16, 28, 28]  # the second prompt in two pieces
        finishing = asyncio.create_task(finish_all(executor))
        assert [len(token_ids(await read(stream))) for stream in streams] == [8, 8]
        finishing.cancel()
        assert engine.scheduler.num_preemptions > 0  # they grew until one had to make way
        assert metrics.num_prompt_tokens == 28  # what was computed again did not count again


async def test_of_a_prompt_that_was_never_finished_only_what_was_computed_counts() -> None:
    async with scripted_engine(chunks_per_layer=4, max_num_batched_tokens=8) as (engine, executor):
        aborted = engine.submit(make_request("aborted", 20, 3))
        (await executor.next_step()).finish()
        engine.submit(make_request("waiting", 20, 3))
        step = await executor.next_step()
        engine.abort("aborted")
        engine.abort("waiting")
        step.finish()
        await read(aborted)
        await engine.signals.next_commit()
        assert engine.metrics.num_prompt_tokens == 16
        failed = engine.submit(make_request("failed", 20, 3))
        for _ in range(MOST_FAILURES):
            (await executor.next_step()).finish()
            (await executor.next_step()).fail(DeviceError("broken"))
        with pytest.raises(EngineError, match="broken"):
            await read(failed)
        assert engine.metrics.num_prompt_tokens == 16 + 8


async def test_an_id_may_be_used_again_while_its_last_user_is_still_in_flight() -> None:
    async with scripted_engine() as (engine, executor):
        for ending in ("finish", "fail"):
            engine.submit(make_request("same", 5, 1))
            step = await executor.next_step()
            engine.abort("same")
            second = make_request("same", 6, 1)
            stream = engine.submit(second)
            if ending == "finish":
                step.finish(3)
            else:
                step.fail(DeviceError("broken"))
            step = await executor.next_step()
            assert step.num_tokens == 6
            step.finish(4)
            assert await read(stream) == [Output("", (4,), (), FinishReason.LENGTH)]
            assert second.output_token_ids == [4]
            assert_idle(engine)


@pytest.mark.parametrize(
    ("error", "message"),
    [(DeviceError("cpu:0: broken"), "cpu:0: broken"), (ValueError("what?"), "a step failed: .*what")],
)
async def test_steps_that_always_fail_end_their_request_and_no_others(error: Exception, message: str) -> None:
    async with scripted_engine(num_groups=2) as (engine, executor):
        streams = {name: engine.submit(make_request(name)) for name in ("a", "b")}
        first, second = await executor.next_step(), await executor.next_step()
        assert {first.group.group_id, second.group.group_id} == {0, 1}
        [name] = [r.request_id for r in first.group.running]
        other = "b" if name == "a" else "a"
        first.fail(error)
        second.finish(7)
        failed = [first.group.group_id]

        async def go_on() -> None:
            while True:
                step = await executor.next_step()
                if [span.request.request_id for span in step.group.in_flight[0].spans] == [name]:
                    failed.append(step.group.group_id)
                    step.fail(error)
                else:
                    step.finish(7)

        going_on = asyncio.create_task(go_on())
        with pytest.raises(EngineError, match=message):
            await read(streams[name])
        assert set(failed) == {0, 1} and len(failed) >= MOST_FAILURES
        assert token_ids(await read(streams[other])) == [7, 7, 7]
        going_on.cancel()
        again = engine.submit(make_request("again", 5, 1))
        (await executor.next_step()).finish(8)
        assert token_ids(await read(again)) == [8]
        assert engine.health() is None
        assert_idle(engine)


async def test_a_request_with_a_failed_chunk_starts_over_when_the_other_one_is_back() -> None:
    async with scripted_engine(num_stages=2, max_num_batched_tokens=8) as (engine, executor):
        request = make_request(num_prompt=20)
        stream = engine.submit(request)
        first, second = await executor.next_step(), await executor.next_step()
        assert (first.num_tokens, second.num_tokens, request.num_in_flight) == (8, 8, 2)
        first.fail(DeviceError("broken"))
        await engine.signals.next_commit()
        assert engine.groups[0].num_used == 5 and request.num_preemptions == 0  # the second chunk still writes
        engine.check()
        second.finish()
        for num_tokens in (8, 8, 4):
            step = await executor.next_step()
            assert step.num_tokens == num_tokens and not request.num_output_tokens
            step.finish(*[7] * len(step.inputs.sampling))
        assert request.num_preemptions == 1
        for _ in range(request.params.max_tokens - 1):
            (await executor.next_step()).finish(7)
        assert token_ids(await read(stream)) == [7] * request.params.max_tokens
        assert engine.metrics.num_prompt_tokens == 20  # each once, when it was really computed
        follower = engine.submit(make_request("next", 5, 1))
        (await executor.next_step()).finish(7)
        assert token_ids(await read(follower)) == [7]
        assert_idle(engine)


async def test_a_chain_has_two_microbatches_in_flight() -> None:
    async with scripted_engine(num_stages=2) as (engine, executor):
        streams = [engine.submit(make_request(name, 4, 2)) for name in ("a", "b")]
        (await executor.next_step()).finish(7, 8)
        first, second = await executor.next_step(), await executor.next_step()
        assert [first.inputs.token_ids.tolist(), second.inputs.token_ids.tolist()] == [[7], [8]]
        assert len(first.inputs.block_tables) == 2
        assert engine.groups[0].num_in_flight == 2
        second.finish(10)
        first.finish(9)
        assert [token_ids(await read(stream)) for stream in streams] == [[7, 9], [8, 10]]
        assert_idle(engine)


async def test_preemption_recomputes_and_repeats_nothing() -> None:
    with capture_logs() as logged:
        async with scripted_engine(chunks_per_layer=1) as (engine, executor):  # 8 blocks of 4
            streams = [engine.submit(make_request(name, 12, 9)) for name in ("a", "b")]
            outputs = [asyncio.create_task(read(stream)) for stream in streams]
            recomputed, token = [], 20
            while not all(task.done() for task in outputs):
                step = await executor.next_step()
                engine.check()
                recomputed += [row.output_token_ids for row in step.inputs.sampling if step.num_tokens > 2]
                num_rows = len(step.inputs.sampling)
                step.finish(*range(token, token + num_rows))
                token += num_rows
                for _ in range(4):
                    await asyncio.sleep(0)  # until the commit is done
            a, b = (token_ids(task.result()) for task in outputs)
            assert len(a) == len(b) == 9 and sorted(a + b) == list(range(20, 38))  # each sampled once, given out once
            assert engine.scheduler.num_preemptions == 1
            assert [len(output) for output in recomputed] == [0, 0, 5]
            assert_idle(engine)
    [who] = [entry for entry in logged if entry["event"] == "preempted"]
    assert who["request"] in ("a", "b") and who["times"] == 1 and who["lost_tokens"] >= 12


async def test_a_full_queue_refuses() -> None:
    async with scripted_engine(chunks_per_layer=1, max_num_queued_reqs=2) as (engine, executor):
        running = engine.submit(make_request("running", 30, 1))
        step = await executor.next_step()
        streams = [engine.submit(make_request(f"w{i}", 30, 1)) for i in range(2)]
        with pytest.raises(OverloadedError, match="2 requests are waiting already") as caught:
            engine.submit(make_request("late", 30, 1))
        assert caught.value.retry_after_s is not None and caught.value.status == 503
        step.finish(7)
        for _ in streams:
            (await executor.next_step()).finish(7)
        assert [token_ids(await read(stream)) for stream in (running, *streams)] == [[7]] * 3
        assert b'reason="queue_full"} 1.0' in engine.metrics.render()
        assert_idle(engine)


@pytest.mark.parametrize("num_prompt", [0, 256, 1000])
async def test_a_prompt_that_cannot_fit_is_refused(num_prompt: int) -> None:
    async with scripted_engine() as (engine, _):
        with pytest.raises(InvalidRequestError, match=f"{num_prompt} tokens; between 1 and 255") as caught:
            engine.submit(make_request(num_prompt=num_prompt))
        assert caught.value.param == "prompt"
        assert_idle(engine)


async def test_an_id_in_use_is_refused_and_its_owner_unharmed() -> None:
    async with scripted_engine() as (engine, executor):
        stream = engine.submit(make_request("same", 5, 1))
        with pytest.raises(InvalidRequestError, match="'same' is in use"):
            engine.submit(make_request("same", 5, 1))
        (await executor.next_step()).finish(7)
        assert token_ids(await read(stream)) == [7]
        assert_idle(engine)


async def test_seeds_are_the_requests_or_drawn() -> None:
    async with scripted_engine() as (engine, _):
        requests = [make_request("a", seed=5), make_request("b"), make_request("c")]
        for request in requests:
            engine.submit(request)
        assert requests[0].seed == 5 and requests[1].seed != requests[2].seed


async def test_an_executor_that_does_not_say_where_a_microbatch_is_fails_its_first_step() -> None:
    class Forgetful(ScriptedExecutor):
        async def pass_through(self, group: Group, inputs: StepInputs, passage: Passage) -> list[SampledToken]:
            return await super().pass_through(group, inputs, Passage(Occupancy(2), lambda: 0.0))

    async with scripted_engine(num_stages=2) as (engine, _):
        engine.executor = executor = Forgetful()
        stream = engine.submit(make_request())
        for _ in range(MOST_FAILURES):
            (await executor.next_step()).finish(7)
        with pytest.raises(EngineError, match="nobody has said when the microbatch was at stages"):
            await read(stream)


async def test_a_prompt_that_comes_to_an_idle_chain_fills_it_at_once() -> None:
    async with scripted_engine(num_stages=2, max_num_batched_tokens=4) as (engine, executor):
        await asyncio.sleep(0)  # the engine has looked at all groups, and waits
        stream = engine.submit(make_request(num_prompt=8, max_tokens=1))
        first = await executor.next_step()
        assert executor.num_pending == 1
        first.finish()
        (await executor.next_step()).finish(7)
        assert token_ids(await read(stream)) == [7]
        assert_idle(engine)


async def test_only_groups_with_something_to_do_are_scheduled() -> None:
    async with scripted_engine(num_groups=3, num_ahead=1) as (engine, executor):
        streams = [engine.submit(make_request(name, 60, max_tokens)) for name, max_tokens in (("a", 2), ("b", 1))]
        streams += [engine.submit(make_request(name, 60, 1)) for name in ("c", "head")]
        steps = [await executor.next_step() for _ in range(4)]  # two of the first: it runs ahead
        seen = list[int]()
        schedule = engine.scheduler.schedule

        def noted(group: Group, groups: Sequence[Group], epoch: int) -> Microbatch | None:
            seen.append(group.group_id)
            return schedule(group, groups, epoch)

        engine.scheduler.schedule = noted  # type: ignore[method-assign]
        of = {step.group.group_id: step for step in reversed(steps)}
        of[0].finish(7)
        assert (await anext(streams[0])).token_ids == (7,)
        await asyncio.sleep(0)
        assert set(seen) == {0} and engine.scheduler.num_waiting == 1  # the others have a slot, but no room
        of[1].finish(8)
        steps.append(await executor.next_step())
        assert steps[-1].group.group_id == 1
        for step in steps:
            if not step.done.done():
                step.finish(9)
        assert [len(token_ids(await read(stream))) for stream in streams] == [1, 1, 1, 1]
        assert_idle(engine)
