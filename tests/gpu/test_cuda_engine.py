"""The whole engine on CUDA devices that are not there: same tokens through drop, exchange, restore; no rule broken."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch
from fake_cuda import GRANULARITY, FakeCuda

from kunserve.engine.block_pool import BlockPool
from kunserve.engine.control import OverloadControl
from kunserve.engine.cuda_executor import CudaExecutor
from kunserve.engine.cuda_machine import CudaMachine, CudaOptions, full_step
from kunserve.engine.engine import Engine, ServingLimits
from kunserve.engine.group import Group, Stage
from kunserve.engine.placement import model_shape
from kunserve.engine.policy import OverloadPolicy, make_policy
from kunserve.engine.reconfigure import Reconfigure
from kunserve.engine.request import Request, SamplingParams, TokenMask
from kunserve.engine.scheduler import Limits, Scheduler
from kunserve.errors import ConfigError
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.kv_memory import KVShape
from kunserve.gpu.links import Links
from kunserve.metrics import Metrics
from kunserve.model.checkpoint import DummySource
from kunserve.model.config import ModelConfig
from kunserve.model.layout import units_of_stage, weight_units
from kunserve.planner.overload import Thresholds
from kunserve.planner.snapshot import Origin, StageView

MODEL = ModelConfig("llama", 300, 64, 96, 4, 4, 2, 16, 256)
BLOCK, MAX_LEN = 8, 200
OPTIONS = CudaOptions((0, 0), torch.float32, BLOCK, 48, 8, memory_bytes=20 * GRANULARITY)


@asynccontextmanager
async def serving(drivers: list[FakeCuda], num_ahead: int = 1) -> AsyncIterator[Engine]:
    """Two groups of one device each, that regroup when told to."""
    unopened = iter(drivers)
    machine = CudaMachine(MODEL, OPTIONS, lambda ordinal: next(unopened), lambda *_: 0)
    shape = KVShape.of(MODEL, BLOCK, torch.float32)
    chunks = model_shape(MODEL, shape, machine.chunk_bytes)
    views, devices = machine.views(chunks), machine.open()
    units = weight_units(MODEL, 4)
    memories = [DeviceMemory(device, units, MODEL.num_layers, shape, torch.float32) for device in devices]
    source = machine.source(DummySource(MODEL))
    groups = []
    for i, memory in enumerate(memories):
        for unit in units_of_stage(MODEL, 0, MODEL.num_layers):
            memory.weights.map(unit)
            memory.weights.fill(unit, source)
        for layer in range(MODEL.num_layers):
            memory.kv.resize(layer, chunks.kv_chunks(machine.num_chunks, 0, MODEL.num_layers))
        stage = Stage(i, 0, MODEL.num_layers, BlockPool(memory.kv.num_blocks(0)))
        groups.append(Group(i, (stage,), BLOCK, origin=Origin((StageView(i, 0, MODEL.num_layers),))))
    executor, _ = machine.executor(memories, MAX_LEN)
    scheduler = Scheduler(Limits(48, 8, num_ahead), make_policy(OverloadPolicy.RECOMPUTE, 0.0))
    metrics = Metrics("tiny", MAX_LEN, lambda: engine.stats())
    engine = Engine(MODEL, ServingLimits(MAX_LEN, 64), scheduler, groups, memories, executor, None, metrics)
    reconfigure = Reconfigure(engine, chunks, source, Links())
    engine.control = OverloadControl(engine, reconfigure, chunks, views, Thresholds(), is_automatic=False)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
        machine.close()


async def generate(engine: Engine, i: int) -> tuple[int, ...]:
    temperature = 0.0 if i % 2 else 0.8
    penalty = 0.5 * (i % 3 == 0)  # then tokens depend on those before, which the host does not know yet
    params = SamplingParams(60, temperature=temperature, seed=i, ignore_eos=True, presence_penalty=penalty)
    prompt = [(7 * i + k) % 300 for k in range(3 + 9 * i)]
    tokens: tuple[int, ...] = ()
    async for output in engine.submit(Request(str(i), prompt, params)):
        tokens += output.token_ids
    return tokens


async def tokens_through(engine: Engine, *, regroup: bool) -> list[tuple[int, ...]]:
    requests = [asyncio.ensure_future(generate(engine, i)) for i in range(6)]
    if regroup:
        while sum(len(group.running) for group in engine.groups) < 6:
            await engine.next_commit()
        for change in (engine.drop, engine.restore, engine.drop):
            await change()
            for _ in range(4):
                await engine.next_commit()
            while engine.state()["transitions"][-1]["outcome"] == "running":
                await engine.next_commit()
            engine.check()
    return await asyncio.gather(*requests)


async def test_same_tokens_whatever_happens_underneath() -> None:
    drivers = [FakeCuda(), FakeCuda()]
    async with serving(drivers, num_ahead=0) as engine:
        expected = await tokens_through(engine, regroup=False)
    async with serving(drivers := [FakeCuda(), FakeCuda()]) as engine:
        assert await tokens_through(engine, regroup=True) == expected
        outcomes = [(t["kind"], t["outcome"]) for t in engine.state()["transitions"]]
        assert outcomes == [("drop", "done"), ("restore", "done"), ("drop", "done")]
        assert isinstance(engine.executor, CudaExecutor)
    assert all(len(tokens) == 60 for tokens in expected) and len(set(expected)) == 6
    assert all(driver.calls["unmap"] > 0 and driver.calls["create"] == driver.calls["release"] for driver in drivers)


async def test_prompts_are_scored() -> None:
    async with serving([FakeCuda(), FakeCuda()]) as engine:
        params = SamplingParams(3, temperature=0, num_prompt_logprobs=0, presence_penalty=0.5, ignore_eos=True)
        prompt = [(7 * k) % 300 for k in range(90)]  # in two steps, each in two slices
        outputs = [output async for output in engine.submit(Request("r", prompt, params))]
        assert [scored.token_id for scored in outputs[0].prompt_logprobs] == prompt[1:]
        assert len([token for output in outputs for token in output.token_ids]) == 3


class HeldGrammar:
    """A grammar that allows everything, but only when it is told to."""

    is_finished, error = False, None

    def __init__(self) -> None:
        self.is_asked, self.may_answer = threading.Event(), threading.Event()

    def mask(self, num_accepted: int) -> TokenMask:
        def wait() -> None:
            self.is_asked.set()
            assert self.may_answer.wait(10)

        return wait

    def accept(self, token_id: int) -> None:
        pass

    async def settled(self) -> None:
        pass

    def close(self) -> None:
        pass


async def test_a_row_that_the_host_looks_at_holds_up_no_launch() -> None:
    async with serving([FakeCuda(), FakeCuda()]) as engine:
        expected = await generate(engine, 1)
        grammar = HeldGrammar()
        params = SamplingParams(60, temperature=0.0, seed=1, ignore_eos=True)
        request = Request("held", [(7 + k) % 300 for k in range(12)], params, constraint=grammar)
        stream = engine.submit(request)
        while not grammar.is_asked.is_set():
            await asyncio.sleep(0)
        assert isinstance(engine.executor, CudaExecutor)
        for device in engine.executor.devices:  # one of them is where the request waits
            assert await device.run(lambda: 7) == 7
        assert request.num_output_tokens == 0
        grammar.may_answer.set()
        assert tuple([token async for output in stream for token in output.token_ids]) == expected


async def test_a_step_that_fails_ends_its_requests_and_not_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving([FakeCuda(), FakeCuda()]) as engine:
        expected = await generate(engine, 1)
        assert isinstance(engine.executor, CudaExecutor)
        for decoder in engine.executor.decoders:
            monkeypatch.setattr(decoder, "forward", lambda *_, **__: 1 // 0)
        with pytest.raises(Exception, match="a step failed"):
            await generate(engine, 1)
        monkeypatch.undo()
        assert await generate(engine, 1) == expected


def test_too_little_memory_closes_the_drivers() -> None:
    drivers = [FakeCuda(total_bytes=30 * GRANULARITY), FakeCuda(total_bytes=30 * GRANULARITY)]
    unopened = iter(drivers)
    with pytest.raises(ConfigError, match=r"--device-memory asks for 2 x 40 MiB .* 60 of 60 MiB are free"):
        CudaMachine(MODEL, OPTIONS, lambda ordinal: next(unopened), lambda *_: 0)
    assert not any(driver.is_open for driver in drivers)


@pytest.mark.parametrize(("num_tokens", "num_seqs"), [(48, 8), (50, 8), (7, 7), (33, 1)])
def test_the_largest_step_is_a_batch_like_any_other(num_tokens: int, num_seqs: int) -> None:
    ids, batch, rows = full_step(num_tokens, num_seqs, BLOCK)
    lens = batch.cu_seqlens_q.diff()
    assert len(ids) == len(batch.positions) == int(lens.sum()) == num_tokens and len(rows) == num_seqs
    assert torch.equal(lens, batch.context_lens) and int(lens.max() - lens.min()) <= 1
    assert torch.equal(batch.positions[rows], batch.context_lens - 1)
    used = [
        int(b) for table, n in zip(batch.block_tables, batch.context_lens, strict=True) for b in table[: -(-n // 8)]
    ]
    assert len(set(used)) == len(used) and max(used) < -(-num_tokens // BLOCK) + num_seqs
