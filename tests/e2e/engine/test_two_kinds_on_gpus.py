"""Two kinds of KV on GPUs that are not there: tokens are those of CPU devices, whatever memory moves underneath."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_gpus import Gpus
from transition_harness import patient_with_sound_devices

from e2e.engines import assert_idle, generate, generate_all, greedy, running_engine
from e2e.tiny import TinyModels, random_prompt
from e2e.two_kinds import FAMILIES, SHAPES, is_bounded, rebalance, share_of, watch
from kunserve.config import EngineConfig, parse_devices
from kunserve.engine.launch.launch import Served, launch
from kunserve.engine.step.cuda_executor import CudaExecutor
from kunserve.engine.survive import health

GPU_SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 320,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
    "num_blocks_override": 128,
    "windowed_kv_share": 0.3,
    "is_pinned": True,
}
PROMPTS = [random_prompt(n, seed=n) for n in (5, 40, 130)] + [[*random_prompt(90, seed=9), 7 + i] for i in range(2)]


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wait for GPUs whose arithmetic is the reference's: none of them is ill."""
    monkeypatch.setattr(health, "STEP_FLOOR_S", 60.0)
    with patient_with_sound_devices(lambda _: False):
        yield


def of_cpu(model: object, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """What a CPU device generates where KV is of one kind."""

    async def generated() -> list[list[int]]:
        settings: dict[str, Any] = {"num_blocks_override": 256, "windowed_kv_share": 1.0}
        async with running_engine(model, "cpu:1", enable_prefix_caching=False, **settings) as served:
            return await generate_all(served.engine, prompts, greedy(num_tokens))

    return asyncio.run(generated())


@asynccontextmanager
async def serving(folder: Path, devices: str = "cuda:0,1", **settings: Any) -> AsyncIterator[Served]:
    """An engine on GPUs, whose memory is given back."""
    config = EngineConfig(str(folder), devices=parse_devices(devices), **GPU_SETTINGS | settings)
    served = await launch(config, "tiny", lambda text, share: None)
    try:
        await served.engine.start()
        yield served
    finally:
        await served.engine.stop()
        await served.close()


async def settled(served: Served) -> None:
    while tasks := served.control.tasks:
        await asyncio.wait(set(tasks))
    served.engine.check()


async def through_all(served: Served, num_between: int, modes: Sequence[str]) -> None:
    """Memory moves, groups merge, memory moves, groups come apart, memory moves; requests run all the time."""
    engine, seen = served.engine, [share_of(served.engine)[0]]
    for share, change in ((700, engine.drop), (400, engine.restore), (900, None)):
        for _ in range(num_between):
            await engine.signals.next_commit()
        assert await rebalance(served, share) == "done"
        assert is_bounded(engine)
        seen.append(share_of(engine)[0])
        if change is not None:
            await change()
            assert engine.num_running
            await settled(served)
    assert seen[0] < seen[1] and seen[2] < seen[1] < seen[3]
    drops = [t.exchange_mode for t in served.control.reconfigure.transitions.remembered if t.kind == "drop"]
    assert drops == list(modes)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_a_cpu_through_everything(family: str, gpus: Gpus, tiny_models: TinyModels) -> None:
    """Of attention that reads what was planned for its kind, on two GPUs without a link of their own."""
    folder = tiny_models.folder(family, **SHAPES[family])
    expected = of_cpu(folder, PROMPTS, 60)
    gpus.count, gpus.granularity = 2, 64 << 10

    async def serve() -> None:
        async with serving(folder) as served:
            engine = served.engine
            assert engine.fleet.num_kinds == 2 and isinstance(engine.executor, CudaExecutor)
            assert share_of(engine)[0] < 0.5
            watcher = asyncio.create_task(watch(engine))
            answers = asyncio.create_task(generate_all(engine, PROMPTS, greedy(60)))
            await through_all(served, 8, ["by_request"])
            assert await answers == expected
            assert await generate_all(engine, PROMPTS, greedy(60)) == expected  # with what the cache has
            assert not watcher.done(), watcher.exception()
            watcher.cancel()
            await assert_idle(engine)

    asyncio.run(serve())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("family", ["gemma3", "gpt-oss"])
def test_graphs_read_both_kinds_in_whatever_order_streams_go_on(
    family: str, gpus: Gpus, tiny_models: TinyModels
) -> None:
    """Of captured steps whose work waits in streams: each layer's graph reads the arrays of its kind."""
    folder, prompts = tiny_models.folder(family, **SHAPES[family]), PROMPTS[1:4]
    expected = of_cpu(folder, prompts, 60)
    gpus.count, gpus.granularity, gpus.are_async, gpus.are_peers = 2, 64 << 10, True, True

    async def serve() -> None:
        async with serving(folder) as served:
            engine = served.engine
            assert isinstance(engine.executor, CudaExecutor)
            answers = asyncio.create_task(generate_all(engine, prompts, greedy(60)))
            await through_all(served, 6, ["by_request"])
            assert await answers == expected
            for decoder in engine.executor.decoders:
                assert decoder.graphs is not None and decoder.graphs.num_replays > 0
            await assert_idle(engine)

    asyncio.run(serve())


def test_windows_are_freed_so_that_more_long_requests_run_at_once(gpus: Gpus, tiny_models: TinyModels) -> None:
    """On one GPU in the same memory: with one kind somebody makes way, with two nobody does."""
    folder, preempted = tiny_models.folder("gemma3", **SHAPES["gemma3"]), list[int]()
    gpus.granularity = 64 << 10

    async def serve(share: float) -> None:
        async with serving(folder, "cuda:0", windowed_kv_share=share, num_blocks_override=72) as served:
            prompts = [random_prompt(10, seed=i) for i in range(7)]
            await asyncio.gather(*(generate(served.engine, prompt, greedy(240)) for prompt in prompts))
            preempted.append(served.engine.scheduler.num_preemptions + served.engine.scheduler.swapped.num_swaps)

    for share in (0.3, 1.0):
        asyncio.run(serve(share))
    assert preempted[0] == 0 < preempted[1]
