"""What flags ask of a machine's memory, on CPU devices; test_cuda_launch.py asks the same of GPUs."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from e2e.engines import assert_idle, generate, generate_all, greedy, running_engine

from kunserve.engine.launch.host_machine import HostMachine
from kunserve.errors import ConfigError
from kunserve.gpu.host import HostDevice
from kunserve.host.memory import HostMemory, MemoryBehind

CHUNK = 32 << 10
SETTINGS = {"dtype": "float32", "block_size": 8, "max_model_len": 64, "chunk_bytes": CHUNK}


async def test_so_much_kv_is_given(six_layers: Path) -> None:
    async with running_engine(six_layers, "cpu:2", kv_bytes=20 * CHUNK, **SETTINGS) as served:
        for memory in served.engine.memories:
            assert memory.counts.free + memory.counts.kv == 20
            assert memory.counts.kv == 18  # six layers: three chunks each, and two left over
        assert len(await generate(served.engine, [3, 4, 5], greedy(4))) == 4


async def test_kv_that_holds_no_request_is_refused_with_figures(six_layers: Path) -> None:
    with pytest.raises(ConfigError, match=r"too little memory: the weights take .* Raise --device-memory"):
        async with running_engine(six_layers, "cpu:1", kv_bytes=5 * CHUNK, **SETTINGS):
            pass


class Held:
    """Holds back what devices take while they serve."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_go_on, self.behind, real = threading.Event(), list[MemoryBehind](), HostMemory.take_pieces
        self.taken: dict[int, set[int]] = {}  # file -> offsets that were taken in any way
        held, begin = self, MemoryBehind.__init__

        def take_pieces(memory: HostMemory, pieces: list[tuple[int, int]], goes_on: object = None) -> None:
            if threading.current_thread().name.endswith("-memory"):
                assert held.may_go_on.wait(60)
            for start, num_bytes in pieces:
                held.taken.setdefault(memory.fd, set()).update(range(start, start + num_bytes, CHUNK))
            real(memory, pieces)

        def remember(behind: MemoryBehind, *arguments: Any) -> None:
            held.behind.append(behind)
            begin(behind, *arguments)

        monkeypatch.setattr(HostMemory, "take_pieces", take_pieces)
        monkeypatch.setattr(MemoryBehind, "__init__", remember)


async def test_requests_drops_and_restores_do_not_wait_for_memory_that_is_not_taken_yet(
    six_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "num_blocks_override": 48, "is_pinned": True}
    prompts = [[3 + (7 * i + 11 * j) % 300 for j in range(20)] for i in range(8)]
    async with running_engine(six_layers, "cpu:2", **settings) as served:
        expected = await generate_all(served.engine, prompts, greedy(40))
    held = Held(monkeypatch)
    async with running_engine(six_layers, "cpu:2", **settings) as served:
        engine = served.engine
        assert len(held.behind) == 2
        for memory in engine.memories:
            device = memory.device.inner
            assert isinstance(device, HostDevice) and device._memory is not None
            first = memory.weights.mapped_chunks + memory.kv.chunks_by_turn[0]
            assert held.taken[device._memory.fd] >= {chunk * CHUNK for chunk in first}  # before anybody is served
            assert len(held.taken[device._memory.fd]) < memory.counts.budget
        answers = asyncio.create_task(generate_all(engine, prompts, greedy(40)))
        for _ in range(4):
            await engine.signals.next_commit()
        await engine.drop(is_forced=True)
        await asyncio.wait(served.control.tasks)
        await engine.restore()
        await asyncio.wait(served.control.tasks)
        assert engine.num_running > 0 and not any(behind.wait(0) for behind in held.behind)
        held.may_go_on.set()  # requests are still served
        assert await answers == expected
        assert all([await asyncio.to_thread(behind.wait, 60) for behind in held.behind])
        for memory in engine.memories:
            device = memory.device.inner
            assert isinstance(device, HostDevice) and device._memory is not None
            assert len(held.taken[device._memory.fd]) == memory.counts.budget
        await assert_idle(engine)


async def test_a_server_stops_while_memory_is_taken(six_layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    async with running_engine(six_layers, "cpu:2", num_blocks_override=48, **SETTINGS) as served:
        threading.Timer(0.1, held.may_go_on.set).start()
    assert all(behind.wait(0) for behind in held.behind) and not served.machine.stuck()


async def test_a_machine_tells_whether_it_has_computed(six_layers: Path) -> None:
    async with running_engine(six_layers, "cpu:2", num_blocks_override=48, **SETTINGS) as served:
        assert isinstance(served.machine, HostMachine)
        one, other = served.machine._new_look(), served.machine._new_look()
        one()
        assert not one()
        await generate(served.engine, [3, 4, 5], greedy(4))
        await assert_idle(served.engine)
        assert one() and not one()
        assert other() and not other()  # each has its own last look
        may_end = threading.Event()
        working = served.machine._devices[1].run(lambda: may_end.wait(60))
        assert one() and one()  # as long as it lasts
        may_end.set()
        assert await working
        assert not one()
