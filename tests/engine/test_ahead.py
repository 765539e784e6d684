"""Running ahead: the next step is planned before the last one's tokens are known, and no token changes by it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from e2e.engines import LAYOUTS, assert_idle, running_engine
from engine_fakes import EOS, Step, make_request, read, scripted_engine, token_ids
from structures import constraint, open_pool
from tiny_models import VOCAB_SIZE

from kunserve.compute.sampler import SampledToken, SamplingRow
from kunserve.engine.engine import Engine
from kunserve.engine.request import Output, Request
from kunserve.engine.step.microbatch import fill_sampling, fill_token_ids
from kunserve.engine.text.stream import OutputStream
from kunserve.errors import DeviceError
from kunserve.grammar.fork_server import Vocabulary
from kunserve.grammar.pool import Pool
from kunserve.sampling import FinishReason, SamplingParams, TokenLogprobs

DRAWN = SamplingParams(16, temperature=0.9, seed=3, ignore_eos=True)
CHOICES = (
    replace(DRAWN, temperature=0.0),
    replace(DRAWN, top_p=0.9, num_logprobs=2),
    replace(DRAWN, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
    replace(DRAWN, bad_words=tuple((i, j) for i in range(40, 60) for j in range(0, VOCAB_SIZE, 2))),
    replace(DRAWN, min_tokens=9, ignore_eos=False, stop_token_ids=frozenset(range(0, VOCAB_SIZE, 3))),
    replace(DRAWN, num_prompt_logprobs=1, logit_bias=((7, 2.0), (9, 2.0))),
    replace(DRAWN, max_tokens=1),
    replace(DRAWN, max_tokens=200),  # beyond the model's length
    replace(DRAWN, stop=("th", "e", "a")),
)


async def requests(pool: Pool) -> list[Request]:
    """Two that begin together and fill 20 blocks, every kind of sampling twice, and two grammars."""
    made = [Request(f"long {i}", [3, 4, 5 + i], replace(DRAWN, max_tokens=70, seed=i)) for i in range(2)]
    made += [
        Request(f"r{i}", [(11 * i + k) % VOCAB_SIZE for k in range(3 + 5 * i)], replace(p, seed=i))
        for i, p in enumerate(CHOICES * 2)
    ]
    for i, pattern in enumerate(("(ab|ba|c){1,9}", "[a-f]{30}")):
        request = Request(f"g{i}", [5, 6, 7 + i], replace(DRAWN, ignore_eos=False, max_tokens=40))
        request.constraint = await constraint(pool, ("regex", pattern))
        made.append(request)
    return made


async def answers(engine: Engine, asked: Sequence[Request]) -> list[tuple[object, ...]]:
    """Text, tokens, ending, and logprobs but for the last bits, which differ with the batch."""

    async def answer(stream: AsyncIterator[Output]) -> tuple[object, ...]:
        outputs = await read(stream)
        scores = [lp for o in outputs for lp in (*o.prompt_logprobs, *o.logprobs)]
        return (
            "".join(o.text for o in outputs),
            token_ids(outputs),
            (outputs[-1].finish_reason, outputs[-1].stop_reason),
            [(lp.token_id, lp.logprob, lp.rank, lp.top) for lp in scores],
        )

    return await asyncio.gather(*(answer(engine.submit(request)) for request in asked))


@pytest.mark.parametrize("layout", ["cpu:1", "chain"])
@pytest.mark.parametrize("num_blocks", [200, 15])  # of 8 tokens: plenty, and so few that requests are preempted
async def test_same_tokens_as_without(six_layers: Path, layout: str, num_blocks: int) -> None:
    found = []
    for is_ahead in (False, True):
        async with running_engine(
            six_layers,
            **LAYOUTS[layout].settings,
            dtype="float32",
            block_size=8,
            chunk_bytes=1 << 13,
            num_blocks_override=num_blocks,
            max_model_len=112,
            max_num_batched_tokens=32,
            is_pinned=True,
            async_scheduling=is_ahead,
            microbatching="tokens",  # smaller parts of prompts would fit into so few blocks
        ) as served:
            vocabulary = Vocabulary(served.tokenizer.to_json, VOCAB_SIZE, served.files.config.eos_token_ids[:1])
            async with open_pool(vocabulary) as pool:
                found.append(await answers(served.engine, await requests(pool)))
            await assert_idle(served.engine)
            scheduler = served.engine.scheduler
        assert (scheduler.num_preemptions + scheduler.swapped.num_swaps > 0) is (num_blocks == 15)
    off, on = found
    assert on == off
    assert {len(tokens) for _, tokens, *_ in off if isinstance(tokens, list)} > {1, 16}


async def until_read(stream: OutputStream) -> list[Output]:
    return await asyncio.wait_for(read(stream), 5)


async def test_the_next_step_is_launched_with_a_placeholder_before_the_token_is_known() -> None:
    async with scripted_engine(num_ahead=1) as (engine, executor):
        streams = [engine.submit(make_request(name, 5, 3, presence_penalty=0.5)) for name in ("a", "b")]
        first, second = await executor.next_step(), await executor.next_step()
        assert second.inputs.token_ids.tolist() == [-1, -2] and second.inputs.positions.tolist() == [5, 5]
        assert second.inputs.depends_on is first.inputs.sampled
        assert [row.output_token_ids for row in second.inputs.sampling] == [(-1,), (-2,)]
        assert executor.num_pending == 0
        first.finish(7, 8)
        third = await executor.next_step()
        assert third.inputs.token_ids.tolist() == [-1, -2]
        assert [row.output_token_ids for row in third.inputs.sampling] == [(7, -1), (8, -2)]
        second.finish(9, 10)
        third.finish(11, 12)
        assert [token_ids(await until_read(s)) for s in streams] == [[7, 9, 11], [8, 10, 12]]
        assert executor.num_pending == 0  # nobody runs beyond max_tokens
        await assert_idle(engine)


async def test_what_was_computed_beyond_the_end_is_not_used() -> None:
    async with scripted_engine(num_ahead=1) as (engine, executor):
        stream = engine.submit(make_request("a", 5, 9))
        first, second = await executor.next_step(), await executor.next_step()
        first.finish(EOS)
        outputs = await until_read(stream)
        assert token_ids(outputs) == [EOS] and outputs[-1].finish_reason is FinishReason.STOP
        assert engine.groups[0].num_used == 2 and engine.num_running == 1  # the second step still writes there
        follower = engine.submit(make_request("a", 4, 1))  # even under the same id
        third = await executor.next_step()
        second.finish(3)
        third.finish(4)
        assert token_ids(await until_read(follower)) == [4]
        await assert_idle(engine)


async def test_a_client_that_leaves_is_not_scheduled_again() -> None:
    async with scripted_engine(num_ahead=1) as (engine, executor):
        stream = engine.submit(make_request("a", 5, 9))
        first, second = await executor.next_step(), await executor.next_step()
        engine.abort("a")
        assert await until_read(stream) == [Output(finish_reason=FinishReason.ABORT)]
        first.finish(7)
        await asyncio.sleep(0)
        assert engine.groups[0].num_used == 2
        second.finish(8)
        await assert_idle(engine)
        assert executor.num_pending == 0


async def test_who_only_shares_the_step_after_a_failed_one_goes_on_and_the_other_starts_over() -> None:
    async with scripted_engine(num_ahead=1) as (engine, executor):
        a = engine.submit(make_request("a", 5, 4))
        first, second = await executor.next_step(), await executor.next_step()
        first.finish(7)
        b = engine.submit(make_request("b", 4, 1))
        third = await executor.next_step()
        assert third.num_tokens == 5  # a's next token, and b's prompt
        second.fail(DeviceError("broken"))
        third.finish(8, 9)  # the 8 follows a token that nobody knows
        assert token_ids(await until_read(b)) == [9]
        fourth = await executor.next_step()
        assert fourth.inputs.token_ids.tolist() == [*range(1, 6), 7]
        fourth.finish(10)
        for token_id in (11, 12):
            (await executor.next_step()).finish(token_id)
        assert token_ids(await until_read(a)) == [7, 10, 11, 12]
        await assert_idle(engine)


def row(*output: int, **params: object) -> SamplingRow:
    return SamplingRow(replace(DRAWN, **params), 0, (1, 2), output, ())  # type: ignore[arg-type]


def test_placeholders_are_filled_where_it_matters() -> None:
    inputs = torch.tensor([4, -1, 5, -3], dtype=torch.int32)
    assert fill_token_ids(inputs, [7, 8, 9]).tolist() == [4, 7, 5, 9]
    assert fill_token_ids(inputs, None).tolist() == [4, 0, 5, 0] and inputs.tolist() == [4, -1, 5, -3]
    rows = [row(3, -2), row(3, -2, presence_penalty=1.0), row(3, 4, presence_penalty=1.0), row(bad_words=((1,),))]
    filled = [r.output_token_ids for r in fill_sampling(rows, [7, 8])]
    assert filled == [(3, -2), (3, 8), (3, 4), ()]  # the first needs their number only
    assert [r.output_token_ids for r in fill_sampling(rows, None)] == [(3, -2), (3, 0), (3, 4), ()]


async def test_what_comes_back_too_early_is_committed_in_its_turn() -> None:
    """At the end of a chain a microbatch without rows to share passes the one before, whose head both ends compute."""

    def scored(step: Step) -> list[SampledToken]:
        rows = enumerate(step.inputs.sampling)
        return [SampledToken(1, TokenLogprobs(row.given or 1, float(-i), ())) for i, row in rows]

    async with scripted_engine(num_stages=2, max_num_batched_tokens=4) as (engine, executor):
        request = make_request("a", 5, 2, num_prompt_logprobs=0)
        stream = engine.submit(request)
        first, second = await executor.next_step(), await executor.next_step()
        assert (first.num_tokens, second.num_tokens) == (4, 1)
        second.done.set_result(scored(second))
        for _ in range(5):
            await asyncio.sleep(0)
        assert request.num_computed_tokens == 0 and engine.groups[0].num_in_flight == 2
        first.done.set_result(scored(first))
        output = await anext(stream)
        assert [given.logprob for given in output.prompt_logprobs] == [0, -1, -2, -3] and output.token_ids == (1,)
        assert request.num_computed_tokens == 5
        (await executor.next_step()).finish(3)
        assert token_ids(await until_read(stream)) == [3]
        await assert_idle(engine)
