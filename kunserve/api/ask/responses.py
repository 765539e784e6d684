"""The words of Responses to those of chat: a conversation, and what its parts are called in errors."""

from __future__ import annotations

from typing import Any

import msgspec

from kunserve.api.ask.declared.chat import Chat, common_fields
from kunserve.api.ask.declared.check import read
from kunserve.api.ask.declared.generation import ResponseFormat
from kunserve.api.ask.declared.responses import LOGPROBS, Item, ItemPart, Response, TextFormat
from kunserve.api.wire.fields import wrong_type
from kunserve.api.wire.naming import FieldNames
from kunserve.errors import InvalidRequestError

# Of what is checked when the conversation is made: types and bounds are complained about by their own names.
_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "tool_choice.function": "tool_choice",
    "tool_choice.allowed_tools": "tool_choice",
    "truncate_prompt_tokens": "truncation",
}


def chat_of(asked: Response, before: list[Any]) -> tuple[Chat, FieldNames]:
    """Return the chat request that means the same as a body, and names for its errors. Raises KunServeError.

    `before`: the items of the responses that this one goes on with.
    """
    names, common = FieldNames(_NAMES), common_fields(asked)
    if asked.truncation == "auto":
        common["truncate_prompt_tokens"] = -1
    chat = Chat(
        **common,
        messages=_Messages(names).read(asked, before),
        max_tokens=asked.max_output_tokens,
        reasoning_effort=None if asked.reasoning is None else asked.reasoning.effort,
        tools=None if asked.tools is None else _tools(asked.tools, names),
        tool_choice=_tool_choice(asked.tool_choice),
        parallel_tool_calls=asked.parallel_tool_calls,
        response_format=None if asked.text is None else _response_format(asked.text.format),
        logprobs=bool(asked.top_logprobs) or LOGPROBS in (asked.include or ()),
        top_logprobs=asked.top_logprobs,
        stop=asked.stop,
        user=asked.user,
        safety_identifier=asked.safety_identifier,
    )
    return chat, names


def _response_format(format: TextFormat | None) -> ResponseFormat | None:
    """Return what chat calls it: a schema stands in an object of its own there."""
    if format is None or format.type != "json_schema" or format.schema is None:
        return format
    return msgspec.structs.replace(format, schema=None, json_schema={"schema": format.schema})


def input_items(values: dict[str, Any]) -> list[Any]:
    """Return the `input` of a body that has been read, as a list of items."""
    given = values["input"]
    if isinstance(given, list):
        return given
    return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]


class _Messages:
    """Messages of chat as they are made of items; several items may be one message."""

    def __init__(self, names: FieldNames) -> None:
        self._names = names
        self._made: list[dict[str, Any]] = []

    def read(self, asked: Response, before: list[Any]) -> list[dict[str, Any]]:
        """Return the messages of chat: instructions, what was `before`, the input."""
        if asked.instructions:
            self._add({"role": "system", "content": asked.instructions}, "instructions")
        for index, item in enumerate(before):
            self._add_item(read(item, Item), f"previous_response_id[{index}]")
        if isinstance(asked.input, str):
            self._add({"role": "user", "content": asked.input}, "input")
            return self._made
        for index, item in enumerate(asked.input):
            self._add_item(msgspec.convert(item, Item), f"input[{index}]")
        return self._made

    def _add(self, message: dict[str, Any], own: str) -> None:
        self._names.add(f"messages[{len(self._made)}]", own, is_whole=own == "instructions")
        self._made.append(message)

    def _add_item(self, item: Item, param: str) -> None:
        match item.type or "message":
            case "message":
                role = "system" if item.role == "developer" else item.role or "user"
                self._add({"role": role, "content": _content(item.content)}, param)
            case "function_call":
                self._add_call(item, param)
            case "function_call_output":
                content = _content(item.output)
                self._add({"role": "tool", "tool_call_id": item.call_id or "", "content": content}, param)
                self._names.add(f"messages[{len(self._made) - 1}].content", f"{param}.output")
            case "reasoning":
                pass  # templates leave out what was thought before
            case _:
                raise InvalidRequestError(f"`{param}` has a type that is not supported.", param=param)

    def _add_call(self, item: Item, param: str) -> None:
        """Add a call to the assistant's message: what it said before and its calls are one turn."""
        function = {"name": item.name or "", "arguments": "{}" if item.arguments is None else item.arguments}
        call = {"id": item.call_id or "", "type": "function", "function": function}
        if not self._made or self._made[-1]["role"] != "assistant":
            self._add({"role": "assistant", "content": None}, param)
        calls = self._made[-1].setdefault("tool_calls", [])
        calls.append(call)
        index = len(self._made) - 1
        self._names.add(f"messages[{index}].tool_calls[{len(calls) - 1}]", param, is_whole=True)
        self._names.add(f"messages[{index}].tool_calls", param, is_whole=True)


def _content(content: str | list[ItemPart] | None) -> object:
    """Return the text of a message; its parts in the words of chat."""
    if not isinstance(content, list):
        return content
    return [_part(part) for part in content]


def _part(part: ItemPart) -> dict[str, Any]:
    match part.type:
        case "input_text" | "output_text" | "text" | "reasoning_text":
            return {"type": "text", "text": part.text}
        case "refusal":
            return {"type": "text", "text": part.refusal}
        case _:  # results of tools may have others
            return {"type": part.type}


def _tools(tools: list[dict[str, Any]], names: FieldNames) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        if tool.get("type") == "function" and "function" not in tool:
            tool = {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
            names.add(f"tools[{index}].function", f"tools[{index}]")
        shown.append(tool)
    return shown


def _tool_choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "allowed_tools":
        tools = choice.get("tools")
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            wrong_type("tool_choice.tools", "a list of tools", tools)
        named = [{"type": tool.get("type"), "function": {"name": tool.get("name")}} for tool in tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": named}}
    return {"type": "function", "function": {"name": choice["name"]}} if "name" in choice else choice
