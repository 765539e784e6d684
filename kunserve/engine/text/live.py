"""Live requests: from a sampled token to what its client is sent, and how a request may end."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from kunserve.compute.sampler import SampledToken
from kunserve.engine.request import Output, Request
from kunserve.engine.text.detokenizer import Detokenizer
from kunserve.engine.text.stop import finish_of
from kunserve.engine.text.stream import Sink
from kunserve.sampling import FinishReason, TokenLogprobs

log = structlog.get_logger()


@dataclass(slots=True)
class Live:
    """A request that has not ended, and its way out: its stream, and what turns its tokens into text."""

    request: Request
    stream: Sink
    detokenizer: Detokenizer | None
    last_token_s: float = 0.0

    def came(self, now_s: float) -> float | None:
        """Note when a token came; return the seconds since the one before, None for the first."""
        before_s, self.last_token_s = self.last_token_s, now_s
        if self.request.first_token_s is None:
            self.request.first_token_s = now_s
            return None
        return now_s - before_s

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

    def close_constraint(self) -> None:
        """Let go of the grammar, if there is one. The request has ended, and goes on to end, whatever that raises."""
        if self.request.constraint is not None:
            try:
                self.request.constraint.close()
            except Exception:
                log.exception("a grammar did not close")
