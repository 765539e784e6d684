"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API over the same chat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import orjson
from aiohttp import web

from kunserve.api.ask.anthropic import chat_of
from kunserve.api.ask.declared.anthropic import AnthropicMessages, Counted
from kunserve.api.ask.prompts import tokenize_chat
from kunserve.api.ask.protocol import ChatCall, GenerationCall, chat_call
from kunserve.api.routes.conversation import answer_chat
from kunserve.api.say.answers import Choice
from kunserve.api.say.parts import AnswerPart, PartStream, deltas_of, deltas_of_output, named_event, was_cut
from kunserve.api.wire.anthropic_errors import error_details
from kunserve.api.wire.body import read_body, read_call
from kunserve.api.wire.context import API, Api, choose_request_id, json_response
from kunserve.api.wire.naming import FieldNames
from kunserve.engine.request import Output
from kunserve.errors import KunServeError
from kunserve.sampling import FinishReason


class MessageParts(PartStream):
    """Content blocks and their events."""

    def begin(self, part: AnswerPart) -> bytes:
        """See `PartStream`."""
        return named_event("content_block_start", {"index": part.index, "content_block": block_json(part, is_new=True)})

    def more(self, part: AnswerPart, text: str) -> bytes:
        """See `PartStream`."""
        match part.kind:
            case "text":
                delta = {"type": "text_delta", "text": text}
            case "reasoning":
                delta = {"type": "thinking_delta", "thinking": text}
            case "call":
                delta = {"type": "input_json_delta", "partial_json": text}
        return named_event("content_block_delta", {"index": part.index, "delta": delta})

    def end(self, part: AnswerPart) -> bytes:
        """See `PartStream`."""
        return named_event("content_block_stop", {"index": part.index})


def block_json(part: AnswerPart, is_new: bool = False) -> dict[str, Any]:
    """Return a part as a content block; a new one is empty."""
    text = "" if is_new else part.text
    match part.kind:
        case "text":
            return {"type": "text", "text": text}
        case "reasoning":
            return {"type": "thinking", "thinking": text, "signature": ""}
    try:
        orjson.loads(text or "{}")
        arguments = orjson.Fragment(text or "{}")  # as it is: a model may nest deeper than orjson writes
    except orjson.JSONDecodeError:  # cut by max_tokens
        arguments = orjson.Fragment("{}")
    return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": arguments}


class MessageFormat:
    """Anthropic's `message` and the events that build it. An `AnswerWriter` for one choice."""

    def __init__(self, message_id: str, call: GenerationCall, names: FieldNames) -> None:
        """Begin a message. `names`: what the client calls the fields of the request."""
        self.call = call
        self._names = names
        self._parts = MessageParts()
        self._identity = {"id": message_id, "type": "message", "role": "assistant", "model": call.model}
        self._last = Output()

    def _stop(self, last: Output) -> dict[str, Any]:
        """Return why a choice ended, in Anthropic's words."""
        is_sequence = isinstance(last.stop_reason, str)
        if last.finish_reason is FinishReason.LENGTH:
            reason = "max_tokens"
        elif any(part.kind == "call" for part in self._parts.parts):
            reason = "tool_use"
        else:
            reason = "stop_sequence" if is_sequence else "end_turn"
        return {"stop_reason": reason, "stop_sequence": last.stop_reason if is_sequence else None}

    def opening(self, choice: Choice, output: Output) -> bytes:
        """See `AnswerWriter`."""
        usage = _usage(choice, 0)
        message: dict[str, Any] = {
            **self._identity,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        return named_event("message_start", {"message": message})

    def chunk(self, choice: Choice, output: Output) -> bytes:
        """See `AnswerWriter`."""
        self._last = output
        return self._parts.push(deltas_of_output(choice, output))

    def ending(self, choices: Sequence[Choice]) -> bytes:
        """See `AnswerWriter`."""
        usage = _usage(choices[0], choices[0].num_tokens)
        delta = named_event("message_delta", {"delta": self._stop(self._last), "usage": usage})
        return self._parts.close() + delta + named_event("message_stop", {})

    def error(self, error: KunServeError) -> bytes:
        """See `AnswerWriter`."""
        return named_event("error", {"error": error_details(self._names.reworded(error))})

    def answer_json(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """See `AnswerWriter`."""
        [choice] = choices
        self._parts.push(deltas_of(choice, choice.text, True, was_cut(choice.outputs[-1])))
        usage = _usage(choice, choice.num_tokens)
        content = [block_json(part) for part in self._parts.parts]
        return {**self._identity, "content": content, **self._stop(choice.outputs[-1]), "usage": usage}


def _usage(choice: Choice, num_tokens: int) -> dict[str, int]:
    """Return the `usage` object, in which input tokens are those that were not in the cache."""
    request = choice.request
    cached = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": request.num_cached_tokens}
    num_computed = request.num_prompt_tokens - request.num_cached_tokens
    return {"input_tokens": num_computed, **cached, "output_tokens": num_tokens}


Call = tuple[ChatCall, FieldNames]


def _reader(api: Api, declared: type[AnthropicMessages | Counted]) -> Callable[[dict[str, Any]], Call]:
    """Return what makes a call of a body."""

    def read(values: dict[str, Any]) -> Call:
        chat, names = chat_of(values, declared, api.model.sampling)
        with names.told():
            return chat_call(chat, chat.messages, api.model, api.tokenizer.vocab_size), names

    return read


async def messages(request: web.Request) -> web.StreamResponse:
    """Answer POST /v1/messages."""
    api = request.app[API]
    call, names = await read_call(request, api, _reader(api, AnthropicMessages))
    answer_id = f"msg_{choose_request_id(request, call.generation.request_id)}"
    with names.told():
        return await answer_chat(request, api, call, MessageFormat(answer_id, call.generation, names), answer_id)


async def count_tokens(request: web.Request) -> web.Response:
    """Answer POST /v1/messages/count_tokens."""
    api = request.app[API]
    call, names = await read_body(request, api, _reader(api, Counted))
    with names.told():
        return json_response({"input_tokens": len((await tokenize_chat(api, call)).ids)})
