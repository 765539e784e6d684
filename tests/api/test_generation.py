from __future__ import annotations

import asyncio

import pytest
from api_fakes import FakeEngine, say

from kunserve.api.generation import submitted
from kunserve.engine.request import FinishReason, Output, Request, SamplingParams
from kunserve.errors import EngineError, OverloadedError


def requests(num: int) -> list[Request]:
    return [Request(f"r{i}", [i + 1], SamplingParams(max_tokens=4)) for i in range(num)]


async def read_all(engine: FakeEngine, num: int) -> None:
    async with submitted(engine, requests(num)) as outputs:
        async for _ in outputs:
            pass


def aborted(engine: FakeEngine) -> list[str]:
    return [engine.aborted.get_nowait() for _ in range(engine.aborted.qsize())]


@pytest.mark.parametrize("num", [1, 3])
async def test_each_stream_comes_whole_and_in_order(num: int) -> None:
    engine = FakeEngine(lambda request: say("abcd"[: request.prompt_token_ids[0]]))
    texts = [""] * num
    async with submitted(engine, requests(num)) as outputs:
        async for index, output in outputs:
            texts[index] += output.text
    assert texts == ["a", "ab", "abc"][:num]


async def test_a_refusal_takes_back_what_was_submitted() -> None:
    class Narrow(FakeEngine):
        def submit(self, request: Request):  # type: ignore[no-untyped-def]
            if len(self.requests) == 2:
                raise OverloadedError("full")
            return super().submit(request)

    engine = Narrow()
    with pytest.raises(OverloadedError):
        await read_all(engine, 3)
    assert aborted(engine) == ["r0", "r1"]


async def test_cancellation_aborts_before_anything_is_awaited() -> None:
    engine = FakeEngine(lambda _: say("a", None))
    started = asyncio.Event()

    async def consume() -> None:
        async with submitted(engine, requests(2)) as outputs:
            async for _ in outputs:
                started.set()

    task = asyncio.create_task(consume())
    await started.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert aborted(engine) == ["r0", "r1"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_failed_stream_leaves_no_task_behind() -> None:
    engine = FakeEngine(lambda r: [EngineError("boom")] if r.request_id == "r1" else say("a", None))
    with pytest.raises(EngineError, match="boom"):
        await read_all(engine, 3)
    assert aborted(engine) == ["r0", "r1", "r2"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("num", [1, 2])
async def test_an_engine_that_ends_without_a_final_output(num: int) -> None:
    class Hasty(FakeEngine):
        async def _outputs(self, request: Request):  # type: ignore[no-untyped-def]
            yield Output("a", (97,))

    with pytest.raises(EngineError, match="final output"):
        await read_all(Hasty(), num)


async def test_nothing_is_read_after_the_final_output() -> None:
    engine = FakeEngine(lambda _: [*say("a", FinishReason.STOP), EngineError("too late")])
    async with submitted(engine, requests(1)) as outputs:
        assert [output.text async for _, output in outputs] == ["a"]
