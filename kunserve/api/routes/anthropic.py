"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API over the same chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web

from kunserve.api.ask.prompts import tokenize_chat
from kunserve.api.ask.protocol import ChatCall, GenerationCall, read_chat
from kunserve.api.routes.conversation import converse
from kunserve.api.say.answers import Choice
from kunserve.api.say.parts import Part, PartStream, deltas_of, deltas_of_output, named_event
from kunserve.api.wire.access import owner_of
from kunserve.api.wire.body import read_body
from kunserve.api.wire.context import API, choose_request_id, json_response
from kunserve.api.wire.fields import Fields, wrong_type
from kunserve.engine.request import Output
from kunserve.errors import InvalidRequestError, KunServeError
from kunserve.sampling import FinishReason

PREFIX = "/v1/messages"
_OWN = frozenset(
    {
        *("system", "messages", "tools", "tool_choice", "stop_sequences", "max_tokens", "thinking", "metadata"),
        *("n", "stop", "max_completion_tokens", "stream_options", "logprobs", "prompt_logprobs", "response_format"),
        *("add_generation_prompt", "continue_final_message"),
        *("user", "service_tier", "container", "context_management", "output_config", "chat_template_kwargs"),
    }
)
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    422: "invalid_request_error",
    503: "overloaded_error",
}


def chat_values(values: dict[str, Any]) -> dict[str, Any]:
    """The body of the chat request that means the same. Raises KunServeError."""
    fields = Fields(values)
    fields.unsupported("mcp_servers")
    chat = {name: value for name, value in values.items() if name not in _OWN}
    messages = chat["messages"] = _messages(fields)
    # Clients put their beginning of an answer and what comes together: the answer goes on where it ends.
    chat["continue_final_message"] = bool(
        messages and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    )
    chat["max_tokens"] = values.get("max_tokens")
    chat["response_format"] = _response_format(fields.object("output_config").object("format"))
    chat["stop"] = fields.any("stop_sequences")
    chat["user"] = fields.object("metadata").any("user_id")
    kwargs = dict(fields.mapping("chat_template_kwargs"))
    if (thinking := fields.object("thinking").string("type", None)) is not None:
        kwargs.setdefault("enable_thinking", thinking != "disabled")
    chat["chat_template_kwargs"] = kwargs
    chat["tools"] = _tools(fields.any("tools"))
    choice = fields.object("tool_choice")
    match choice.string("type", "auto"):
        case "any":
            chat["tool_choice"] = "required"
        case "tool":
            chat["tool_choice"] = {"type": "function", "function": {"name": choice.required("name")}}
        case other:
            chat["tool_choice"] = other
    chat["parallel_tool_calls"] = not choice.boolean("disable_parallel_tool_use")
    return chat


def _response_format(form: Fields) -> dict[str, Any] | None:
    """What the answer must be: a schema or nothing."""
    if (kind := form.string("type", None)) is None:
        return None
    if kind != "json_schema":
        raise InvalidRequestError("`output_config.format` must have type json_schema.", param="output_config.format")
    return {"type": "json_schema", "json_schema": {"schema": form.required("schema")}}


def _messages(fields: Fields) -> list[dict[str, Any]]:
    given = fields.required("messages")
    if not isinstance(given, list):
        wrong_type("messages", "a list of messages", given)
    system = fields.any("system")
    messages: list[dict[str, Any]] = [{"role": "system", "content": _text(system, "system")}] if system else []
    for index, item in enumerate(given):
        param = f"messages[{index}]"
        if not isinstance(item, dict):
            wrong_type(param, "an object", item)
        content = item.get("content")
        if isinstance(content, list):
            _add_blocks(messages, item.get("role"), content, f"{param}.content")
        else:
            messages.append({"role": item.get("role"), "content": content})
    return messages


def _add_blocks(messages: list[dict[str, Any]], role: object, blocks: list[Any], param: str) -> None:
    """A message of blocks; the results of tools in it become messages of their own, before its text."""
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        where = f"{param}[{index}]"
        if not isinstance(block, dict):
            wrong_type(where, "an object", block)
        fields = Fields(block, f"{where}.")
        match block.get("type"):
            case "text":
                texts.append(fields.string("text", ""))
            case "tool_use":
                arguments = orjson.dumps(fields.mapping("input")).decode()
                function = {"name": fields.string("name", ""), "arguments": arguments}
                calls.append({"id": fields.string("id", ""), "type": "function", "function": function})
            case "tool_result":
                content = _text(block.get("content") or "", f"{where}.content")
                result = {"role": "tool", "tool_call_id": fields.string("tool_use_id", ""), "content": content}
                messages.append(result)
            case "thinking" | "redacted_thinking":
                pass  # templates leave out what was thought before
            case _:
                raise InvalidRequestError(f"`{where}` has a type that is not supported.", param=param)
    if calls:
        messages.append({"role": role, "content": "\n".join(texts) or None, "tool_calls": calls})
    elif texts:
        messages.append({"role": role, "content": "\n".join(texts)})


def _text(content: object, param: str) -> str:
    """Text of a string or of text blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        wrong_type(param, "a string or a list of text blocks", content)
    texts = []
    for index, block in enumerate(content):
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise InvalidRequestError(f"`{param}[{index}]` is not text; nothing else is supported.", param=param)
        texts.append(block["text"])
    return "\n".join(texts)


def _tools(tools: object) -> object:
    if not isinstance(tools, list):
        return tools
    shown: list[object] = []
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            wrong_type(f"tools[{index}]", "an object", tool)
        if tool.get("type", "custom") != "custom":
            raise InvalidRequestError(f"`tools[{index}]` has a type that is not supported.", param="tools")
        function = {name: tool[name] for name in ("name", "description") if name in tool}
        shown.append({"type": "function", "function": {**function, "parameters": tool.get("input_schema")}})
    return shown


class MessageParts(PartStream):
    """Content blocks and their events."""

    def begin(self, part: Part) -> bytes:
        """See `PartStream`."""
        return named_event("content_block_start", {"index": part.index, "content_block": block_json(part, is_new=True)})

    def more(self, part: Part, text: str) -> bytes:
        """See `PartStream`."""
        match part.kind:
            case "text":
                delta = {"type": "text_delta", "text": text}
            case "reasoning":
                delta = {"type": "thinking_delta", "thinking": text}
            case "call":
                delta = {"type": "input_json_delta", "partial_json": text}
        return named_event("content_block_delta", {"index": part.index, "delta": delta})

    def end(self, part: Part) -> bytes:
        """See `PartStream`."""
        return named_event("content_block_stop", {"index": part.index})


def block_json(part: Part, is_new: bool = False) -> dict[str, Any]:
    """A part as a content block; a new one is empty."""
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
    """Anthropic's `message` and the events that build it. Implements `answering.Form` for one choice."""

    def __init__(self, message_id: str, call: GenerationCall) -> None:
        self.call = call
        self._parts = MessageParts()
        self._identity = {"id": message_id, "type": "message", "role": "assistant", "model": call.model}
        self._last = Output()

    def _stop(self, last: Output) -> dict[str, Any]:
        """Why it ended."""
        is_sequence = isinstance(last.stop_reason, str)
        if last.finish_reason is FinishReason.LENGTH:
            reason = "max_tokens"
        elif any(part.kind == "call" for part in self._parts.parts):
            reason = "tool_use"
        else:
            reason = "stop_sequence" if is_sequence else "end_turn"
        return {"stop_reason": reason, "stop_sequence": last.stop_reason if is_sequence else None}

    def opening(self, choice: Choice, output: Output) -> bytes:
        """See `Form`."""
        usage = {"input_tokens": choice.request.num_prompt_tokens, "output_tokens": 0}
        message: dict[str, Any] = {
            **self._identity,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        return named_event("message_start", {"message": message})

    def chunk(self, choice: Choice, output: Output) -> bytes:
        """See `Form`."""
        self._last = output
        return self._parts.push(deltas_of_output(choice, output))

    def ending(self, choices: Sequence[Choice]) -> bytes:
        """See `Form`."""
        usage = {"input_tokens": choices[0].request.num_prompt_tokens, "output_tokens": choices[0].num_tokens}
        delta = named_event("message_delta", {"delta": self._stop(self._last), "usage": usage})
        return self._parts.close() + delta + named_event("message_stop", {})

    def error(self, error: KunServeError) -> bytes:
        """See `Form`."""
        return named_event("error", {"error": error_details(error.status, error.message)})

    def answer_json(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """See `Form`."""
        [choice] = choices
        self._parts.push(deltas_of(choice, choice.text, is_last=True))
        usage = {"input_tokens": choice.request.num_prompt_tokens, "output_tokens": choice.num_tokens}
        content = [block_json(part) for part in self._parts.parts]
        return {**self._identity, "content": content, **self._stop(choice.outputs[-1]), "usage": usage}


def error_details(status: int, message: str) -> dict[str, str]:
    """An error in Anthropic's words."""
    return {"type": _ERROR_TYPES.get(status, "api_error"), "message": message}


def reworded(response: web.Response) -> web.Response:
    """An error response of ours in Anthropic's shape."""
    assert isinstance(response.body, bytes)
    message = orjson.loads(response.body)["error"]["message"]
    response.body = orjson.dumps({"type": "error", "error": error_details(response.status, message)})
    return response


async def messages(request: web.Request) -> web.StreamResponse:
    """The route of /v1/messages."""
    api = request.app[API]
    api.admission.check(owner_of(request))  # a full queue refuses before it reads

    def read(values: dict[str, Any]) -> ChatCall:
        Fields(values).required("max_tokens")
        return read_chat(chat_values(values), api.model, api.tokenizer.vocab_size)

    call = await read_body(request, api, read)
    answer_id = f"msg_{choose_request_id(request, call.generation.request_id)}"
    return await converse(request, api, call, MessageFormat(answer_id, call.generation), answer_id)


async def count_tokens(request: web.Request) -> web.Response:
    """The route of /v1/messages/count_tokens."""
    api = request.app[API]
    vocab_size = api.tokenizer.vocab_size
    call = await read_body(request, api, lambda values: read_chat(chat_values(values), api.model, vocab_size))
    return json_response({"input_tokens": len((await tokenize_chat(api, call)).ids)})
