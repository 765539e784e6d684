"""What flags ask of a machine's memory, on CPU devices; test_cuda_launch.py asks the same of GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e.engines import generate, greedy, running_engine

from kunserve.errors import ConfigError

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
