"""One request's fault ends that one: its neighbours in the microbatch get the tokens that they get without it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from e2e.engines import LAYOUTS, assert_idle, running_engine
from engine_fakes import make_request, read, scripted_engine, token_ids
from row_faults import BAD_TOKEN, DRAWN, EVERY_LAYOUT, GREEDY, NOT_A_NUMBER, Fault, Grammar
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from structures import constraint, open_pool
from tiny_models import EOS, VOCAB_SIZE, make_tiny_model

from kunserve.compute import sampler
from kunserve.compute.logprobs import logprobs_of
from kunserve.compute.sampler import SampledToken
from kunserve.engine.batch import Microbatch
from kunserve.engine.engine import Engine
from kunserve.engine.group import Group
from kunserve.engine.launch.launch import Served
from kunserve.engine.request import Output, Request
from kunserve.engine.text.detokenizer import Detokenizer
from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.errors import EngineError, KunServeError
from kunserve.grammar.fork_server import Vocabulary
from kunserve.grammar.pool import Pool
from kunserve.sampling import TokenLogprobs

Answer = list[Output] | KunServeError


@pytest.fixture(scope="module")
def broken_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one embedding that is no number, and a head of its own."""
    folder = make_tiny_model("llama", tmp_path_factory.mktemp("broken"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][BAD_TOKEN] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which both ends of a chain hold the head."""
    return make_tiny_model("qwen3-tied", tmp_path_factory.mktemp("tied"))


@pytest.fixture
def broken_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for 17 of them makes the sampler fail."""

    def broken(logits: torch.Tensor, token_id: int, num_logprobs: int | None) -> TokenLogprobs | None:
        return 1 // 0 if num_logprobs == 17 else logprobs_of(logits, token_id, num_logprobs)  # type: ignore[return-value]

    monkeypatch.setattr(sampler, "logprobs_of", broken)
    monkeypatch.setattr(sampler, "scored", broken)


class Neighbours:
    """Requests of every kind, and what they are answered while nobody fails."""

    def __init__(self, served: Served, pool: Pool) -> None:
        self.engine: Engine = served.engine
        self._pool = pool
        self._shared = Counter[str]()  # who was in a microbatch with the bad request, and how often
        self._commit = self.engine.scheduler.commit
        self.engine.scheduler.commit = self._noted_commit  # type: ignore[method-assign]
        self.expected: list[Answer] = []

    def _noted_commit(self, group: Group, batch: Microbatch) -> list[Request]:
        ids = [span.request.request_id for span in batch.spans]
        if "bad" in ids:
            self._shared.update(ids)
        return self._commit(group, batch)

    async def make(self) -> list[Request]:
        grammar = await constraint(self._pool, ("regex", "[a-f]{30}"))
        return [
            Request("greedy", [3, 4, 5], GREEDY),
            Request("n 0", [11, 12, 13], DRAWN),
            Request("n 1", [11, 12, 13], replace(DRAWN, seed=4)),
            Request("filtered", [14, 15], replace(DRAWN, top_p=0.9, num_logprobs=3)),
            Request("scored", [16, 17, 18, 19], replace(DRAWN, num_prompt_logprobs=2)),
            Request("penalised", [20, 21], replace(DRAWN, repetition_penalty=1.3, presence_penalty=0.4)),
            Request("constrained", [22, 23, 24], DRAWN, constraint=grammar),
            Request("stopping", [25, 26, 27, 28], replace(DRAWN, stop=("qqq", "th"))),
        ]

    async def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """All at once; an answer in one piece, whatever pieces it came in."""

        async def answer(stream: AsyncIterator[Output]) -> Answer:
            outputs = list[Output]()
            try:
                async for output in stream:
                    outputs.append(output)
            except KunServeError as error:
                return error
            return outputs

        return await asyncio.gather(*(answer(self.engine.submit(request)) for request in requests))

    async def survive(self, fault: Fault, place: int) -> int:
        """Ask with the bad request at `place`: it fails, and nobody else notices. How many were in its microbatches."""
        self._shared.clear()
        requests = await self.make()
        requests.insert(place, fault.make())
        with capture_logs() as logged:
            answers = await self.ask(requests)
            await assert_idle(self.engine)
        error = answers.pop(place)
        assert isinstance(error, KunServeError), error
        with pytest.raises(KunServeError, match=fault.message):
            raise error
        assert merged(answers) == merged(self.expected)
        tracebacks = [entry for entry in logged if entry.get("exc_info")]
        assert len(tracebacks) == fault.num_tracebacks
        assert [entry["request"] for entry in logged if entry["log_level"] == "error"] == ["bad"] * (
            error.status == 500
        )
        return len(self._shared) - 1


def merged(answers: Sequence[Answer]) -> list[object]:
    """Text, tokens, every log-probability to the last bit, and the ending."""
    found = list[object]()
    for outputs in answers:
        assert isinstance(outputs, list), outputs
        scores = [lp for o in outputs for lp in (*o.prompt_logprobs, *o.logprobs)]
        text = "".join(o.text for o in outputs)
        found.append((text, token_ids(outputs), scores, outputs[-1].finish_reason, outputs[-1].stop_reason))
    return found


@asynccontextmanager
async def neighbours(folder: Path, layout: str, is_ahead: bool) -> AsyncIterator[Neighbours]:
    async with running_engine(
        folder,
        **LAYOUTS[layout].settings,
        block_size=8,
        chunk_bytes=1 << 14,
        num_blocks_override=200,
        is_pinned=True,
        async_scheduling=is_ahead,
        microbatching="tokens",
    ) as served:
        LAYOUTS[layout].check(served.engine)
        async with open_pool(Vocabulary(served.tokenizer.to_json, VOCAB_SIZE, (EOS,))) as pool:
            some = Neighbours(served, pool)
            some.expected = await some.ask(await some.make())
            yield some


@pytest.mark.usefixtures("broken_logprobs")
@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("layout", ["cpu:1", "cpu:2", "chain"])
async def test_neighbours_of_a_request_that_fails_get_the_same_tokens(
    broken_model: Path, layout: str, is_ahead: bool
) -> None:
    async with neighbours(broken_model, layout, is_ahead) as some:
        num, shared = len(some.expected), list[int]()
        for i, fault in enumerate((EVERY_LAYOUT | NOT_A_NUMBER).values()):
            shared += [await some.survive(fault, place) for place in (0, num, 1 + i % (num - 1))]
        if layout == "cpu:2":  # who comes first may be alone in a group's first step
            assert sum(shared) > num * len(shared) / 4
        else:
            assert set(shared) == {num}


@pytest.mark.usefixtures("broken_logprobs")
@pytest.mark.parametrize("is_ahead", [False, True])
async def test_both_ends_of_a_chain_that_share_the_head_find_a_bad_row(tied_model: Path, is_ahead: bool) -> None:
    async with neighbours(tied_model, "chain", is_ahead) as some:
        for fault in EVERY_LAYOUT.values():
            for place in (0, 3, 5, len(some.expected)):
                assert await some.survive(fault, place) == len(some.expected)


async def test_every_place_in_the_microbatch(broken_model: Path) -> None:
    async with neighbours(broken_model, "cpu:1", is_ahead=True) as some:
        for place in range(len(some.expected) + 1):
            assert await some.survive(NOT_A_NUMBER["NaN in the prompt"], place) == len(some.expected)


async def test_text_that_cannot_be_ended_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scripted_engine(tokenizer=Tokenizer.dummy(100)) as (engine, executor):
        streams = [engine.submit(make_request(name, 5, 2)) for name in ("a", "bad", "b")]
        bad, flush = engine.live["bad"].detokenizer, Detokenizer.flush
        monkeypatch.setattr(Detokenizer, "flush", lambda self: 1 // 0 if self is bad else flush(self))
        for tokens in ((40, 50, 60), (41, 51, 61)):
            (await executor.next_step()).finish(*tokens)
        assert token_ids(await read(streams[0])) == [40, 41] and token_ids(await read(streams[2])) == [60, 61]
        with pytest.raises(EngineError, match="a step failed: ZeroDivisionError"):
            await read(streams[1])
        await assert_idle(engine)


async def test_a_grammar_that_does_not_close_leaves_no_block_behind() -> None:
    async with scripted_engine() as (engine, executor):
        request = make_request("bad", 5, 1)
        request.constraint = Grammar("close", 0, ValueError("stuck"))
        streams = [engine.submit(request), engine.submit(make_request("a", 5, 1))]
        with capture_logs() as logged:
            (await executor.next_step()).finish(7, 8)
            assert [token_ids(await read(stream)) for stream in streams] == [[7], [8]]
        assert [entry["event"] for entry in logged] == ["a grammar did not close"]
        await assert_idle(engine)


async def test_a_fault_of_who_has_ended_already_is_nobodys() -> None:
    async with scripted_engine(num_ahead=1) as (engine, executor):
        streams = [engine.submit(make_request(name, 5, 3)) for name in ("bad", "a")]
        first, second = await executor.next_step(), await executor.next_step()
        assert second.inputs.token_ids.tolist() == [-1, -2]
        bad = sampler.failed(EngineError("broken"))
        with capture_logs() as logged:
            first.done.set_result([bad, SampledToken(7)])
            with pytest.raises(EngineError, match="broken"):
                await read(streams[0])
            assert engine.num_running == 2  # the second step still writes into its blocks
            second.done.set_result([bad, SampledToken(8)])
            third = await executor.next_step()
            third.finish(9)
            assert token_ids(await read(streams[1])) == [7, 8, 9]
        assert len(logged) == 1
        await assert_idle(engine)
