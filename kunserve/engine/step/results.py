"""Results: what a microbatch brought to each of its requests, and what their grammars say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kunserve.compute.sampler import SampledToken
from kunserve.engine.batch import Microbatch, scored_positions
from kunserve.engine.request import Constraint, Request


@dataclass(slots=True)
class Result:
    """What one step brought to one request."""

    request: Request
    scored: list[tuple[int, SampledToken]]  # positions of its prompt, and how likely their next tokens were
    token: SampledToken | None  # the next one, if the step reached its last
    error: BaseException | None  # what went wrong in the work for it alone

    def add_prompt_logprobs(self) -> None:
        """Give the request what it lacks: a preempted prompt is scored again."""
        known = self.request.prompt_logprobs
        for position, scored in self.scored:
            if scored.logprobs and position == len(known):
                known.append(scored.logprobs)


@dataclass(frozen=True, slots=True)
class Results:
    """What one step brought: a token to each of those who decode, in their order, and results to the others."""

    decoding: Sequence[SampledToken] = ()
    others: Sequence[Result] = ()

    @classmethod
    def of(cls, batch: Microbatch, tokens: Sequence[SampledToken]) -> Results:
        """Return what each request of a microbatch gets of its sampled tokens, which come span by span."""
        num_decoding, others = len(batch.decoding.requests), list[Result]()
        sampled = iter(tokens[num_decoding:])
        for span in batch.others:
            positions, token = scored_positions(span), None
            scored = [(position, next(sampled)) for position in positions] if positions else []
            error = next((row.error for _, row in scored if row.error is not None), None) if scored else None
            if span.samples:
                token = next(sampled)
                error = token.error if error is None else error
            others.append(Result(span.request, scored, token, error))
        return cls(tokens[:num_decoding], others)


async def judge(results: Sequence[Result]) -> None:
    """Give the tokens of a microbatch to the grammars of their requests, all at once; return when all have judged them.

    That is in other processes: meanwhile the loop runs, and requests may end. What a grammar raises is its result's
    error.
    """
    judging = list[tuple[Result, Constraint]]()
    for result in results:
        request, token = result.request, result.token
        if request.constraint is None or token is None or token.error is not None or request.is_over_here:
            continue
        try:
            request.constraint.accept(token.token_id)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic in a grammar's Rust code is no Exception
            result.error = error
        else:
            judging.append((result, request.constraint))
    for result, constraint in judging:
        try:
            await constraint.decided()
        except Exception as error:
            result.error = error
