"""Every family's greedy output is transformers': alone, together, in a chain, across a drop and a restore.

A quarter of an hour with all prompts and layouts, which is what `make test-models` runs; else a prompt of each family.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from tiny_models import FAMILIES

from e2e.engines import LAYOUTS, assert_idle, generate_all, greedy, running_engine
from e2e.tiny import TinyModels

IS_WHOLE = bool(os.environ.get("KUNSERVE_ALL_MODELS"))
LENGTHS = (12, 150, 600) if IS_WHOLE else (150,)
NUM_TOKENS = 32 if IS_WHOLE else 12
# Positions for the longest prompt; windows (33 to 50 tokens) are shorter than most prompts.
POSITIONS = {"max_position_embeddings": 1024}
SETTINGS: dict[str, Any] = {"num_blocks_override": 256, "max_num_batched_tokens": 200}
KINDS: dict[str, dict[str, Any]] = {
    "one": {"windowed_kv_share": 1.0},
    "two": {"windowed_kv_share": 0.3, "chunk_bytes": 64 << 10},
}
# Families of which only some layers have a window, with so many layers that half of a chain has a half of either kind.
MIXED = {"gemma2": 4, "gemma3": 6, "gpt-oss": 4, "qwen2-window": 4}
CASES = [(family, "one") for family in FAMILIES] + [(family, "two") for family in MIXED]
DROPPED = CASES if IS_WHOLE else [case for case in CASES if case[0] in ("gemma3", "gpt-oss", "qwen3-moe")]


def cases_of(family: str, kinds: str, tiny_models: TinyModels) -> tuple[Path, list[list[int]], list[list[int]]]:
    """A model, prompts, and what transformers says to them."""
    shape = {} if kinds == "one" else {"num_hidden_layers": MIXED[family]}
    folder = tiny_models.folder(family, **POSITIONS, **shape)
    cases = tiny_models.cases(folder, LENGTHS, NUM_TOKENS)
    return folder, [prompt for prompt, _ in cases], [tokens for _, tokens in cases]


@pytest.mark.parametrize("name", LAYOUTS if IS_WHOLE else ["chain"])
@pytest.mark.parametrize(("family", "kinds"), CASES)
async def test_alone_and_together(family: str, kinds: str, name: str, tiny_models: TinyModels) -> None:
    folder, prompts, expected = cases_of(family, kinds, tiny_models)
    layout = LAYOUTS[name]
    async with running_engine(folder, **layout.settings, **SETTINGS, **KINDS[kinds]) as served:
        layout.check(served.engine)
        assert served.engine.fleet.num_kinds == (1 if kinds == "one" else 2)
        assert await generate_all(served.engine, prompts, greedy(NUM_TOKENS)) == expected
        for prompt, tokens in zip(prompts, expected, strict=True):
            assert await generate_all(served.engine, [prompt], greedy(NUM_TOKENS)) == [tokens]
        await assert_idle(served.engine)


@pytest.mark.parametrize(("family", "kinds"), DROPPED)
async def test_across_a_drop_and_a_restore(family: str, kinds: str, tiny_models: TinyModels) -> None:
    """Layers of one model differ in size here: an MLP beside experts, windows beside none."""
    folder, prompts, expected = cases_of(family, kinds, tiny_models)
    async with running_engine(folder, "cpu:2", is_pinned=True, **SETTINGS, **KINDS[kinds]) as served:
        engine, control = served.engine, served.control
        answers = asyncio.create_task(generate_all(engine, prompts * 3, greedy(NUM_TOKENS)))
        await engine.signals.next_commit()
        await engine.drop()
        assert engine.num_running
        await asyncio.wait(control.tasks)  # its KV is exchanged
        await engine.signals.next_commit()
        await engine.restore()
        assert engine.num_running
        await asyncio.wait(control.tasks)
        assert await answers == expected * 3
        outcomes = [(t.kind, t.outcome) for t in control.reconfigure.transitions.remembered]
        assert outcomes == [("drop", "done"), ("restore", "done")]
        await assert_idle(engine)
