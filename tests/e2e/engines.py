"""An engine in this process, and requests to it as plain lists of token ids."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from kunserve.config import EngineConfig, parse_devices
from kunserve.engine.engine import Engine
from kunserve.engine.launch.launch import Served, launch
from kunserve.engine.request import Output, Request
from kunserve.sampling import SamplingParams

_serials = itertools.count()


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to spread a model over devices, and how many groups and stages come of it."""

    devices: str
    pipeline_parallel_size: int | None
    num_groups: int
    num_stages: int

    def check(self, engine: Engine) -> None:
        """Assert that this is what was launched."""
        assert [len(group.stages) for group in engine.groups] == [self.num_stages] * self.num_groups

    @property
    def settings(self) -> dict[str, Any]:
        """For `running_engine`."""
        return {"devices": self.devices, "pipeline_parallel_size": self.pipeline_parallel_size}


LAYOUTS = {
    "cpu:1": Layout("cpu:1", None, 1, 1),
    "cpu:2": Layout("cpu:2", None, 2, 1),
    "chain": Layout("cpu:2", 2, 1, 2),
}


@asynccontextmanager
async def running_engine(model: object, devices: str = "cpu:1", **settings: Any) -> AsyncIterator[Served]:
    """Launch a model (card name or folder) and serve until the block is left; `settings` are EngineConfig's."""
    config = EngineConfig(str(model), devices=parse_devices(devices), **settings)
    served = await launch(config, "test", lambda text, share: None)
    try:
        await served.engine.start()
        yield served
    finally:
        await served.engine.stop()
        await served.engine.close()
        await served.close()


def greedy(num_tokens: int, **more: Any) -> SamplingParams:
    """So many of the most likely tokens, whatever they are."""
    return SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, **more)


def new_request(prompt: Sequence[int], params: SamplingParams) -> Request:
    """A request with an id of its own."""
    return Request(f"r{next(_serials)}", list(prompt), params)


async def generate(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> list[int]:
    """Submit a request and read it to its end; checks that its stream is what its request holds."""
    request = new_request(prompt, params)
    outputs: list[Output] = [output async for output in engine.submit(request)]
    token_ids = [token_id for output in outputs for token_id in output.token_ids]
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert outputs[-1].finish_reason is request.finish_reason is not None
    assert token_ids == request.output_token_ids
    return token_ids


async def generate_all(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
    """All at once."""
    return await asyncio.gather(*(generate(engine, prompt, params) for prompt in prompts))


async def assert_idle(engine: Engine) -> None:
    """Nothing runs or waits, every block is free, and every pool is sound, once the last step is over.

    That may be after the last answer: a step was planned before it was known that nobody needs it.
    """
    while any(group.num_in_flight for group in engine.groups):
        await engine.signals.next_commit()
    while engine.fleet.num_following:  # cached blocks after a restore, with nobody's step
        await asyncio.sleep(0.01)
    assert engine.num_running == 0 and not engine.scheduler.waiting
    for group in engine.groups:
        assert group.num_used == 0
    engine.check()
