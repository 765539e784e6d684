"""The words of Responses to those of chat: the body of /v1/responses, and what its fields are called in errors."""

from __future__ import annotations

from typing import Any

from kunserve.api.ask.declared.values import MAX_LOGPROBS
from kunserve.api.wire.fields import Fields, is_str_list, wrong_items, wrong_type, wrong_value
from kunserve.api.wire.naming import FieldNames
from kunserve.errors import InvalidRequestError

LOGPROBS = "message.output_text.logprobs"
# What else `include` may ask for: details of items that never come from here.
_INCLUDES = frozenset(
    {
        *(LOGPROBS, "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results"),
        *("web_search_call.action.sources", "message.input_image.image_url", "code_interpreter_call.outputs"),
        "computer_call_output.output.image_url",
    }
)
_OWN = frozenset(
    {
        *("input", "instructions", "max_output_tokens", "text", "reasoning", "tools", "tool_choice", "stream_options"),
        *("metadata", "store", "include", "truncation", "top_logprobs", "max_tool_calls", "service_tier", "n"),
        *("messages", "max_tokens", "max_completion_tokens", "response_format", "logprobs", "prompt_logprobs"),
        *("previous_response_id", "continue_final_message", "add_generation_prompt", "reasoning_effort"),
    }
)
_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "reasoning_effort": "reasoning.effort",
    "tool_choice.function": "tool_choice",
    "tool_choice.allowed_tools": "tool_choice",
    "truncate_prompt_tokens": "truncation",
}


def chat_values(values: dict[str, Any], before: list[Any]) -> tuple[dict[str, Any], FieldNames]:
    """Return the body of the chat request that means the same, and names for its errors. Raises KunServeError.

    `before`: the items of the responses that this one goes on with.
    """
    fields, names = Fields(values), FieldNames(_NAMES)
    fields.unsupported("conversation", "background", "prompt")
    _check_echoed(fields)
    chat = {name: value for name, value in values.items() if name not in _OWN}
    chat["messages"] = _Messages(names).read(fields, before)
    chat["max_completion_tokens"] = values.get("max_output_tokens")
    chat["reasoning_effort"] = fields.object("reasoning").string("effort", None)
    chat["tools"] = _tools(fields.any("tools"), names)
    chat["tool_choice"] = _tool_choice(fields.any("tool_choice"))
    form = fields.object("text").mapping("format")
    if form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": form}
    chat["response_format"] = form or None
    top_logprobs = fields.integer("top_logprobs", 0, 0, MAX_LOGPROBS)
    if top_logprobs or LOGPROBS in read_includes(fields):
        chat |= {"logprobs": True, "top_logprobs": top_logprobs}
    if fields.any("truncation") == "auto":
        chat["truncate_prompt_tokens"] = -1
    return chat, names


def read_includes(fields: Fields) -> list[str]:
    """Return what `include` asks for."""
    includes = fields.any("include")
    if includes is None:
        return []
    if not is_str_list(includes):
        wrong_items("include", "a list of strings", "a string", str, includes)
    if unknown := next((name for name in includes if name not in _INCLUDES), None):
        wrong_value("include", "made of the names that Responses knows", unknown)
    return includes


def _check_echoed(fields: Fields) -> None:
    """Check what comes back in the answer as it is."""
    for name in ("safety_identifier", "prompt_cache_key", "service_tier", "user", "previous_response_id"):
        fields.string(name, None)
    fields.mapping("metadata")
    fields.boolean("store")
    fields.integer("max_tool_calls", None, 1)
    if (truncation := fields.string("truncation", "disabled")) not in ("auto", "disabled"):
        wrong_value("truncation", "auto or disabled", truncation)


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

    def read(self, fields: Fields, before: list[Any]) -> list[dict[str, Any]]:
        """Return the messages of chat: instructions, what was `before`, the input."""
        if instructions := fields.string("instructions", None):
            self._add({"role": "system", "content": instructions}, "instructions")
        for index, item in enumerate(before):
            self._add_item(item, f"previous_response_id[{index}]")
        given = fields.required("input")
        if isinstance(given, str):
            self._add({"role": "user", "content": given}, "input")
            return self._made
        if not isinstance(given, list):
            wrong_type("input", "a string or a list of items", given)
        for index, item in enumerate(given):
            if not isinstance(item, dict):
                wrong_type(f"input[{index}]", "an object", item)
            self._add_item(item, f"input[{index}]")
        return self._made

    def _add(self, message: dict[str, Any], own: str) -> None:
        self._names.add(f"messages[{len(self._made)}]", own, is_whole=own == "instructions")
        self._made.append(message)

    def _add_item(self, item: dict[str, Any], param: str) -> None:
        fields = Fields(item, f"{param}.")
        match item.get("type") or "message":
            case "message":
                role = fields.string("role", "user")
                content = _content(item.get("content"), f"{param}.content")
                self._add({"role": "system" if role == "developer" else role, "content": content}, param)
            case "function_call":
                self._add_call(fields, param)
            case "function_call_output":
                content = _content(item.get("output"), f"{param}.output")
                message = {"role": "tool", "tool_call_id": fields.string("call_id", ""), "content": content}
                self._add(message, param)
                self._names.add(f"messages[{len(self._made) - 1}].content", f"{param}.output")
            case "reasoning":
                pass  # templates leave out what was thought before
            case _:
                raise InvalidRequestError(f"`{param}` has a type that is not supported.", param=param)

    def _add_call(self, fields: Fields, param: str) -> None:
        """Add a call to the assistant's message: what it said before and its calls are one turn."""
        function = {"name": fields.string("name", ""), "arguments": fields.string("arguments", "{}")}
        call = {"id": fields.string("call_id", ""), "type": "function", "function": function}
        if not self._made or self._made[-1]["role"] != "assistant":
            self._add({"role": "assistant", "content": None}, param)
        calls = self._made[-1].setdefault("tool_calls", [])
        calls.append(call)
        index = len(self._made) - 1
        self._names.add(f"messages[{index}].tool_calls[{len(calls) - 1}]", param, is_whole=True)
        self._names.add(f"messages[{index}].tool_calls", param, is_whole=True)


def _content(content: object, param: str) -> object:
    """Return the text of a message; its parts in the words of chat."""
    if not isinstance(content, list):
        return content
    parts = []
    for index, part in enumerate(content):
        where = f"{param}[{index}]"
        if not isinstance(part, dict):
            wrong_type(where, "an object", part)
        match part.get("type"):
            case "input_text" | "output_text" | "text" | "reasoning_text":
                text = part.get("text")
            case "refusal":
                text = part.get("refusal")
            case _:
                parts.append(part)  # the results of tools may have others
                continue
        parts.append({"type": "text", "text": text})
    return parts


def _tools(tools: object, names: FieldNames) -> object:
    if not isinstance(tools, list):
        return tools
    shown: list[object] = []
    for index, tool in enumerate(tools):
        if isinstance(tool, dict) and tool.get("type") == "function" and "function" not in tool:
            tool = {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
            names.add(f"tools[{index}].function", f"tools[{index}]")
        shown.append(tool)
    return shown


def _tool_choice(choice: object) -> object:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "allowed_tools":
        tools = choice.get("tools")
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            wrong_type("tool_choice.tools", "a list of tools", tools)
        named = [{"type": tool.get("type"), "function": {"name": tool.get("name")}} for tool in tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": named}}
    return {"type": "function", "function": {"name": choice["name"]}} if "name" in choice else choice
