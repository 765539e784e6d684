"""Outputs of the engine to JSON: what one answer says about itself, its chunks, its choices, its usage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import orjson

from kunserve.api.ask.protocol import GenerationCall
from kunserve.api.say.echo import Echo
from kunserve.api.say.reasoning import MessageParser
from kunserve.api.say.reasoning_tokens import ReasoningTokens
from kunserve.api.wire.backend import TextTokenizer
from kunserve.api.wire.context import fragment
from kunserve.api.wire.errors import error_event
from kunserve.api.wire.sse import DONE
from kunserve.engine.request import Output, Request
from kunserve.engine.text.positions import Positions
from kunserve.errors import KunServeError
from kunserve.sampling import FinishReason, TokenLogprobs


@dataclass(slots=True)
class Choice:
    """One sequence of an answer, as far as it has come."""

    index: int
    request: Request
    echo: Echo | None = None  # the prompt, if the answer begins with it
    parser: MessageParser | None = None  # None: the text is the message
    num_tokens: int = 0
    text_length: int = 0
    has_begun: bool = False  # what opens it has been said
    outputs: list[Output] = field(default_factory=list)  # kept for an answer in one piece only
    positions: Positions | None = None  # of its tokens in its text, once somebody has asked
    reasoning: ReasoningTokens | None = None  # if the model may reason

    def advance(self, output: Output) -> None:
        """Count the tokens and characters of an output."""
        self.num_tokens += len(output.token_ids)
        if self.reasoning is not None:
            self.reasoning.take(output.token_ids)
        self.text_length += len(output.text)

    @property
    def num_reasoning_tokens(self) -> int:
        """Return how many tokens of the choice are reasoning."""
        return 0 if self.reasoning is None else self.reasoning.num_tokens

    @property
    def text(self) -> str:
        """Return the text that was generated."""
        return "".join(output.text for output in self.outputs)

    @property
    def token_ids(self) -> list[int]:
        """Return the token ids that were generated."""
        return [token_id for output in self.outputs for token_id in output.token_ids]

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs]:
        """Return log-probabilities of each token of the prompt but the first."""
        return [entry for output in self.outputs for entry in output.prompt_logprobs]

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Return log-probabilities of each token that was generated."""
        return [entry for output in self.outputs for entry in output.logprobs]


def usage_json(
    num_prompt_tokens: int, num_tokens: int, num_cached_tokens: int, num_reasoning_tokens: int | None = None
) -> dict[str, Any]:
    """Return the `usage` object. `num_reasoning_tokens`: None where the model does not reason."""
    details = {"completion_tokens_details": {"reasoning_tokens": num_reasoning_tokens}}
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
        **({} if num_reasoning_tokens is None else details),
    }


def total_usage(choices: Sequence[Choice], n: int) -> dict[str, Any]:
    """Return the `usage` of an answer: a prompt counts once, however many choices it has."""
    num_prompt_tokens = sum(choice.request.num_prompt_tokens for choice in choices[::n])
    num_cached_tokens = sum(choice.request.num_cached_tokens for choice in choices[::n])
    reasons = any(choice.reasoning is not None for choice in choices)
    num_reasoning_tokens = sum(choice.num_reasoning_tokens for choice in choices) if reasons else None
    num_tokens = sum(choice.num_tokens for choice in choices)
    return usage_json(num_prompt_tokens, num_tokens, num_cached_tokens, num_reasoning_tokens)


class AnswerWriter(Protocol):
    """How one endpoint writes its answers."""

    call: GenerationCall

    def opening(self, choice: Choice, output: Output) -> bytes:
        """Return events before a choice's first chunk, which is for `output`."""

    def chunk(self, choice: Choice, output: Output) -> bytes:
        """Return events for a delta, not yet counted into `choice`; perhaps none."""

    def ending(self, choices: Sequence[Choice]) -> bytes:
        """Return events after the last chunk."""

    def error(self, error: KunServeError) -> bytes:
        """Return events that end the answer with an error."""

    def answer_json(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the answer in one piece."""


class AnswerFormat(ABC):
    """The JSON of one endpoint. What does not change within an answer is built once, so a chunk costs little."""

    object: ClassVar[str]
    chunk_object: ClassVar[str]
    text_open: ClassVar[bytes]  # a chunk's text stands between these
    text_close: ClassVar[bytes]

    def __init__(self, answer_id: str, created: int, call: GenerationCall, tokenizer: TextTokenizer) -> None:
        self.call = call
        self.is_call_the_end = True  # a tool call is a reason to finish
        self.tokenizer = tokenizer
        self._identity = {"id": answer_id, "created": created, "model": call.model}
        self._chunk_identity = {"object": self.chunk_object, **self._identity}
        self._head = b"data: " + orjson.dumps(self._chunk_identity)[:-1] + b',"choices":[{"index":'
        self._tail = b'}],"usage":null}\n\n' if call.include_usage else b"}]}\n\n"
        self._is_short = not (call.return_token_ids or call.continuous_usage)  # most chunks have nothing but a text
        self._short_heads: dict[int, bytes] = {}  # by choice
        self._short_end = self.text_close + b',"logprobs":null,"finish_reason":null' + self._tail

    @abstractmethod
    def logprobs_json(self, choice: Choice, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Return log-probabilities of the next tokens of a choice."""

    @abstractmethod
    def choice_json(self, choice: Choice) -> dict[str, Any]:
        """Return a finished choice, without index, finish_reason and stop_reason."""

    def opening(self, choice: Choice, output: Output) -> bytes:
        """Return events before a choice's first chunk, which is for `output`."""
        return b""

    def event_of(self, choice: Choice, shown: dict[str, Any], **more: Any) -> bytes:
        """Return a chunk of one choice that brings no tokens."""
        usage = {"usage": self.usage_of(choice)} if self.call.continuous_usage else {}
        return self.event([shown], **usage, **more)

    def event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        """Return a chunk that is not worth prebuilding."""
        usage = {"usage": None} if self.call.include_usage else {}
        chunk = {**self._chunk_identity, "choices": choices, **usage, **more}
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def chunk(self, choice: Choice, output: Output) -> bytes:
        """Return the event for a delta, not yet counted into `choice`."""
        if self._is_short and output.finish_reason is None and not output.logprobs:
            if (head := self._short_heads.get(choice.index)) is None:
                head = self._short_heads[choice.index] = b"%b%d%b" % (self._head, choice.index, self.text_open)
            return head + orjson.dumps(output.text) + self._short_end
        parts = [self._head, b"%d" % choice.index, self.text_open, orjson.dumps(output.text), self.text_close]
        if output.logprobs:
            parts += b',"logprobs":', orjson.dumps(self.logprobs_json(choice, output.logprobs))
        else:
            parts.append(b',"logprobs":null')
        if output.finish_reason is None:
            parts.append(b',"finish_reason":null')
        else:
            parts += b',"finish_reason":', orjson.dumps(output.finish_reason)
            parts += b',"stop_reason":', orjson.dumps(output.stop_reason)
        if self.call.return_token_ids:
            parts += b',"token_ids":', orjson.dumps(output.token_ids)
        if self.call.continuous_usage:
            parts += b'}],"usage":', orjson.dumps(self.usage_of(choice, output)), b"}\n\n"
        else:
            parts.append(self._tail)
        return b"".join(parts)

    def usage_of(self, choice: Choice, output: Output | None = None) -> dict[str, Any]:
        """Return the `usage` of one choice, after a delta that is not yet counted into it if there is one."""
        num_new = 0 if output is None else len(output.token_ids)
        request = choice.request
        return usage_json(request.num_prompt_tokens, choice.num_tokens + num_new, request.num_cached_tokens)

    def finish_reason(self, choice: Choice, output: Output) -> str | None:
        """Return why a choice ended; the message has been parsed."""
        has_calls = self.is_call_the_end and choice.parser is not None and choice.parser.num_calls > 0
        return "tool_calls" if has_calls and output.finish_reason is FinishReason.STOP else output.finish_reason

    def ending(self, choices: Sequence[Choice]) -> bytes:
        """Return the last events: usage, if the client asked for it, and the mark of the end."""
        usage = self.event([], usage=total_usage(choices, self.call.n)) if self.call.include_usage else b""
        return usage + DONE

    def error(self, error: KunServeError) -> bytes:
        """Return the event of an error after the answer has begun."""
        return error_event(error) + DONE

    def prompt_logprobs_json(self, choice: Choice) -> list[orjson.Fragment | None]:
        """Return vLLM's `prompt_logprobs`: per token its own and the most likely ones; nothing for the first."""
        shown: list[orjson.Fragment | None] = [None]
        for entry in choice.prompt_logprobs:
            top = [(i, p, rank) for rank, (i, p) in enumerate(entry.top[: self.call.prompt_logprobs], 1)]
            ranked = [(entry.token_id, entry.logprob, entry.rank), *top]
            names = {str(i): {"logprob": p, "rank": rank, "decoded_token": self.token_text(i)} for i, p, rank in ranked}
            shown.append(fragment(names))
        return shown

    def answer_json(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the answer in one piece."""
        finished = []
        for choice in choices:
            last = choice.outputs[-1]
            shown = self.choice_json(choice)
            ending = {"finish_reason": self.finish_reason(choice, last), "stop_reason": last.stop_reason}
            finished.append({"index": choice.index, **shown, **ending})
        usage = total_usage(choices, self.call.n)
        return {"object": self.object, **self._identity, "choices": finished, "usage": usage}

    def token_text(self, token_id: int) -> str:
        """Return text of one token, for log-probabilities; its id if the client asked for that."""
        return f"token_id:{token_id}" if self.call.tokens_as_ids else self.tokenizer.token_text(token_id)
