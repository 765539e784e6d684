"""The messages of a conversation, in the shape chat templates expect: content as text, arguments as objects."""

from __future__ import annotations

from typing import Any

import orjson

from kunserve.api.wire.fields import Fields, wrong_type, wrong_value
from kunserve.errors import InvalidRequestError

_ROLES = {"developer": "system"}  # OpenAI's newer name, which no template knows


def _content(content: object, param: str) -> str | None:
    """Text of a string, of null (an assistant that only called tools) or of a list of text parts."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        wrong_type(param, "a string or a list of parts", content)
    texts: list[str] = []
    for index, part in enumerate(content):
        where = f"{param}[{index}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            wrong_type(where, "an object", part)
        if part.get("type", "text") != "text":
            raise InvalidRequestError(f"`{where}` is not text; nothing else is supported.", param=param)
        text = part.get("text")
        if not isinstance(text, str):
            wrong_type(f"{where}.text", "a string", text)
        texts.append(text)
    return "\n".join(texts)


def _tool_calls(calls: object, param: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments parsed: clients send JSON text, templates expect objects."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        wrong_type(param, "a list of objects", calls)
    parsed = []
    for call in calls:
        function = Fields(call, f"{param}.").mapping("function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                function = {**function, "arguments": orjson.loads(arguments or "{}")}
            except orjson.JSONDecodeError:
                wrong_value(f"{param}.function.arguments", "JSON", arguments)
        parsed.append({**call, "function": function})
    return parsed


def read_messages(value: object) -> list[dict[str, Any]]:
    """Check the messages; fields that templates may use (name, tool_call_id, ...) pass through."""
    if not isinstance(value, list):
        wrong_type("messages", "a list of messages", value)
    if not value:
        wrong_value("messages", "at least one message", value)
    messages = []
    for index, item in enumerate(value):
        param = f"messages[{index}]"
        if not isinstance(item, dict):
            wrong_type(param, "an object", item)
        fields = Fields(item, f"{param}.")
        fields.required("role")
        message = {
            **item,
            "role": _ROLES.get(role := fields.string("role", ""), role),
            "content": _content(item.get("content"), f"{param}.content"),
        }
        if message["content"] is None:
            if message["role"] != "assistant":
                fields.required("content")
            message["content"] = ""  # as vLLM: templates add it to other text
        if item.get("tool_calls") is not None:
            message["tool_calls"] = _tool_calls(item["tool_calls"], f"{param}.tool_calls")
        messages.append(message)
    return messages
