"""An engine whose devices count bytes and whose steps end when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from kunserve.compute.sampler import SampledToken
from kunserve.engine.blocks.block_pool import BlockPool
from kunserve.engine.engine import Engine
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group, Stage
from kunserve.engine.occupancy import Passage
from kunserve.engine.request import Output, Request
from kunserve.engine.schedule.policy import make_policy
from kunserve.engine.schedule.scheduler import Scheduler, SchedulerLimits
from kunserve.engine.serving_limits import ServingLimits
from kunserve.engine.signals import Signals
from kunserve.engine.step.executor import Executor
from kunserve.engine.step.microbatch import StepInputs
from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.kv_memory import KVShape
from kunserve.gpu.null import NullDevice
from kunserve.model.config import ModelConfig
from kunserve.model.layout import units_of_stage, weight_units
from kunserve.observe.metrics import Metrics
from kunserve.policies import OverloadPolicy
from kunserve.sampling import SamplingParams

EOS = 99
MODEL = ModelConfig(
    family="llama",
    vocab_size=100,
    hidden_size=64,
    intermediate_size=64,
    num_layers=4,
    num_heads=2,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=256,
    eos_token_ids=(EOS,),
)
BLOCK_SIZE, BLOCKS_PER_CHUNK, CHUNK_BYTES = 4, 8, 32768  # 2 * 2 heads * 4 slots * 64 * 4 bytes a block


@dataclass(slots=True)
class Step:
    """A microbatch that waits on the scripted devices."""

    group: Group
    inputs: StepInputs
    done: asyncio.Future[list[SampledToken]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through."""
        return len(self.inputs.token_ids)

    def finish(self, *token_ids: int) -> None:
        """End it with these tokens, one per sampled row; a single one stands for all rows."""
        num_rows = len(self.inputs.sampling)
        tokens = list(token_ids) * num_rows if len(token_ids) == 1 else token_ids
        assert len(tokens) == num_rows
        self.done.set_result([SampledToken(token_id) for token_id in tokens])

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        self.done.set_exception(error)


class ScriptedExecutor(Executor):
    """Hands every microbatch to the test, in order."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: asyncio.Queue[Step] = asyncio.Queue()

    async def pass_through(self, group: Group, inputs: StepInputs, passage: Passage) -> list[SampledToken]:
        step = Step(group, inputs)
        self._steps.put_nowait(step)
        for position in range(len(group.stages)):
            with passage.at(position):
                await step.done
        return step.done.result()

    async def next_step(self) -> Step:
        """The next microbatch that was launched."""
        return await self._steps.get()

    @property
    def num_pending(self) -> int:
        """Microbatches that were launched and not yet taken."""
        return self._steps.qsize()


def _memory(index: int, layers: tuple[int, int], chunks_per_layer: int) -> DeviceMemory:
    """A device with these layers' weights and KV mapped."""
    shape = KVShape.of(MODEL, BLOCK_SIZE, torch.float32)
    units = weight_units(MODEL, "float32")
    memory = DeviceMemory(NullDevice(index, 400, CHUNK_BYTES), units, MODEL.num_layers, shape)
    for unit in units_of_stage(MODEL, *layers):
        memory.weights.map(unit)
        with memory.weights.filling(unit):
            pass  # there are no bytes
    for layer in range(*layers):
        memory.kv.resize(layer, chunks_per_layer)
    return memory


@asynccontextmanager
async def scripted_engine(
    num_groups: int = 1,
    num_stages: int = 1,
    chunks_per_layer: int = 2,
    max_num_batched_tokens: int = 64,
    num_ahead: int = 0,
    max_num_queued_reqs: int = 100,
    stall_s: float = 60.0,
    tokenizer: Tokenizer | None = None,
) -> AsyncIterator[tuple[Engine, ScriptedExecutor]]:
    """A started engine: groups of `num_stages` devices, each with 8 blocks of 4 tokens per chunk of KV."""
    memories: list[DeviceMemory] = []
    groups: list[Group] = []
    per_stage = MODEL.num_layers // num_stages
    for group_id in range(num_groups):
        stages = []
        for i in range(num_stages):
            layers = (i * per_stage, (i + 1) * per_stage)
            memories.append(_memory(len(memories), layers, chunks_per_layer))
            pool = BlockPool(memories[-1].kv.num_blocks(layers[0]))
            assert pool.num_blocks == chunks_per_layer * BLOCKS_PER_CHUNK
            stages.append(Stage(len(memories) - 1, *layers, pool))
        groups.append(Group(group_id, tuple(stages), BLOCK_SIZE))
    executor = ScriptedExecutor()
    limits = SchedulerLimits(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=64, num_ahead=num_ahead)
    fleet = Fleet(groups)
    engine = Engine(
        MODEL,
        ServingLimits(MODEL.max_position_embeddings, max_num_queued_reqs, stall_s),
        fleet,
        Scheduler(fleet, limits, make_policy(OverloadPolicy.RECOMPUTE, 0.0)),
        memories,
        executor,
        Signals(),
        tokenizer,
        Metrics("test", MODEL.max_position_embeddings, lambda: engine.stats()),
    )
    await engine.start()
    try:
        yield engine, executor
    finally:
        await engine.stop()
        await engine.close()


def assert_idle(engine: Engine) -> None:
    """No request is anywhere, and every block is free."""
    assert engine.num_running == 0 and not engine.scheduler.waiting
    assert [group.num_used for group in engine.groups] == [0] * len(engine.groups)
    engine.check()


def make_request(name: str = "r", num_prompt: int = 5, max_tokens: int = 3, **params: Any) -> Request:
    """A request for some tokens."""
    return Request(name, list(range(1, num_prompt + 1)), SamplingParams(max_tokens=max_tokens, **params))


async def read(stream: AsyncIterator[Output]) -> list[Output]:
    """Everything up to the end."""
    return [output async for output in stream]


def token_ids(outputs: Sequence[Output]) -> list[int]:
    """All tokens of some outputs."""
    return [token_id for output in outputs for token_id in output.token_ids]
