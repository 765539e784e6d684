"""The whole engine on CUDA devices that are not there: same tokens through drop, exchange, restore; no rule broken."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from cost_models import COST
from fake_cuda import GRANULARITY, FakeCuda

from kunserve.compute.cuda import sampling
from kunserve.compute.cuda.decoder import CudaDecoder
from kunserve.compute.cuda.sampling import PendingTokens
from kunserve.compute.sampler import SamplingRow, is_adjusted
from kunserve.engine.batch import Microbatch
from kunserve.engine.blocks.block_pool import BlockPool
from kunserve.engine.engine import Engine
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group, Stage
from kunserve.engine.launch.assemble import make_control
from kunserve.engine.launch.cuda_machine import CudaMachine, CudaOptions, full_step
from kunserve.engine.launch.placement import model_shape
from kunserve.engine.regroup.control import OverloadControl
from kunserve.engine.regroup.weight_loader import WeightLoader
from kunserve.engine.request import Request
from kunserve.engine.schedule.policy import make_policy
from kunserve.engine.schedule.scheduler import Scheduler, SchedulerLimits
from kunserve.engine.serving_limits import ServingLimits
from kunserve.engine.signals import Signals, loop_time
from kunserve.engine.step.cuda_executor import CudaExecutor
from kunserve.engine.step.own_steps import OwnSteps
from kunserve.errors import ConfigError, EngineError
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.kv_memory import KVShape
from kunserve.gpu.links import Links
from kunserve.model.checkpoint import DummySource
from kunserve.model.config import ModelConfig
from kunserve.model.layout import units_of_stage, weight_units
from kunserve.observe.metrics import Metrics
from kunserve.planner.microbatch import Lookahead
from kunserve.planner.overload import Thresholds
from kunserve.planner.snapshot import Lineage, StageView
from kunserve.policies import OverloadPolicy
from kunserve.sampling import SamplingParams, TokenMask
from kunserve.sizes import ceil_div

MODEL = ModelConfig("llama", 300, 64, 96, 4, 4, 2, 16, 256)
BLOCK, MAX_LEN = 8, 200
OPTIONS = CudaOptions((0, 0), torch.float32, torch.float32, BLOCK, 48, 8, memory_bytes=20 * GRANULARITY)


@asynccontextmanager
async def serving(drivers: list[FakeCuda], num_ahead: int = 1) -> AsyncIterator[Engine]:
    """Two groups of one device each, that regroup when told to."""
    unopened = iter(drivers)
    options = replace(OPTIONS, ordinals=tuple(driver.ordinal for driver in drivers))
    machine = CudaMachine(MODEL, options, lambda ordinal: next(unopened), lambda *_: 0)
    shape = KVShape.of(MODEL, BLOCK, torch.float32)
    chunks = model_shape(MODEL, shape, machine.chunk_bytes)
    views, devices = machine.views(chunks), machine.open()
    units = weight_units(MODEL, "float32")
    memories = [DeviceMemory(device, units, MODEL.num_layers, shape) for device in devices]
    loader = WeightLoader(memories, machine.host_weights(DummySource(MODEL)))
    groups = []
    for i, memory in enumerate(memories):
        for unit in units_of_stage(MODEL, 0, MODEL.num_layers):
            memory.weights.map(unit)
            await loader.load(i, unit, Links())
        for layer in range(MODEL.num_layers):
            memory.kv.resize(layer, chunks.kv_chunks(machine.num_chunks, 0, MODEL.num_layers))
        stage = Stage(i, 0, MODEL.num_layers, BlockPool(memory.kv.num_blocks(0)))
        groups.append(Group(i, (stage,), BLOCK, lineage=Lineage((StageView(i, 0, MODEL.num_layers),))))
    executor, _ = machine.executor(memories, MAX_LEN)
    fleet, signals = Fleet(groups), Signals()
    scheduler = Scheduler(fleet, SchedulerLimits(48, 8, num_ahead), make_policy(OverloadPolicy.RECOMPUTE, 0.0))
    metrics = Metrics("tiny", MAX_LEN, lambda: engine.stats())
    limits = ServingLimits(MAX_LEN, 64)
    engine = Engine(MODEL, limits, fleet, scheduler, memories, executor, signals, None, metrics)
    engine.control = make_control(engine, chunks, views, loader, Links(), Thresholds(), print, is_automatic=False)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
        machine.close()


async def generate(engine: Engine, i: int, num_tokens: int = 60) -> tuple[int, ...]:
    temperature = 0.0 if i % 2 else 0.8
    penalty = 0.5 * (i % 3 == 0)  # then tokens depend on those before, which the host does not know yet
    params = SamplingParams(num_tokens, temperature=temperature, seed=i, ignore_eos=True, presence_penalty=penalty)
    prompt = [(7 * i + k) % 300 for k in range(3 + 9 * i)]
    tokens: tuple[int, ...] = ()
    async for output in engine.submit(Request(str(i), prompt, params)):
        tokens += output.token_ids
    return tokens


async def generate_greedily(engine: Engine, i: int, num_tokens: int = 60) -> tuple[int, ...]:
    """Answer as a graph of decode steps can choose it by itself."""
    prompt = [(7 * i + k) % 300 for k in range(3 + 9 * i)]
    request = Request(str(i), prompt, SamplingParams(num_tokens, temperature=0.0, ignore_eos=True))
    return tuple([token async for output in engine.submit(request) for token in output.token_ids])


Ask = Callable[[Engine, int], Coroutine[Any, Any, tuple[int, ...]]]


async def tokens_through(engine: Engine, *, regroup: bool, ask: Ask = generate) -> list[tuple[int, ...]]:
    requests = [asyncio.ensure_future(ask(engine, i)) for i in range(6)]
    if regroup:
        while sum(len(group.running) for group in engine.groups) < 6:
            await engine.signals.next_commit()
        for change in (engine.drop, engine.restore, engine.drop):
            await change()
            for _ in range(4):
                await engine.signals.next_commit()
            assert isinstance(engine.control, OverloadControl)
            while tasks := engine.control.tasks:
                await asyncio.wait(set(tasks))
            engine.check()
    return await asyncio.gather(*requests)


@pytest.mark.parametrize("ask", [generate, generate_greedily])
async def test_same_tokens_whatever_happens_underneath(ask: Ask) -> None:
    drivers = [FakeCuda(), FakeCuda()]
    async with serving(drivers, num_ahead=0) as engine:
        expected = await tokens_through(engine, regroup=False, ask=ask)
    async with serving(drivers := [FakeCuda(), FakeCuda()]) as engine:
        assert await tokens_through(engine, regroup=True, ask=ask) == expected
        outcomes = [(t["kind"], t["outcome"]) for t in engine.state()["transitions"]]
        assert outcomes == [("drop", "done"), ("restore", "done"), ("drop", "done")]
        assert isinstance(engine.executor, CudaExecutor)
    assert all(len(tokens) == 60 for tokens in expected) and len(set(expected)) == 6
    assert all(driver.calls["unmap"] > 0 and driver.calls["create"] == driver.calls["release"] for driver in drivers)


async def chained(engine: Engine) -> Group:
    """Merge both groups; the chain that they become."""
    await engine.drop()
    while engine.state()["transitions"][-1]["outcome"] == "running":
        await asyncio.sleep(0)
    [chain] = engine.groups
    return chain


async def test_the_bubbles_of_a_chain_are_measured() -> None:
    async with serving([FakeCuda(), FakeCuda()]) as engine:
        chain = await chained(engine)
        await asyncio.gather(*(generate(engine, i) for i in range(6)))
        busy_s, active_s = chain.occupancy.busy_s(loop_time()), chain.occupancy.active_s(loop_time())
        assert all(0 < seconds <= active_s for seconds in busy_s)
        [stats] = engine.stats().groups
        assert stats.bubble_share == pytest.approx(1 - sum(busy_s) / (2 * active_s)) and stats.bubble_share > 0


async def test_the_gpus_say_how_long_each_stage_has_worked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is asked, and no longer than a stage has had work."""
    measured = list[list[float]]()

    class Measured(OwnSteps):
        def keep(self, group: Group, batch: Microbatch, stage_s: Sequence[float]) -> bool:
            if len(group.stages) == 2:
                measured.append(list(stage_s))
            return super().keep(group, batch, stage_s)

    async with serving([FakeCuda(), FakeCuda()]) as engine:
        engine.own_steps = Measured(Lookahead(COST, MODEL.num_layers, 48), shares_head=False)
        chain = await chained(engine)
        await asyncio.gather(*(generate(engine, i) for i in range(6)))
        assert len(measured) > 8 and all(seconds > 0 for stage_s in measured for seconds in stage_s)
        busy_s = chain.occupancy.busy_s(loop_time())
        assert all(sum(s) < most for s, most in zip(zip(*measured, strict=True), busy_s, strict=True))


async def test_a_stage_has_work_until_its_gpu_is_done_whatever_was_launched_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drivers = [FakeCuda(), FakeCuda()]
    async with serving(drivers) as engine:
        chain = await chained(engine)
        assert isinstance(engine.executor, CudaExecutor)
        has_launched_last = threading.Event()
        first, last = engine.executor.decoders
        stream = engine.executor.devices[0].compute.stream
        monkeypatch.setattr(first, "forward", _then(first.forward, lambda: drivers[0].submit(stream)))
        monkeypatch.setattr(last, "forward", _then(last.forward, has_launched_last.set))
        answer = asyncio.ensure_future(generate(engine, 1, 1))
        while not has_launched_last.is_set():
            await asyncio.sleep(0)
        assert chain.occupancy.counts == (1, 0) and not answer.done()
        drivers[0].complete(stream)
        assert len(await answer) == 1 and chain.occupancy.counts == (0, 0)
        assert all(chain.occupancy.busy_s(loop_time()))


def _then(call: Callable[..., torch.Tensor], and_then: Callable[[], None]) -> Callable[..., torch.Tensor]:
    def both(*args: Any, **more: Any) -> torch.Tensor:
        result = call(*args, **more)
        and_then()
        return result

    return both


async def test_rows_are_asked_once_in_a_step_how_they_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by each stage, nor again where tokens are chosen: at 256 rows each time takes 80 us of the interpreter."""
    num_asked = num_rows = 0
    launch_tokens = CudaDecoder.launch_tokens

    def counted(row: SamplingRow) -> bool:
        nonlocal num_asked
        num_asked += 1
        return is_adjusted(row)

    def launched(self: CudaDecoder, *given: Any) -> PendingTokens:
        nonlocal num_rows
        num_rows += len(given[-1])
        return launch_tokens(self, *given)

    monkeypatch.setattr(sampling, "is_adjusted", counted)
    monkeypatch.setattr(CudaDecoder, "launch_tokens", launched)
    async with serving([FakeCuda(), FakeCuda()]) as engine:
        await chained(engine)
        answers = await asyncio.gather(*(generate(engine, i, 20) for i in (1, 2, 5)))  # greedy, and drawn
        assert all(len(answer) == 20 for answer in answers)
    assert num_asked == num_rows >= 60


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

    async def decided(self) -> None:
        pass

    def release(self) -> None:
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


BAD = 299  # a token whose embedding is no number
FAULTS = {
    "found on the device": (SamplingParams(60, temperature=0.0, ignore_eos=True), [5, BAD, 6]),
    "drawn on the device": (SamplingParams(60, temperature=0.7, seed=1, ignore_eos=True), [5, BAD, 6]),
    "found on the host": (SamplingParams(60, temperature=0.7, top_k=3, seed=1, ignore_eos=True), [5, BAD, 6]),
    "left without a token": (SamplingParams(60, min_tokens=9, stop_token_ids=frozenset(range(300))), [5, 6]),
    "in a later token": (SamplingParams(60, temperature=0.0, allowed_token_ids=(BAD,)), [5, 6]),
    "in a prompt that is scored": (SamplingParams(60, temperature=0.0, num_prompt_logprobs=1), [5, BAD, 6]),
}


@pytest.mark.parametrize("is_host_sampled", [False, True])
@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("num_ahead", [0, 1])
async def test_a_bad_row_ends_its_request_alone(num_ahead: int, num_groups: int, is_host_sampled: bool) -> None:
    async with serving([FakeCuda(), FakeCuda()], num_ahead) as engine:
        assert isinstance(engine.executor, CudaExecutor)
        for memory in engine.memories:
            memory.weights.tensor("embed", "model.embed_tokens.weight")[BAD] = torch.nan
        if num_groups == 1:
            await engine.drop()

        async def neighbour(i: int) -> tuple[int, ...]:
            params = SamplingParams(20, temperature=0.8 * (i % 2), top_p=0.9 if is_host_sampled else 1, seed=i)
            request = Request(f"n{i}", [(7 * i + k) % 299 for k in range(3 + i)], replace(params, ignore_eos=True))
            return tuple([token async for output in engine.submit(request) for token in output.token_ids])

        expected = await asyncio.gather(*map(neighbour, range(4)))
        for name, (params, prompt) in FAULTS.items():
            asked = [neighbour(i) for i in range(4)]

            async def fail(prompt: list[int] = prompt, params: SamplingParams = params) -> None:
                with pytest.raises(EngineError, match="largest logit is not finite"):
                    async for _ in engine.submit(Request("bad", prompt, params)):
                        pass

            *found, _ = await asyncio.gather(asked[0], asked[1], asked[2], asked[3], fail())
            assert found == expected, name
        while any(group.num_in_flight for group in engine.groups):
            await engine.signals.next_commit()
        assert engine.num_running == 0 and all(group.num_used == 0 for group in engine.groups)
        engine.check()


def test_too_little_memory_closes_the_drivers() -> None:
    drivers = [FakeCuda(total_bytes=30 * GRANULARITY), FakeCuda(total_bytes=30 * GRANULARITY)]
    unopened = iter(drivers)
    with pytest.raises(ConfigError, match=r"--device-memory asks for 2 x 40 MiB .* 60 MiB of 60 MiB are free"):
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
        int(b) for table, n in zip(batch.block_tables, batch.context_lens, strict=True) for b in table[: ceil_div(n, 8)]
    ]
    assert len(set(used)) == len(used) and max(used) < ceil_div(num_tokens, BLOCK) + num_seqs
