"""POST /v1/responses: OpenAI's newer API over the same chat, without memory: nothing is stored between requests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from kunserve.api.ask.protocol import ChatCall, GenerationCall, read_chat
from kunserve.api.routes.conversation import converse
from kunserve.api.say.answers import Choice
from kunserve.api.say.deltas import Text
from kunserve.api.say.parts import Part, PartStream, deltas_of_output, named_event
from kunserve.api.wire.access import owner_of
from kunserve.api.wire.body import read_body
from kunserve.api.wire.context import API, choose_request_id
from kunserve.api.wire.fields import Fields, wrong_type
from kunserve.engine.request import Output
from kunserve.errors import InvalidRequestError, KunServeError
from kunserve.sampling import FinishReason

_OWN = frozenset(
    {
        *("input", "instructions", "max_output_tokens", "text", "reasoning", "tools", "tool_choice", "stream_options"),
        *("metadata", "store", "include", "truncation", "top_logprobs", "max_tool_calls", "service_tier", "n"),
        *("messages", "max_tokens", "max_completion_tokens", "response_format", "logprobs", "prompt_logprobs"),
    }
)
_ECHOED = ("instructions", "max_output_tokens", "metadata", "tool_choice", "tools", "user")


def chat_values(values: dict[str, Any]) -> dict[str, Any]:
    """The body of the chat request that means the same. Raises KunServeError."""
    fields = Fields(values)
    fields.unsupported("previous_response_id", "conversation", "background", "prompt", "top_logprobs")
    chat = {name: value for name, value in values.items() if name not in _OWN}
    chat["messages"] = _messages(fields)
    chat["max_completion_tokens"] = values.get("max_output_tokens")
    chat["reasoning_effort"] = fields.object("reasoning").string("effort", None)
    chat["tools"] = _tools(fields.any("tools"))
    choice = fields.any("tool_choice")
    is_named = isinstance(choice, dict) and "name" in choice
    chat["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}} if is_named else choice
    form = fields.object("text").mapping("format")
    if form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": form}
    chat["response_format"] = form or None
    return chat


def _messages(fields: Fields) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if instructions := fields.string("instructions", None):
        messages.append({"role": "system", "content": instructions})
    given = fields.required("input")
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list):
        wrong_type("input", "a string or a list of items", given)
    for index, item in enumerate(given):
        if not isinstance(item, dict):
            wrong_type(f"input[{index}]", "an object", item)
        _add_item(messages, item, f"input[{index}]")
    return messages


def _add_item(messages: list[dict[str, Any]], item: dict[str, Any], param: str) -> None:
    fields = Fields(item, f"{param}.")
    match item.get("type", "message"):
        case "message":
            role = fields.string("role", "user")
            content = _content(item.get("content"), f"{param}.content")
            messages.append({"role": "system" if role == "developer" else role, "content": content})
        case "function_call":
            function = {"name": fields.string("name", ""), "arguments": fields.string("arguments", "{}")}
            call = {"id": fields.string("call_id", ""), "type": "function", "function": function}
            if not messages or not messages[-1].get("tool_calls"):
                messages.append({"role": "assistant", "content": None, "tool_calls": []})
            messages[-1]["tool_calls"].append(call)
        case "function_call_output":
            content = _content(item.get("output"), f"{param}.output")
            messages.append({"role": "tool", "tool_call_id": fields.string("call_id", ""), "content": content})
        case "reasoning":
            pass  # templates leave out what was thought before
        case _:
            raise InvalidRequestError(f"`{param}` has a type that is not supported.", param="input")


def _content(content: object, param: str) -> object:
    """Text of a message; its parts in the words of chat."""
    if not isinstance(content, list):
        return content
    parts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict):
            wrong_type(f"{param}[{index}]", "an object", part)
        if part.get("type") not in ("input_text", "output_text", "text"):
            raise InvalidRequestError(f"`{param}[{index}]` is not text; nothing else is supported.", param="input")
        parts.append({"type": "text", "text": part.get("text")})
    return parts


def _tools(tools: object) -> object:
    if not isinstance(tools, list):
        return tools
    return [
        {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
        if isinstance(tool, dict) and tool.get("type") == "function" and "function" not in tool
        else tool
        for tool in tools
    ]


class ResponseParts(PartStream):
    """Items of `output` and their events, numbered."""

    def __init__(self, response_id: str) -> None:
        super().__init__()
        self._response_id, self._number = response_id, 0

    def event(self, name: str, /, **values: Any) -> bytes:
        """The next event."""
        self._number += 1
        return named_event(name, {"sequence_number": self._number - 1, **values})

    def _place(self, part: Part) -> dict[str, Any]:
        return {"item_id": self.item(part, "")["id"], "output_index": part.index}

    def item(self, part: Part, status: str) -> dict[str, Any]:
        """A part as an item of `output`."""
        number = f"{self._response_id.removeprefix('resp_')}_{part.index}"
        match part.kind:
            case "text":
                content = [_text_part(part)] if part.text else []
                shown = {"type": "message", "role": "assistant", "content": content}
                return {"id": f"msg_{number}", "status": status, **shown}
            case "reasoning":
                content = [_text_part(part)] if part.text else []
                return {"id": f"rs_{number}", "type": "reasoning", "summary": [], "content": content, "status": status}
        call = {"call_id": part.call_id, "name": part.name, "arguments": part.text}
        return {"id": f"fc_{number}", "type": "function_call", "status": status, **call}

    def begin(self, part: Part) -> bytes:
        """See `PartStream`."""
        added = self.event("response.output_item.added", output_index=part.index, item=self.item(part, "in_progress"))
        if part.kind == "call":
            return added
        place = {**self._place(part), "content_index": 0}
        return added + self.event("response.content_part.added", **place, part=_text_part(part))

    def more(self, part: Part, text: str) -> bytes:
        """See `PartStream`."""
        place = self._place(part)
        match part.kind:
            case "text":
                return self.event("response.output_text.delta", **place, content_index=0, delta=text, logprobs=[])
            case "reasoning":
                return self.event("response.reasoning_text.delta", **place, content_index=0, delta=text)
        return self.event("response.function_call_arguments.delta", **place, delta=text)

    def end(self, part: Part) -> bytes:
        """See `PartStream`."""
        place = self._place(part)
        match part.kind:
            case "text":
                done = self.event("response.output_text.done", **place, content_index=0, text=part.text, logprobs=[])
            case "reasoning":
                done = self.event("response.reasoning_text.done", **place, content_index=0, text=part.text)
            case "call":
                name = "response.function_call_arguments.done"
                done = self.event(name, **place, name=part.name, arguments=part.text)
        if part.kind != "call":
            done += self.event("response.content_part.done", **place, content_index=0, part=_text_part(part))
        item = self.item(part, "completed")
        return done + self.event("response.output_item.done", output_index=part.index, item=item)


def _text_part(part: Part) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "reasoning_text", "text": part.text}
    return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": []}


class ResponseFormat:
    """OpenAI's `response` object and the events that build it. Implements `answering.Form` for one choice."""

    def __init__(self, response_id: str, created: int, call: GenerationCall, values: dict[str, Any]) -> None:
        self.call = call
        self._id = response_id
        self._parts = ResponseParts(response_id)
        self._last = Output()
        self._num_reasoning_tokens = 0
        echoed = {name: values.get(name) for name in _ECHOED}
        self._constant = {
            "id": response_id,
            "object": "response",
            "created_at": created,
            "model": call.model,
            **echoed,
            "metadata": values.get("metadata") or {},
            "tools": values.get("tools") or [],
            "tool_choice": values.get("tool_choice") or "auto",
            "parallel_tool_calls": values.get("parallel_tool_calls") is not False,
            "temperature": call.params.temperature,
            "top_p": call.params.top_p,
            "text": values.get("text") or {"format": {"type": "text"}},
            "reasoning": values.get("reasoning") or {"effort": None, "summary": None},
            "store": False,
            "background": False,
            "previous_response_id": None,
            "truncation": "disabled",
        }

    def _response(
        self, status: str, choice: Choice | None = None, error: KunServeError | None = None
    ) -> dict[str, Any]:
        usage = None
        if choice is not None:
            num_prompt = choice.request.num_prompt_tokens
            usage = {
                "input_tokens": num_prompt,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": choice.num_tokens,
                "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
                "total_tokens": num_prompt + choice.num_tokens,
            }
        return {
            **self._constant,
            "status": status,
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [self._parts.item(part, "completed") for part in self._parts.parts] if usage else [],
            "usage": usage,
        }

    def opening(self, choice: Choice, output: Output) -> bytes:
        """See `Form`."""
        response = self._response("in_progress")
        event = self._parts.event
        return event("response.created", response=response) + event("response.in_progress", response=response)

    def chunk(self, choice: Choice, output: Output) -> bytes:
        """See `Form`."""
        self._last = output
        events = self._parts.push(deltas_of_output(choice, output))
        if self._parts.parts and self._parts.parts[-1].kind == "reasoning":
            self._num_reasoning_tokens += len(output.token_ids)
        return events

    def ending(self, choices: Sequence[Choice]) -> bytes:
        """See `Form`."""
        closed, status = self._parts.close(), _status(self._last)
        return closed + self._parts.event(f"response.{status}", response=self._response(status, choices[0]))

    def error(self, error: KunServeError) -> bytes:
        """See `Form`."""
        event = self._parts.event
        details = {"code": str(error.status), "message": error.message, "param": error.param}
        return event("error", **details) + event("response.failed", response=self._response("failed", error=error))

    def answer_json(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """See `Form`."""
        [choice] = choices
        if choice.parser is None:
            self._parts.push([Text(choice.text)])
        else:  # one after the other, to count the tokens of the reasoning
            for output in choice.outputs:
                self.chunk(choice, output)
        return self._response(_status(choice.outputs[-1]), choice)


def _status(last: Output) -> str:
    return "incomplete" if last.finish_reason is FinishReason.LENGTH else "completed"


async def responses(request: web.Request) -> web.StreamResponse:
    """The route."""
    api = request.app[API]
    api.admission.check(owner_of(request))  # a full queue refuses before it reads

    def read(values: dict[str, Any]) -> tuple[dict[str, Any], ChatCall]:
        return values, read_chat(chat_values(values), api.model, api.tokenizer.vocab_size)

    values, call = await read_body(request, api, read)
    answer_id = f"resp_{choose_request_id(request, call.generation.request_id)}"
    form = ResponseFormat(answer_id, int(time.time()), call.generation, values)
    return await converse(request, api, call, form, answer_id)
