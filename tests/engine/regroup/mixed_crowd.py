"""One request of every kind whose answer a regrouping could spoil, and what an undisturbed engine answers to them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from structures import constraint, open_pool
from tiny_models import EOS, VOCAB_SIZE
from transition_harness import Answer, checked_engine

from kunserve.engine.request import Request
from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.grammar.compiled import Key
from kunserve.grammar.fork_server import Vocabulary
from kunserve.grammar.pool import Pool
from kunserve.sampling import FinishReason, SamplingParams

NUM_REQUESTS = 8  # of a crowd
STOPS, IS_STRUCTURED = 5, 6  # which of them
WORDS: Key = ("regex", "[a-z]{2,7}( [a-z]{2,7}){60}")


def pool_of(folder: Path) -> AbstractAsyncContextManager[Pool]:
    """Open the structures of a tiny model."""
    return open_pool(Vocabulary(Tokenizer(folder).to_json, VOCAB_SIZE, (EOS,)))


@dataclass(frozen=True, slots=True)
class Crowd:
    """Requests of equal length, and their answers. `new` makes them once more: a constraint serves only once."""

    prompts: list[list[int]]
    params: list[SamplingParams]
    answers: list[Answer] = field(default_factory=list)

    @classmethod
    async def make(cls, folder: Path, num_prompt_tokens: int, num_tokens: int) -> Crowd:
        """Ask an engine of one device that has room for all, first without the stop string: it has to be found."""
        rng = random.Random(num_prompt_tokens)
        prompts = [rng.choices(range(3, VOCAB_SIZE), k=num_prompt_tokens) for _ in range(NUM_REQUESTS)]
        prompts[3] = list(prompts[2])  # n=2
        crowd = cls(prompts, _params(num_tokens))
        num_blocks = NUM_REQUESTS * (num_prompt_tokens + num_tokens) // 4 + 64
        async with pool_of(folder) as pool, checked_engine(folder, "cpu:1", num_blocks, max_model_len=512) as checked:
            text = (await checked.answer_all(await crowd.new(pool)))[STOPS].text
            crowd.params[STOPS] = replace(crowd.params[STOPS], stop=(_late_piece(text),))
            crowd.answers.extend(await checked.answer_all(await crowd.new(pool)))
        crowd.check(num_tokens)
        return crowd

    async def new(self, pool: Pool) -> list[Request]:
        """The same requests, not run yet."""
        each = zip(self.prompts, self.params, strict=True)
        requests = [Request(f"r{i}", list(prompt), params) for i, (prompt, params) in enumerate(each)]
        requests[3].cache_salt = "its own KV"  # the loads count on it
        requests[IS_STRUCTURED].constraint = await constraint(pool, WORDS)
        return requests

    def check(self, num_tokens: int) -> None:
        """Assert that the answers are as different as the requests: else nothing is shown by getting them again."""
        stopped = self.answers[STOPS]
        assert stopped.finish == (FinishReason.STOP, self.params[STOPS].stop[0])
        assert num_tokens // 2 <= len(stopped.token_ids) <= num_tokens
        others = self.answers[:STOPS] + self.answers[STOPS + 1 :]
        assert all(answer.finish == (FinishReason.LENGTH, None) for answer in others)
        assert {len(answer.token_ids) for answer in others} == {num_tokens}
        assert self.answers[2].token_ids != self.answers[3].token_ids
        assert len(self.answers[0].logprobs) == num_tokens and len(self.answers[4].prompt_logprobs) > 1
        assert self.answers[IS_STRUCTURED].text.replace(" ", "").isalpha()


def assert_same(answers: Sequence[Answer], crowd: Crowd) -> None:
    """Text, tokens, endings and log-probabilities are those of the undisturbed engine."""
    for answer, its in zip(answers, crowd.answers, strict=True):
        answer.assert_same(its)


def _params(num_tokens: int) -> list[SamplingParams]:
    plain = SamplingParams(num_tokens, temperature=0, ignore_eos=True)
    pair = replace(plain, temperature=0.8, top_p=0.9, presence_penalty=0.5)
    return [
        replace(plain, num_logprobs=3),
        replace(plain, temperature=1.0, seed=11, num_logprobs=0),
        replace(pair, seed=21),
        replace(pair, seed=22),  # the same prompt once more
        replace(plain, num_prompt_logprobs=2),
        replace(plain, temperature=1.2, seed=5, top_k=40),  # stops at a string
        replace(plain, temperature=0.9, seed=6, num_logprobs=1),  # holds to a grammar
        replace(plain, temperature=1.0, seed=7, min_p=0.02, repetition_penalty=1.1, logit_bias=((40, 3.0),)),
    ]


def _late_piece(text: str) -> str:
    """Return the first piece in the last third of a text that has not come before, of whole characters."""
    for length in (2, 1):
        for start in range(2 * len(text) // 3, len(text) - length):
            piece = text[start : start + length]
            if "\N{REPLACEMENT CHARACTER}" not in piece and text.find(piece) == start:
                return piece
    raise AssertionError(f"no piece of {text!r} comes for the first time late")
