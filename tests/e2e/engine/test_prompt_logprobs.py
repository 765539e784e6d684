"""Log-probabilities of a prompt are the ones of transformers, and grammars hold, whatever the engine does meanwhile."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import EOS, load_reference

from e2e.engines import LAYOUTS, assert_idle, greedy, new_request, running_engine
from e2e.tiny import WIDE_KV, TinyModels, random_prompt
from kunserve.api.wire.grammars import Grammars, Structure
from kunserve.engine.engine import Engine
from kunserve.engine.request import Output
from kunserve.grammar.fork_server import Vocabulary
from kunserve.sampling import SamplingParams


async def outputs_of(engine: Engine, prompt: list[int], params: SamplingParams) -> list[Output]:
    return [output async for output in engine.submit(new_request(prompt, params))]


@pytest.mark.parametrize("name", LAYOUTS)
async def test_prompt_logprobs(name: str, tiny_models: TinyModels) -> None:
    folder, prompts = tiny_models.folder("llama"), [random_prompt(length) for length in (1, 2, 24, 70)]
    model, params = load_reference(folder), greedy(2, num_prompt_logprobs=2)
    settings: dict[str, Any] = {"num_blocks_override": 512, "max_num_batched_tokens": 24}
    async with running_engine(folder, **LAYOUTS[name].settings, **settings) as served:
        answers = await asyncio.gather(*(outputs_of(served.engine, prompt, params) for prompt in prompts))
        await assert_idle(served.engine)
    for prompt, outputs in zip(prompts, answers, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
        found = [entry for output in outputs for entry in output.prompt_logprobs]
        assert [entry.token_id for entry in found] == prompt[1:]
        for position, entry in enumerate(found):
            row = expected[position]
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            assert entry.rank == int((row > row[entry.token_id]).sum()) + 1
            assert [i for i, _ in entry.top] == row.topk(2).indices.tolist()


async def test_grammars_hold_while_requests_are_preempted(tiny_models: TinyModels) -> None:
    folder = tiny_models.folder("llama", **WIDE_KV)
    settings: dict[str, Any] = {"num_blocks_override": 32, "max_num_batched_tokens": 64, "max_model_len": 256}
    pattern = "(a|bc){20,40}z"
    async with running_engine(folder, overload_policy="recompute", **settings) as served:
        engine, tokenizer = served.engine, served.tokenizer
        grammars = Grammars(Vocabulary(tokenizer.to_json, engine.model.vocab_size, (EOS,)))
        compiled = await grammars.compile(Structure("regex", pattern, "x"), reasons=False)

        async def constrained(seed: int) -> str:
            request = new_request(random_prompt(30 + seed), SamplingParams(max_tokens=90, seed=seed, min_tokens=2))
            request.constraint = compiled.copy()
            text = "".join([output.text async for output in engine.submit(request)])
            return text.lstrip("\ufffd")  # the prompt ended inside a character

        plain = replace(greedy(90), seed=1)
        others = [asyncio.create_task(outputs_of(engine, random_prompt(40), plain)) for _ in range(6)]
        texts = await asyncio.gather(*map(constrained, range(8)))
        await asyncio.gather(*others)
        assert all(re.fullmatch(pattern, text) for text in texts), texts
        assert len(set(texts)) > 1
        assert engine.scheduler.num_preemptions > 0
        await grammars.close()
        await assert_idle(engine)
