"""Greedy output is transformers', token for token: the embedded model and tiny models of the plain families.

Of the embedded model there are half of the tokens, and the first of each prompt are alone in one of the layouts; all in
all of them in `make test-models`: a token alone takes as long as one of each of twenty prompts.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from tiny_models import PLAIN

from e2e.engines import LAYOUTS, assert_idle, generate_all, greedy, running_engine
from e2e.tiny import TinyModels

KV: dict[str, Any] = {"num_blocks_override": 256, "max_model_len": 2048}
IS_WHOLE = bool(os.environ.get("KUNSERVE_ALL_MODELS"))
NUM_TOKENS, NUM_ALONE = (64, 64) if IS_WHOLE else (32, 16)
ALONE = {name: slice(None) if IS_WHOLE else slice(i, None, len(LAYOUTS)) for i, name in enumerate(LAYOUTS)}


@pytest.mark.long
@pytest.mark.parametrize("name", LAYOUTS)
async def test_the_embedded_model(name: str, smollm2_prompts: list[list[int]], smollm2_greedy: list[list[int]]) -> None:
    layout = LAYOUTS[name]
    async with running_engine("smollm2-135m", **layout.settings, **KV) as served:
        engine = served.engine
        layout.check(engine)
        expected = [tokens[:NUM_TOKENS] for tokens in smollm2_greedy]
        assert await generate_all(engine, smollm2_prompts, greedy(NUM_TOKENS)) == expected
        # each alone: as many at a time as there are groups, since every one of them is then alone in its group
        prompts, alone = smollm2_prompts[ALONE[name]], []
        for start in range(0, len(prompts), layout.num_groups):
            alone += await generate_all(engine, prompts[start : start + layout.num_groups], greedy(NUM_ALONE))
        assert alone == [tokens[:NUM_ALONE] for tokens in smollm2_greedy[ALONE[name]]]
        await assert_idle(engine)


# The shortest, around a block's end, around the step's budget, and of several chunks.
LENGTHS = (1, 16, 17, 25, 60, 200)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("family", PLAIN)
async def test_every_family_with_prompts_cut_into_chunks(
    family: str, dtype: str, name: str, tiny_models: TinyModels
) -> None:
    folder = tiny_models.folder(family)
    cases = tiny_models.cases(folder, LENGTHS, 32)
    prompts, expected = [prompt for prompt, _ in cases], [tokens for _, tokens in cases]
    layout = LAYOUTS[name]
    settings: dict[str, Any] = {"dtype": dtype, "num_blocks_override": 512, "max_num_batched_tokens": 24}
    async with running_engine(folder, **layout.settings, **settings) as served:
        engine = served.engine
        layout.check(engine)
        assert await generate_all(engine, prompts, greedy(32)) == expected
        assert [(await generate_all(engine, [prompt], greedy(32)))[0] for prompt in prompts] == expected
        await assert_idle(engine)
