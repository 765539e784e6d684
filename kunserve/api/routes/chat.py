"""POST /v1/chat/completions: a conversation through the model's chat template, answered as a message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aiohttp import web

from kunserve.api.ask.protocol import read_chat
from kunserve.api.routes.conversation import answer_chat
from kunserve.api.say.answers import AnswerFormat, Choice
from kunserve.api.say.deltas import CallArguments, CallBegin, Delta, Message, Reasoning, Text
from kunserve.api.say.parts import deltas_of, deltas_of_output, was_cut
from kunserve.api.say.token_logprobs import token_logprobs
from kunserve.api.wire.access import created_s
from kunserve.api.wire.body import read_call
from kunserve.api.wire.context import API, choose_request_id, long_list
from kunserve.engine.request import Output
from kunserve.sampling import TokenLogprobs


class ChatFormat(AnswerFormat):
    """OpenAI's `chat.completion` and `chat.completion.chunk`."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    text_open = b',"delta":{"content":'
    text_close = b"}"

    def logprobs_json(self, choice: Choice, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Return one object per token, with as many of the most likely ones as asked for."""
        return {"content": token_logprobs(self.tokenizer, self.token_text, entries)}

    def opening(self, choice: Choice, output: Output) -> bytes:
        """Return the role, and the prompt's token ids once."""
        delta = {"role": "assistant", "content": ""}
        first = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
        if self.call.return_token_ids:
            return self.event_of(choice, first, prompt_token_ids=long_list(choice.request.prompt_token_ids))
        return self.event_of(choice, first)

    def chunk(self, choice: Choice, output: Output) -> bytes:
        """Return one event per part of the message, the last with all that is no text; none while a part is unclear."""
        if choice.parser is None:
            return super().chunk(choice, output)
        deltas = deltas_of_output(choice, output)
        if not deltas and output.finish_reason is None and not output.logprobs and not self.call.return_token_ids:
            return b""
        *first, last = [delta_json(delta) for delta in deltas] or [{}]
        nothing = {"logprobs": None, "finish_reason": None}
        events = [self.event_of(choice, {"index": choice.index, "delta": delta, **nothing}) for delta in first]
        ending: dict[str, Any] = {"logprobs": None, "finish_reason": self.finish_reason(choice, output)}
        if output.logprobs:
            ending["logprobs"] = self.logprobs_json(choice, output.logprobs)
        if output.finish_reason is not None:
            ending["stop_reason"] = output.stop_reason
        if self.call.return_token_ids:
            ending["token_ids"] = output.token_ids
        usage = {"usage": self.usage_of(choice, output)} if self.call.continuous_usage else {}
        return b"".join([*events, self.event([{"index": choice.index, "delta": last, **ending}], **usage)])

    def choice_json(self, choice: Choice) -> dict[str, Any]:
        """Return the message, its log-probabilities, and the token ids if asked for."""
        asked = self.call.params.num_logprobs is not None
        logprobs = self.logprobs_json(choice, choice.logprobs) if asked else None
        ids = {"token_ids": choice.token_ids} if self.call.return_token_ids else {}
        shown = message_json(read_message(choice), has_tools=choice.parser is not None and choice.parser.has_tools)
        return {"message": shown, "logprobs": logprobs, **ids}

    def answer_json(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the answer in one piece; all choices have the same prompt."""
        whole = super().answer_json(choices)
        if self.call.return_token_ids:
            whole["prompt_token_ids"] = long_list(choices[0].request.prompt_token_ids)
        if self.call.prompt_logprobs is not None:
            whole["prompt_logprobs"] = self.prompt_logprobs_json(choices[0])
        return whole


def read_message(choice: Choice) -> Message:
    """Return what a finished choice says."""
    message = Message()
    message.add(deltas_of(choice, choice.text, True, was_cut(choice.outputs[-1])))
    return message


def message_json(message: Message, has_tools: bool) -> dict[str, Any]:
    """Return an assistant's message, its content null if it is empty and calls were possible.

    Reasoning stands under vLLM's name and DeepSeek's.
    """
    is_blank = not message.text.strip() if message.calls else has_tools and not message.text
    content = None if is_blank else message.text
    shown: dict[str, Any] = {"role": "assistant", "content": content}
    if message.reasoning:
        shown |= {"reasoning": message.reasoning, "reasoning_content": message.reasoning}
    if message.calls:
        shown["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.calls
        ]
    return shown


def delta_json(delta: Delta) -> dict[str, Any]:
    """Return a part of a message as it comes."""
    match delta:
        case Text(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning": text, "reasoning_content": text}
        case CallBegin(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer POST /v1/chat/completions."""
    api = request.app[API]
    call = await read_call(request, api, lambda values: read_chat(values, api.model, api.tokenizer.vocab_size))
    generation = call.generation
    answer_id = f"chatcmpl-{choose_request_id(request, generation.request_id)}"
    writer = ChatFormat(answer_id, created_s(request), generation, api.tokenizer)
    writer.is_call_the_end = call.tools.mode != "named"  # OpenAI ends a call that it was told to make with "stop"
    return await answer_chat(request, api, call, writer, answer_id)
