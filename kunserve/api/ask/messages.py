"""The messages of a conversation, in the shape chat templates expect: content as text, arguments as objects.

A history is what other programs and models have written: what is broken in it is passed on as it is, so that the
conversation can go on.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

from kunserve.api.wire.fields import Fields, wrong_type, wrong_value
from kunserve.errors import InvalidRequestError

_ROLES = {"developer": "system"}  # OpenAI's newer name, which no template knows
_RESULTS = ("tool", "function")  # roles of what tools have answered
RAW_ARGUMENTS = "raw_arguments"  # the only argument of a call whose arguments were no object


class Arguments(dict[str, Any]):
    """The arguments of a call: an object for templates that walk through it, JSON for those that write it as text."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, after: str) -> str:
        return str(self) + after

    def __radd__(self, before: str) -> str:
        return before + str(self)


def _content(content: object, param: str, role: str) -> str | None:
    """Return the text of a string, of null (an assistant that only called tools) or of a list of parts."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        wrong_type(param, "a string or a list of parts", content)
    return "\n".join(_part(part, f"{param}[{index}]", role) for index, part in enumerate(content))


def _part(part: object, where: str, role: str) -> str:
    """Return the text of a part. An image that a tool has answered is named: an agent cannot take it back."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        wrong_type(where, "an object", part)
    kind = part.get("type", "text")
    field = "refusal" if kind == "refusal" and role == "assistant" else "text"
    if kind != field:
        if role not in _RESULTS or not isinstance(kind, str):
            raise InvalidRequestError(f"`{where}` is not text; nothing else is supported.", param=where)
        name = kind.removeprefix("input_").removesuffix("_url")[:40]
        return f"[{name}: left out, this model reads text only]"
    text = part.get(field)
    if not isinstance(text, str):
        wrong_type(f"{where}.{field}", "a string", text)
    return text


def _tool_calls(calls: object, param: str) -> list[dict[str, Any]]:
    """Return tool calls with their arguments parsed: clients send JSON text, templates expect objects."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        wrong_type(param, "a list of objects", calls)
    parsed = []
    for call in calls:
        function = Fields(call, f"{param}.").mapping("function")
        parsed.append({**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}})
    return parsed


def _arguments(given: object) -> Arguments:
    """Return arguments as an object; anything else becomes the only value of one."""
    value = given
    for _ in range(2):  # some clients write JSON in a string of JSON
        if isinstance(value, str):
            value = _parsed(value)
    if isinstance(value, dict):
        return Arguments(value)
    is_empty = value is None or value == [] or (isinstance(value, str) and not value.strip())
    return Arguments() if is_empty else Arguments({RAW_ARGUMENTS: given})


def _parsed(text: str) -> object:
    """Return what JSON text says, line ends in strings and NaN allowed; the text itself if it is no JSON."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        value = json.loads(text, strict=False)
        json.dumps(value, ensure_ascii=False).encode()  # half a character could not be tokenized
    except (ValueError, RecursionError):
        return text
    return value


def read_messages(value: object) -> list[dict[str, Any]]:
    """Check the messages; fields that templates may use (name, tool_call_id, ...) pass through."""
    if not isinstance(value, list):
        wrong_type("messages", "a list of messages", value)
    if not value:
        wrong_value("messages", "at least one message", value)
    return _with_whole_turns([_read_message(item, f"messages[{index}]") for index, item in enumerate(value)])


def _read_message(item: object, param: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        wrong_type(param, "an object", item)
    fields = Fields(item, f"{param}.")
    fields.required("role")
    role = fields.string("role", "")
    content = _content(item.get("content"), f"{param}.content", role)
    if content is None and role != "assistant":
        fields.required("content")
    # An assistant's null is "", as in vLLM: templates add it to other text.
    message = {**item, "role": _ROLES.get(role, role), "content": content or ""}
    if item.get("tool_calls") is not None:
        message["tool_calls"] = _tool_calls(item["tool_calls"], f"{param}.tool_calls")
    return message


def _with_whole_turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages, text and calls of an assistant's turn in one: templates want roles to alternate.

    A last message without calls stays as it is: the answer may have to go on with it.
    """
    whole: list[dict[str, Any]] = []
    for message in messages:
        before = whole[-1] if whole else None
        is_turn = before is not None and before["role"] == message["role"] == "assistant"
        if before is None or not is_turn or not _has_calls(before, message, is_last=message is messages[-1]):
            whole.append(message)
            continue
        content = "\n".join(text for text in (before["content"], message["content"]) if text)
        calls = [*(before.get("tool_calls") or ()), *(message.get("tool_calls") or ())]
        whole[-1] = {**before, **message, "content": content, "tool_calls": calls}
    return whole


def _has_calls(before: dict[str, Any], message: dict[str, Any], is_last: bool) -> bool:
    """Return whether two messages of an assistant are one turn that calls tools."""
    return bool(message.get("tool_calls")) or (not is_last and bool(before.get("tool_calls")))
