"""Quantized models on GPUs that are not there: packed from the file to the product, through drop, exchange, restore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from e2e.engines import generate, greedy
from fake_gpus import MIB, Gpus
from test_cuda_launch import assert_same_tokens_through_drop_and_restore, assert_same_weights, prompt, serving
from tiny_quantized import write_tiny_quantized

from kunserve.config import parse_devices
from kunserve.engine.launch.launch import Served
from kunserve.engine.step.cuda_executor import CudaExecutor
from kunserve.model.host_copy import HostCopy
from kunserve.model.quant.planes import SCALES, Planes

TWO: dict[str, Any] = {"devices": parse_devices("cuda:0,1"), "device_memory_bytes": 24 * MIB}


def planes_in(served: Served) -> dict[str, set[str]]:
    """Names of the matrices of a layer that are packed, by the kind of their codes."""
    weights, kinds = served.engine.memories[0].weights, dict[str, set[str]]()
    for spec in weights.specs("layers.1"):
        if isinstance(spec.blocks, Planes):
            kinds.setdefault(spec.blocks.kind, set()).add(spec.name.split(".")[-2])
            assert weights.linear("layers.1", spec.name).parts[0].scales is not None
            assert any(other.name == spec.name + SCALES for other in weights.specs("layers.1"))
    return kinds


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("kind", "codes", "host_copy"),
    [
        ("awq", "A4", HostCopy.PINNED),
        ("w8a8", "A8", HostCopy.MAPPED),
    ],
)
async def test_a_quantized_checkpoint_stays_packed(
    kind: str, codes: str, host_copy: HostCopy, tmp_path: Path, gpus: Gpus
) -> None:
    gpus.count = 2
    folder = write_tiny_quantized(kind, tmp_path)
    async with serving(tmp_path / "dequantized", **TWO) as served:
        expected = [await generate(served.engine, prompt(i), greedy(12)) for i in range(2)]
        as_numbers = served.engine.memories[0].weights.num_tensor_bytes("layers.1")
    async with serving(folder, host_copy=host_copy, **TWO) as served:
        names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert planes_in(served) == {codes: names}
        weights = served.engine.memories[0].weights
        assert weights.num_tensor_bytes("layers.1") < as_numbers / (5 if codes == "A4" else 3.5)  # of float32
        assert [await generate(served.engine, prompt(i), greedy(12)) for i in range(2)] == expected
        await assert_same_tokens_through_drop_and_restore(served)
        assert_same_weights(served)
        assert isinstance(served.engine.executor, CudaExecutor)
        assert all(d.graphs is not None and d.graphs.num_replays for d in served.engine.executor.decoders)
