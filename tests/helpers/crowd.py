"""A crowd of requests for an engine with too little memory, and what each of them must get whatever happens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from hooks import around_copies
from on_gpus import placed
from tiny_models import VOCAB_SIZE

from kunserve.config import EngineConfig, parse_devices
from kunserve.engine.engine import Engine
from kunserve.engine.launch.launch import Served, launch
from kunserve.engine.request import Output, Request
from kunserve.gpu.watched import WatchedDevice
from kunserve.sampling import SamplingParams

PLENTY = 1024  # blocks of one device
CHECK_EVERY = 5  # outputs of a request
SMALL: dict[str, Any] = {
    "block_size": 4,
    "chunk_bytes": 1 << 15,
    "dtype": "float32",
    "max_model_len": 160,
    "max_num_batched_tokens": 64,
    "is_pinned": True,
}


@asynccontextmanager
async def serving(folder: Path, num_blocks: int, devices: str = "cpu:2", **settings: Any) -> AsyncIterator[Served]:
    """An engine of small blocks that regroups only when asked to."""
    devices, settings = placed(devices, SMALL | {"num_blocks_override": num_blocks} | settings)
    config = EngineConfig(str(folder), devices=parse_devices(devices), **settings)
    served = await launch(config, "tiny", lambda text, share: None)
    try:
        await served.engine.start()
        yield served
        if served.engine.is_running:
            await until(served.engine, lambda: all(not group.running for group in served.engine.groups))
            assert_empty(served.engine)
    finally:
        await served.engine.stop()
        await served.engine.close()
        await served.close()


def make_request(name: str, num_prompt: int, max_tokens: int, temperature: float = 0.0) -> Request:
    """A request whose prompt and seed follow from its name, and that ends at `max_tokens` only."""
    rng = random.Random(name)
    prompt = rng.choices(range(3, VOCAB_SIZE), k=num_prompt)
    params = SamplingParams(max_tokens, temperature=temperature, seed=rng.getrandbits(32), ignore_eos=True)
    return Request(name, prompt, params)


def make_crowd(num_requests: int = 16) -> list[Request]:
    """Mixed lengths, most of it output; every other request is sampled."""
    rng = random.Random(num_requests)
    return [
        make_request(f"r{i}", rng.randrange(1, 40), rng.randrange(30, 70), 0.8 * (i % 2)) for i in range(num_requests)
    ]


async def read(engine: Engine, request: Request) -> list[int]:
    """Submit a request and read it to its end; the invariants hold on the way."""
    token_ids: list[int] = []
    outputs: list[Output] = []
    async for output in engine.submit(request):
        token_ids += output.token_ids
        outputs.append(output)
        if len(outputs) % CHECK_EVERY == 0:
            engine.check()
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert outputs[-1].finish_reason is request.finish_reason is not None
    return token_ids


async def read_all(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    """All at once: tokens by request id."""
    tokens = await asyncio.gather(*(read(engine, request) for request in requests))
    return {request.request_id: ids for request, ids in zip(requests, tokens, strict=True)}


async def until(engine: Engine, condition: Callable[[], bool]) -> None:
    """Return when `condition` holds; it is looked at whenever something happened."""
    while not condition():
        await engine.signals.next_commit()


def assert_empty(engine: Engine) -> None:
    """Nobody runs, waits or is on the host, and every block is free."""
    assert engine.num_running == engine.scheduler.num_waiting == 0
    assert engine.scheduler.swapped.num_free == engine.scheduler.swapped.num_blocks
    assert not engine.scheduler.preempted_by
    for group in engine.groups:
        assert group.num_used == 0
    engine.check()


class CopyGate:
    """Holds a device's copies back until it is opened, and can let them fail; `lets_out`: but those to the host."""

    def __init__(self, watched: WatchedDevice, *, lets_out: bool = False) -> None:
        device = watched.inner
        self._opened = asyncio.Event()
        self.reached = asyncio.Event()
        self.error: Exception | None = None
        self.num_copies = 0
        if not lets_out:
            around_copies(device, self._copy)
            return
        copy = device.copy

        async def hold_unless_out(copies: Any, source: Any = None, *, is_to_host: bool = False) -> None:
            if not is_to_host:
                await self._hold()
            await copy(copies, source, is_to_host=is_to_host)

        device.copy = hold_unless_out  # type: ignore[method-assign]

    async def _copy(self, copy: Callable[[], Awaitable[Any]]) -> Any:
        await self._hold()
        return await copy()

    async def _hold(self) -> None:
        self.num_copies += 1
        self.reached.set()
        await self._opened.wait()
        if self.error is not None:
            raise self.error

    def open(self, error: Exception | None = None) -> None:
        """Let copies through, or fail with `error`."""
        self.error = error
        self._opened.set()
