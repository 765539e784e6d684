"""Live requests: from a sampled token to what its client is sent, and how a request may end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import structlog

from kunserve.engine.request import Output, Request
from kunserve.engine.text.detokenizer import Detokenizer
from kunserve.engine.text.stop import finish_of
from kunserve.engine.text.stream import OutputStream, Sink, merged
from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.errors import InvalidRequestError
from kunserve.sampling import FinishReason, SampledToken, TokenLogprobs

log = structlog.get_logger()


@dataclass(slots=True)
class Live:
    """A request that has not ended, and its way out: its stream, and what turns its tokens into text."""

    request: Request
    stream: Sink
    detokenizer: Detokenizer | None
    last_token_s: float = 0.0
    is_simple: bool = field(init=False)  # nothing but a token id or their number ends it, and nobody asks for logprobs
    stop_token_ids: Collection[int] = field(init=False)

    def __post_init__(self) -> None:
        params, has_stops = self.request.params, self.detokenizer is not None and self.detokenizer.has_stops
        self.stop_token_ids = params.stop_token_ids
        is_scored = params.num_logprobs is not None or params.num_prompt_logprobs is not None
        self.is_simple = self.request.constraint is None and not has_stops and not is_scored

    @classmethod
    def of(cls, request: Request, stream: Sink, tokenizer: Tokenizer | None) -> Live:
        """Return a request's way out, at its newest token."""
        if tokenizer is None or not stream.wants_text:
            return cls(request, stream, None)
        detokenizer = Detokenizer(tokenizer, request.params, request.prompt_token_ids)
        for token_id in request.output_token_ids:  # none, unless another engine has begun it
            detokenizer.push(token_id)
        return cls(request, stream, detokenizer)

    def came(self, now_s: float) -> float | None:
        """Note when a token came; return the seconds since the one before, None for the first."""
        before_s, self.last_token_s = self.last_token_s, now_s
        if self.request.first_token_s is None:
            self.request.first_token_s = now_s
            return None
        return now_s - before_s

    def say(self, token_id: int, eos_token_ids: tuple[int, ...]) -> str | None:
        """Append a token that ends nothing to a simple request; returns its text, as `take` would.

        None, and nothing is appended, if it may be the last.
        """
        token_ids, detokenizer = self.request.token_ids, self.detokenizer
        if len(token_ids) + 1 >= self.request.max_num_tokens or token_id in eos_token_ids:
            return None
        if token_id in self.stop_token_ids:
            return None
        token_ids.append(token_id)
        if detokenizer is None:
            return ""
        text = detokenizer.whole.get(token_id) if detokenizer.is_whole else None
        return detokenizer.push(token_id) if text is None else text

    def take(self, token: SampledToken, eos_token_ids: tuple[int, ...]) -> Output:
        """Append a token to the request; returns what it says, and whether it is the last.

        Raises what this request's own grammar, tokenizer or stop strings raise.
        """
        request, is_complete = self.request, False
        request.token_ids.append(token.token_id)
        if request.constraint is not None:
            if (wrong := request.constraint.error) is not None:
                raise wrong
            is_complete = request.constraint.is_finished
        reason: FinishReason | None
        stop: int | str | None
        reason, stop = finish_of(request, eos_token_ids) or (None, None)
        text = ""
        if self.detokenizer is not None:
            if reason is not FinishReason.STOP:
                text = self.detokenizer.push(token.token_id)
            if self.detokenizer.stopped is not None:
                reason, stop = FinishReason.STOP, self.detokenizer.stopped
            elif reason is not None or is_complete:
                text += self.detokenizer.flush()
        if reason is None and is_complete:
            reason = FinishReason.STOP
        logprobs = (token.logprobs,) if token.logprobs else ()
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        if request.prompt_logprobs and request.num_output_tokens == 1:
            prompt_logprobs = tuple(request.prompt_logprobs)
        return Output(text, (token.token_id,), logprobs, reason, stop, prompt_logprobs)

    def close(self, now_s: float) -> None:
        """End the trace and let go of the grammar, if there are. The request ends, whatever the grammar raises."""
        if self.request.trace is not None:
            self.request.trace.end(self.request, now_s)
        if self.request.constraint is not None:
            try:
                self.request.constraint.close()
            except Exception:
                log.exception("a grammar did not close")


async def replay(
    request: Request, token_ids: Sequence[int], tokenizer: Tokenizer | None, eos_token_ids: tuple[int, ...]
) -> Output:
    """Give a new request the tokens that another engine has generated for it; return what they say, in one piece.

    Afterwards the request goes on as if it had never been interrupted: its next token is a function of its tokens,
    parameters and seed. If the output has a finish reason, it is over. Log-probabilities are not known again: those
    that were asked for are 0, so that what counts them still does. Raises InvalidRequestError for tokens that this
    request cannot have.
    """
    request.is_continued = True
    live, constraint, whole = Live.of(request, OutputStream(), tokenizer), request.constraint, Output()
    for i, token_id in enumerate(token_ids):
        if constraint is not None:
            constraint.accept(token_id)
            if i == len(token_ids) - 1:  # only the last can be the end; waiting for each would take seconds
                await constraint.decided()
                if constraint.error is not None:
                    raise InvalidRequestError(constraint.error.message, param="token_ids")
        if whole.finish_reason is not None:
            raise InvalidRequestError("`token_ids` go on after the end of the answer.", param="token_ids")
        scored = None if request.params.num_logprobs is None else TokenLogprobs(token_id, 0.0, ())
        whole = merged(whole, live.take(SampledToken(token_id, scored), eos_token_ids))
    return whole
