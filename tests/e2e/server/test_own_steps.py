"""A server whose cost model is wrong corrects it by its own steps, and answers as before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from cost_models import COST

from e2e.engines import LAYOUTS, Layout, assert_idle, generate_all, greedy, running_engine
from e2e.tiny import TinyModels, random_prompt
from kunserve.engine.batch import Microbatch, work_of
from kunserve.engine.engine import Engine
from kunserve.engine.group import Group
from kunserve.engine.step.own_steps import OwnSteps
from kunserve.planner.cost import CostModel, TokenSpan, Work

SETTINGS: dict[str, Any] = {"max_model_len": 512, "max_num_batched_tokens": 64, "seed": 3}
WRONG = replace(COST, token_s=5 * COST.token_s, load_s=5 * COST.load_s, head_row_s=0.2 * COST.head_row_s)


class AsConstantsSay(OwnSteps):
    """Own steps of a machine on which they take what `right` predicts, whatever the devices of this one say."""

    right: CostModel = COST
    num_fits = 0

    def keep(self, group: Group, batch: Microbatch, stage_s: Sequence[float]) -> bool:
        assert len(stage_s) == len(group.stages) and all(seconds > 0 for seconds in stage_s)
        work, last = work_of(batch), len(group.stages) - 1
        told = []
        for i, stage in enumerate(group.stages):
            is_end, is_shared = i in (0, last), self._shares_head and last > 0
            head_share = 0.5 * is_end if is_shared else float(i == last)
            told.append(self.right.work_time(stage.last_layer - stage.first_layer, work, i == 0, head_share))
        return super().keep(group, batch, told)

    async def fit(self) -> None:
        await super().fit()
        self.num_fits += 1


def error(cost: CostModel) -> float:
    """How wrong constants predict the time of microbatches as they come here: of up to so many tokens and requests."""
    works = [Work.of([TokenSpan(60, 1, 1)] * n + [TokenSpan(0, 60 - n, 1)]) for n in range(0, 41, 5)]
    works += [Work.of([TokenSpan(60, 1, 1)] * n) for n in range(1, 41, 5)]
    times = [(cost.work_time(3, work, True, True), COST.work_time(3, work, True, True)) for work in works]
    return fmean(abs(predicted / right - 1) for predicted, right in times)


async def answers(engine: Engine) -> list[list[int]]:
    prompts = [random_prompt(3 + 17 * i % 150) for i in range(40)]
    return await generate_all(engine, prompts, greedy(12))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("tied", [True, False])
async def test_a_wrong_cost_model_is_corrected_while_it_serves(
    layout: Layout, tied: bool, tiny_models: TinyModels
) -> None:
    folder: Path = tiny_models.folder("qwen3", tie_word_embeddings=tied)
    async with running_engine(folder, **layout.settings, **SETTINGS) as served:
        engine = served.engine
        layout.check(engine)
        lookahead = engine.scheduler.lookahead
        assert lookahead is not None and engine.own_steps is not None
        engine.own_steps = None
        lookahead.learn(WRONG, "derived: wrong on purpose")
        expected = await answers(engine)
        own = engine.own_steps = AsConstantsSay(lookahead, shares_head=engine.executor.shares_head, fit_s=0.0)
        while not own.num_fits:
            assert await answers(engine) == expected
        assert await answers(engine) == expected
        await assert_idle(engine)
        shown = engine.state()["cost_model"]
        assert shown["source"] == "own steps, at first derived: wrong on purpose"
        assert shown["constants"] == lookahead.cost.to_dict()
        assert error(lookahead.cost) < 0.3 * error(WRONG)


async def test_a_server_that_counts_tokens_has_no_cost_model(tiny_models: TinyModels) -> None:
    async with running_engine(tiny_models.folder("llama"), microbatching="tokens", **SETTINGS) as served:
        assert await answers(served.engine)
        assert served.engine.own_steps is None and served.engine.state()["cost_model"] is None
