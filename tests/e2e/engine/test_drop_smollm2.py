"""The embedded model across a drop and a restore: its greedy output is transformers', and the pair holds the burst."""

from __future__ import annotations

import asyncio

from e2e.engines import assert_idle, generate_all, greedy, new_request, running_engine
from kunserve.engine.request import Request


async def test_a_drop_and_a_restore_change_no_token(
    smollm2_prompts: list[list[int]], smollm2_greedy: list[list[int]]
) -> None:
    settings = {"num_blocks_override": 256, "max_model_len": 2048, "is_pinned": True}
    async with running_engine("smollm2-135m", "cpu:2", **settings) as served:
        engine, control = served.engine, served.control
        answers = asyncio.create_task(generate_all(engine, smollm2_prompts, greedy(64)))
        num_dropped = num_restored = 0
        for _ in range(2):
            for _ in range(6):
                await engine.signals.next_commit()
            await engine.drop()
            num_dropped += engine.num_running
            await asyncio.wait(control.tasks)  # its KV is exchanged
            for _ in range(6):
                await engine.signals.next_commit()
            await engine.restore()
            num_restored += engine.num_running
            await asyncio.wait(control.tasks)
        assert num_dropped >= 30 and num_restored >= 30  # most of them were there each time
        assert await answers == smollm2_greedy
        outcomes = [(t.kind, t.outcome, t.exchange_bytes > 0) for t in control.reconfigure.transitions.remembered]
        assert outcomes == [("drop", "done", True), ("restore", "done", True)] * 2
        assert len(engine.groups) == 2 and engine.scheduler.num_preemptions == 0
        await assert_idle(engine)


async def test_a_pair_holds_what_it_was_merged_for() -> None:
    """4,096 tokens of KV on each device, and requests that ask for 15,000 when they merge."""
    requests = [new_request([100 + i] * 300, greedy(4)) for i in range(50)]
    async with running_engine("smollm2-135m", "cpu:2", num_blocks_override=256, is_pinned=True) as served:
        engine = served.engine
        assert [group.num_blocks * group.block_size for group in engine.groups] == [4096, 4096]
        for request in requests:
            engine.submit(request)
        await engine.signals.next_commit()
        await engine.drop()
        for request in requests:
            engine.abort(request.request_id)
        await asyncio.wait(served.control.tasks)
        await assert_idle(engine)
        (group,) = engine.groups
        whole = Request("whole", [1] * 15_000, greedy(1))
        engine.fleet.admit(whole, group)
        engine.check()
        engine.fleet.release(whole)
        engine.check()
