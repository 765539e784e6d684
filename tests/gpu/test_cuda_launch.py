"""`--devices cuda` from the flags to tokens, on GPUs that are not there: launch, serve, drop, restore, close."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e.engines import assert_idle, generate, greedy
from fake_cuda import FakeCuda
from tiny_models import VOCAB_SIZE, make_tiny_model

from kunserve import server
from kunserve.config import EngineConfig, parse_devices
from kunserve.engine.cuda_executor import CudaExecutor
from kunserve.engine.cuda_machine import GRAPH_BYTES
from kunserve.engine.launch import Served, launch
from kunserve.errors import ConfigError
from kunserve.gpu import cuda

MIB = 1 << 20
ACTIVATIONS = 5 * MIB


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeCuda]]:
    """One GPU of 1 GiB; every driver that was opened. All must be closed, and nothing of theirs left, in the end."""
    opened: list[FakeCuda] = []
    taken = iter([0, ACTIVATIONS])

    def open_driver(ordinal: int, _: Any) -> FakeCuda:
        opened.append(FakeCuda(ordinal))
        return opened[-1]

    monkeypatch.setattr(cuda, "load_bindings", lambda: None)
    monkeypatch.setattr(cuda, "count_gpus", lambda _: 1)
    monkeypatch.setattr(cuda, "CudaDriver", open_driver)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: next(taken))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    yield opened
    assert all(driver.is_clean() and not driver.pinned_ranges for driver in opened)


@asynccontextmanager
async def serving(folder: Path, seen: list[tuple[str, float]] | None = None, **settings: Any) -> AsyncIterator[Served]:
    config = EngineConfig(
        str(folder),
        dtype="float32",
        block_size=8,
        max_model_len=200,
        max_num_batched_tokens=48,
        max_num_seqs=8,
        is_pinned=True,
        **{"devices": parse_devices("cuda:0*2")} | settings,
    )
    served = await launch(config, "tiny", lambda text, share: seen.append((text, share)) if seen is not None else None)
    try:
        await served.engine.start()
        yield served
    finally:
        await served.engine.stop()
        await served.close()


async def until_settled(served: Served) -> None:
    """Wait until no transition is under way."""
    while tasks := served.control._tasks:
        await asyncio.wait(set(tasks))


def prompt(i: int) -> list[int]:
    return [3 + (7 * i + k) % (VOCAB_SIZE - 3) for k in range(4 + 9 * i)]


@pytest.mark.parametrize("pin_weights", [True, False])
async def test_from_the_flags_to_tokens_through_drop_and_restore(
    tiny: Path, drivers: list[FakeCuda], pin_weights: bool
) -> None:
    seen: list[tuple[str, float]] = []
    async with serving(tiny, seen, device_memory_bytes=24 * MIB, pin_weights=pin_weights) as served:
        engine = served.engine
        assert isinstance(engine.executor, CudaExecutor)
        assert [m.device.name for m in engine.memories] == ["cuda:0.0", "cuda:0.1"]
        assert sum(len(driver.pinned_ranges) for driver in drivers) == int(pin_weights)
        shares = [share for text, share in seen if text == "loading weights"]
        assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) >= 4
        expected = [await generate(engine, prompt(i), greedy(40)) for i in range(4)]
        streams = [asyncio.create_task(generate(engine, prompt(i), greedy(40))) for i in range(4)]
        while sum(len(group.running) for group in engine.groups) < 4:
            await engine.next_commit()
        await engine.drop()
        assert [len(group.stages) for group in engine.groups] == [2]
        await until_settled(served)
        await engine.restore()
        assert [len(group.stages) for group in engine.groups] == [1, 1]
        assert await asyncio.gather(*streams) == expected
        await until_settled(served)
        await assert_idle(engine)


async def test_the_memory_is_what_a_full_step_leaves(tiny: Path, drivers: list[FakeCuda]) -> None:
    async with serving(tiny) as served:
        total = 1 << 30
        expected = int(total * 0.92) // 2 - ACTIVATIONS - GRAPH_BYTES
        for memory in served.engine.memories:
            budget = memory.device.num_chunks * memory.device.chunk_bytes
            assert expected - memory.device.chunk_bytes < budget <= expected
        measured = drivers[2]  # opened for the step at full token budget, and closed
        assert len(drivers) == 3 and measured.is_clean() and measured.calls["create"] > 0
    assert drivers[0].is_clean()


async def test_a_number_of_blocks_is_met_or_refused(tiny: Path, drivers: list[FakeCuda]) -> None:
    async with serving(tiny, num_blocks_override=64, enforce_eager=True) as served:
        block_bytes = served.engine.memories[0].kv.shape.block_bytes
        assert all(64 <= group.num_blocks < 64 + 2 * MIB // block_bytes for group in served.engine.groups)


async def test_so_much_kv_leaves_nothing_open(tiny: Path, drivers: list[FakeCuda]) -> None:
    with pytest.raises(ConfigError, match=r"--kv-cache-memory-bytes 8796093022208 needs \d+ MiB on each device"):
        async with serving(tiny, kv_bytes=8 << 40):
            pass
    assert drivers


async def test_too_many_blocks_leave_nothing_open(tiny: Path, drivers: list[FakeCuda]) -> None:
    with pytest.raises(ConfigError, match=r"--num-gpu-blocks-override 1000000 needs \d+ MiB on each device; \d+ MiB"):
        async with serving(tiny, num_blocks_override=1_000_000):
            pass
    assert drivers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float64"}, r"float64"),
        ({"devices": parse_devices("cuda:3")}, r"there is no cuda:3; this machine has 1 GPU"),
        ({"device_memory_bytes": 900 * MIB}, r"cuda:0: too little memory: --device-memory asks for 2 x 900 MiB"),
        ({"device_memory_bytes": 2 * MIB}, r"MiB"),
    ],
)
async def test_what_cannot_be_is_said_in_one_line(
    tiny: Path, drivers: list[FakeCuda], settings: dict[str, Any], message: str
) -> None:
    flags: dict[str, Any] = {"devices": parse_devices("cuda:0*2"), "dtype": "float32"}
    config = EngineConfig(str(tiny), **flags | settings)
    with pytest.raises(ConfigError, match=message) as error:
        await launch(config, "tiny", lambda text, share: None)
    assert "\n" not in error.value.message


def test_the_server_ends_with_the_line(tiny: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit, match=r"^kunserve: --devices cuda[^\n]*$"):
        server.run(["--model", str(tiny), "--devices", "cuda", "--port", "8391"])
