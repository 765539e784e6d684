"""Steps of an engine are planned by FlashInfer's compiled planner, and not by the loops in Python around it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import fake_flashinfer
import pytest
from cuda_parts import CapturableKernels
from e2e.engines import generate, greedy
from fake_gpus import MIB, Gpus
from test_cuda_launch import prompt, serving
from tiny_models import make_tiny_model

from kunserve.compute.cuda import decoder, flash_infer
from kunserve.compute.cuda.attention import PagedAttention
from kunserve.compute.cuda.flash_infer import FlashInferAttention, load_attention
from kunserve.config import parse_devices


@pytest.fixture
def attentions(monkeypatch: pytest.MonkeyPatch) -> list[FlashInferAttention]:
    """What stands for FlashInfer on each device that was opened, in the order of their decoders."""
    made: list[FlashInferAttention] = []

    def load_and_keep(*arguments: Any) -> tuple[PagedAttention, str]:
        attention, note = load_attention(*arguments)
        assert isinstance(attention, FlashInferAttention)
        made.append(attention)
        return attention, note

    for name, module in fake_flashinfer.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flash_infer, "HEAD_PIECE", 8)  # heads of tiny models
    monkeypatch.setattr(decoder, "load_kernels", lambda _: (CapturableKernels(), "kernels"))
    monkeypatch.setattr(decoder, "load_attention", load_and_keep)
    return made


async def test_a_step_of_the_engine_is_planned_directly(
    attentions: list[FlashInferAttention], gpus: Gpus, tmp_path: Path
) -> None:
    folder = make_tiny_model("llama", tmp_path)
    settings: dict[str, Any] = {"devices": parse_devices("cuda:0"), "dtype": "bfloat16"}
    async with serving(folder, device_memory_bytes=24 * MIB, **settings) as served:
        [planner] = attentions[-1].planners
        decoding = planner.buckets.values()
        assert planner.buckets.keys() == {1, 2, 4, 8} and planner.mixed.num_plans == 0
        planned = sum(wrapper.num_plans for wrapper in decoding)
        prompts = [prompt(i) for i in range(8)]  # 284 tokens, 48 in a step: while some are computed, others decode
        answers = await asyncio.gather(*(generate(served.engine, prompt, greedy(20)) for prompt in prompts))
        assert all(len(answer) == 20 for answer in answers)
        assert planner.mixed.num_plans >= 5 and sum(wrapper.num_plans for wrapper in decoding) >= planned + 10
        # By FlashInfer's own `plan`, up to 2 ms of Python: only the first, which finds the compiled module.
        assert [wrapper.num_full_plans for wrapper in (planner.mixed, *decoding)] == [1] * 5
