"""The last stage of a chain: how many logits there are at a time."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from kunserve.engine.batch import Microbatch, Span
from kunserve.engine.blocks.block_pool import BlockPool
from kunserve.engine.blocks.block_table import ID, BlockTable
from kunserve.engine.group import Stage
from kunserve.engine.request import Request
from kunserve.engine.step.microbatch import step_inputs
from kunserve.engine.step.stage import SCORED_ROWS, run_last_stage
from kunserve.sampling import SamplingParams

PROMPT, HIDDEN, VOCAB = 3 * SCORED_ROWS + 7, 8, 50
HEAD = torch.randn(HIDDEN, VOCAB, generator=torch.Generator().manual_seed(1))


@dataclass
class HeadOnly:
    """A decoder whose hidden states are its positions' sines, and that notes how many logits it is asked for."""

    num_logits: list[int] = field(default_factory=list)

    def forward(self, *arguments: Any, with_head: bool) -> Tensor:
        batch, rows = arguments[3:]
        x = (batch.positions[rows, None] * torch.arange(1, HIDDEN + 1)).sin()
        return self.logits(x) if with_head else x

    def logits(self, x: Tensor) -> Tensor:
        self.num_logits.append(len(x))
        return x @ HEAD


@pytest.mark.parametrize("num_prompt_logprobs", [None, 2])
def test_a_scored_prompt_makes_few_logits_at_a_time(num_prompt_logprobs: int | None) -> None:
    params = SamplingParams(4, temperature=0, num_prompt_logprobs=num_prompt_logprobs)
    request = Request(
        "r", [i % VOCAB for i in range(PROMPT)], params, table=BlockTable(ids={0: array(ID, range(PROMPT))})
    )
    inputs = step_inputs(Microbatch(0, 0, (Span(request, 0, PROMPT, samples=True),)), 1, ())
    decoder: Any = HeadOnly()
    tokens = run_last_stage(decoder, Stage(0, 0, 1, BlockPool(1)), 0, inputs, None)
    assert inputs.sampled.result() == [token.token_id for token in tokens]
    if num_prompt_logprobs is None:
        assert decoder.num_logits == [1] and len(tokens) == 1
        return
    assert decoder.num_logits == [SCORED_ROWS] * 3 + [7]
    expected = ((torch.arange(PROMPT)[:, None] * torch.arange(1, HIDDEN + 1)).sin() @ HEAD).double().log_softmax(-1)
    for position, token in enumerate(tokens[:-1]):
        assert token.token_id == request.prompt_token_ids[position + 1] and token.logprobs is not None
        assert token.logprobs.logprob == pytest.approx(float(expected[position, token.token_id]), abs=1e-5)
    assert tokens[-1].token_id == int(expected[-1].argmax()) and tokens[-1].logprobs is None
