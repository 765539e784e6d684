"""Structures' processes die, by hand and of bombs, while constrained and free streams run: no token changes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from structures import constraint, open_pool, processes_of
from tiny_models import VOCAB_SIZE

from e2e.engines import LAYOUTS, assert_idle, new_request, running_engine
from e2e.tiny import random_prompt
from kunserve.engine.engine import Engine
from kunserve.grammar.compiled import Key
from kunserve.grammar.fork_server import Vocabulary
from kunserve.grammar.limits import RefusedError
from kunserve.grammar.pool import Pool
from kunserve.sampling import FinishReason, SamplingParams

STRUCTURES: list[Key | None] = [
    ("regex", "(ab|ba|c){20,30}z"),
    ("grammar", 'start: "[" (start | /[a-f]{1,3}/ ","?)* "]"'),
    ("regex", "[a-z ]{40}"),
    None,
]
DRAWN = SamplingParams(60, temperature=0.8)
Answer = tuple[list[int], FinishReason | None]


async def answers(engine: Engine, pool: Pool, at_token: Callable[[int], None]) -> list[Answer]:
    """Twelve streams at once; `at_token` is called with the number of each token that comes of the first."""

    async def answer(i: int) -> Answer:
        request = new_request(random_prompt(20 + i), replace(DRAWN, seed=i))
        if (key := STRUCTURES[i % 4]) is not None:
            request.constraint = await constraint(pool, key)
        tokens: list[int] = []
        async for output in engine.submit(request):
            tokens += output.token_ids
            if i == 0:
                at_token(len(tokens))
        return tokens, request.finish_reason

    return await asyncio.gather(*map(answer, range(12)))


@pytest.mark.parametrize("layout", ["cpu:2", "chain"])
async def test_streams_are_exact_whatever_dies(six_layers: Path, layout: str) -> None:
    settings = {**LAYOUTS[layout].settings, "block_size": 8, "max_model_len": 112, "chunk_bytes": 1 << 14}
    async with running_engine(six_layers, dtype="float32", is_pinned=True, **settings) as served:
        vocabulary = Vocabulary(served.tokenizer.to_json, VOCAB_SIZE, served.files.config.eos_token_ids)
        async with open_pool(vocabulary) as pool:
            expected = await answers(served.engine, pool, lambda _: None)
            bombs: list[Awaitable[object]] = []

            def disturb(num_tokens: int) -> None:
                if num_tokens in (2, 6, 11):
                    for pid in processes_of(pool):
                        os.kill(pid, signal.SIGSEGV if num_tokens == 6 else signal.SIGKILL)
                elif num_tokens == 8 and pool.fork_server_pid is not None:
                    os.kill(pool.fork_server_pid, signal.SIGKILL)
                elif num_tokens == 4:
                    chain = "\n".join(f"r{i}: r{i + 1}" for i in range(4000))
                    grammar = f'start: r0\n{chain}\nr4000: "a"'
                    bombs.append(asyncio.ensure_future(pool.compile(("grammar", grammar), "x")))

            found = await answers(served.engine, pool, disturb)
            assert found == expected
            with pytest.raises(RefusedError):
                await asyncio.gather(*bombs)
            await assert_idle(served.engine)
    assert len(expected[0][0]) > 11
    assert {reason for _, reason in expected} == {FinishReason.STOP, FinishReason.LENGTH}
