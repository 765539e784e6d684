"""The sequences of one answer: submitted together, read together, and aborted together whatever happens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from api_fakes import FakeEngine, make_app, say
from seeds import seeds

from kunserve.api.say.generation import SLICE, Delivered, Deliveries, submitted
from kunserve.api.wire.admission import Admission
from kunserve.api.wire.backend import ApiSettings
from kunserve.api.wire.context import API, Api
from kunserve.api.wire.turns import Turns
from kunserve.engine.request import Output, Request
from kunserve.engine.schedule.waiting import Waiting
from kunserve.engine.text.stream import Sink
from kunserve.errors import EngineError, OverloadedError
from kunserve.sampling import FinishReason, SamplingParams


def requests(num: int) -> list[Request]:
    return [Request(f"r{i}", [i + 1], SamplingParams(max_tokens=4)) for i in range(num)]


@asynccontextmanager
async def generating(engine: FakeEngine, num: int) -> AsyncIterator[Deliveries]:
    api = make_app(engine)[API]
    async with (
        api.admission.accepted("", num, num) as reservation,
        submitted(api, reservation, requests(num)) as outputs,
    ):
        yield outputs


async def read_all(engine: FakeEngine, num: int) -> None:
    async with generating(engine, num) as outputs:
        async for _ in outputs:
            pass


def aborted(engine: FakeEngine) -> list[str]:
    return [engine.aborted.get_nowait() for _ in range(engine.aborted.qsize())]


@pytest.mark.parametrize("num", [1, 3])
async def test_each_stream_comes_whole_and_in_order(num: int) -> None:
    engine = FakeEngine(lambda request: say("abcd"[: request.prompt_token_ids[0]]))
    texts = [""] * num
    async with generating(engine, num) as outputs:
        async for came in outputs:
            for index, output in came.items():
                texts[index] += output.text
    assert texts == ["a", "ab", "abc"][:num]


async def test_a_refusal_takes_back_what_was_submitted() -> None:
    class Narrow(FakeEngine):
        def submit_to(self, request: Request, sink: Sink) -> None:
            if len(self.requests) == 2:
                raise OverloadedError("full")
            super().submit_to(request, sink)

    engine = Narrow()
    with pytest.raises(OverloadedError):
        await read_all(engine, 3)
    assert aborted(engine) == ["r0", "r1"]


async def test_cancellation_aborts_before_anything_is_awaited() -> None:
    engine = FakeEngine(lambda _: say("a", None))
    started = asyncio.Event()

    async def consume() -> None:
        async with generating(engine, 2) as outputs:
            async for _ in outputs:
                started.set()

    task = asyncio.create_task(consume())
    await started.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert aborted(engine) == ["r0", "r1"]
    await engine.ended()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("error", [EngineError("boom"), RuntimeError("boom")])
async def test_a_failed_stream_leaves_no_task_behind(error: Exception) -> None:
    engine = FakeEngine(lambda r: [error] if r.request_id == "r1" else say("a", None))
    with pytest.raises(type(error), match="boom"):
        await read_all(engine, 3)
    assert aborted(engine) == ["r0", "r1", "r2"]
    await engine.ended()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_nothing_is_read_after_the_final_output() -> None:
    engine = FakeEngine(lambda _: [*say("a", FinishReason.STOP), EngineError("too late")])
    async with generating(engine, 1) as outputs:
        assert [came[0].text async for came in outputs] == ["a"]


async def test_a_reader_that_waits_need_not_wake_for_what_is_taken_at_once() -> None:
    engine, taken, read = FakeEngine(lambda _: say("abcd")), list[Delivered](), list[Delivered]()

    def take(came: Delivered) -> bool:
        if is_slow := "c" in came[0].text:
            return not is_slow
        taken.append(came)
        return True

    async with generating(engine, 2) as outputs:
        outputs.take_now = take
        async for came in outputs:
            read.append(came)
    texts = [["".join(came[i].text for came in part if i in came) for i in range(2)] for part in (taken, read)]
    assert texts == [["abd", "abd"], ["c", "c"]]
    assert all(len(came) == 2 for came in taken)  # what came at once comes together


@pytest.mark.parametrize("seed", seeds(20))
async def test_nothing_is_lost_or_overtaken_between_those_who_take_at_once_and_readers(seed: int) -> None:
    rng = random.Random(seed)
    turns, num = Turns(2), rng.randrange(1, 4)
    deliveries, said, heard = Deliveries(turns, num), [""] * num, [""] * num

    def hear(came: Delivered) -> None:
        for index, output in came.items():
            assert len(output.token_ids) == len(output.text)
            heard[index] += output.text

    def take(came: Delivered) -> bool:
        if is_free := rng.random() < 0.6:
            hear(came)
        return is_free

    async def read() -> None:
        deliveries.take_now = take
        async for came in deliveries:
            hear(came)
            for _ in range(rng.choice((0, 0, 1, 4))):  # it reads slowly
                await asyncio.sleep(0)

    reader = asyncio.create_task(read())
    for step in range(60):
        for index in range(num):
            said[index] += (letter := chr(97 + step % 26))
            if step == 59:
                deliveries.put(index, Output(letter, (step,), finish_reason=FinishReason.LENGTH))
            elif rng.random() < 0.2:
                deliveries.put(index, Output(letter, (step,)))
            else:
                deliveries.put_token(index, letter, step)
        for _ in range(rng.choice((0, 1, 1, 5))):
            await asyncio.sleep(0)
    await reader
    assert heard == said


async def test_what_fails_at_once_ends_the_answer() -> None:
    engine = FakeEngine(lambda _: say("ab", None))

    def take(came: Delivered) -> bool:
        raise RuntimeError("boom")

    async with generating(engine, 1) as outputs:
        outputs.take_now = take
        with pytest.raises(RuntimeError, match="boom"):
            await anext(outputs)


class CountingEngine(FakeEngine):
    """An engine whose requests all stay in the queue."""

    def waiting(self, owner: str | None = None) -> Waiting:
        return Waiting(len(self.requests), len(self.requests))


def counted(engine: CountingEngine, api: Api) -> int:
    """Return how many sequences count as waiting: so many fewer than the bound are still admitted."""
    door = api.admission
    assert isinstance(door, Admission)
    for num in range(api.settings.max_num_queued_reqs, 0, -1):
        try:
            door.check_now("", num, 1)
        except OverloadedError:
            continue
        return api.settings.max_num_queued_reqs - num
    return api.settings.max_num_queued_reqs


async def test_many_sequences_are_submitted_in_turns_and_all_count_from_the_first_to_the_last() -> None:
    num = 2 * SLICE + 5
    engine = CountingEngine()
    api = make_app(engine, ApiSettings(max_num_queued_reqs=num + 1))[API]

    async def consume() -> None:
        async with api.admission.accepted("", num, num) as reservation:
            await api.turns.take()  # the turn in which its body was read
            async with submitted(api, reservation, requests(num)):
                pass

    task = asyncio.create_task(consume())
    seen = [0]
    while not task.done():
        await asyncio.sleep(0)
        if len(engine.requests) != seen[-1]:
            seen.append(len(engine.requests))
        assert counted(engine, api) == num
    assert seen == [0, SLICE, 2 * SLICE, num]


async def test_whoever_leaves_half_submitted_leaves_nothing() -> None:
    engine = CountingEngine()
    api = make_app(engine, ApiSettings(max_num_queued_reqs=999))[API]

    async def consume() -> None:
        num = 5 * SLICE
        async with api.admission.accepted("", num, num) as reservation, submitted(api, reservation, requests(num)):
            raise AssertionError("all were submitted")

    task = asyncio.create_task(consume())
    while len(engine.requests) < 2 * SLICE:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    while engine.aborted.qsize() < len(engine.requests):
        await asyncio.sleep(0)
    assert aborted(engine) == [request.request_id for request in engine.requests]
    engine.requests.clear()
    assert counted(engine, api) == 0
