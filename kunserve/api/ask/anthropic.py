"""Anthropic's words to those of chat: the body of /v1/messages, and what its fields are called in errors."""

from __future__ import annotations

from typing import Any

from kunserve.api.wire.fields import Fields, wrong_type, wrong_value
from kunserve.api.wire.naming import FieldNames
from kunserve.errors import InvalidRequestError

_OWN = frozenset(
    {
        *("system", "messages", "tools", "tool_choice", "stop_sequences", "max_tokens", "thinking", "metadata"),
        *("n", "stop", "max_completion_tokens", "stream_options", "logprobs", "prompt_logprobs", "response_format"),
        *("add_generation_prompt", "continue_final_message", "parallel_tool_calls", "reasoning_effort"),
        *("user", "service_tier", "container", "context_management", "output_config", "chat_template_kwargs"),
    }
)
_NAMES = {
    "stop": "stop_sequences",
    "user": "metadata.user_id",
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "tool_choice.function": "tool_choice",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "reasoning_effort": "output_config.effort",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_values(values: dict[str, Any]) -> tuple[dict[str, Any], FieldNames]:
    """Return the body of the chat request that means the same, and names for its errors. Raises KunServeError."""
    fields, names = Fields(values), FieldNames(_NAMES)
    fields.unsupported("mcp_servers")
    chat = {name: value for name, value in values.items() if name not in _OWN}
    messages = chat["messages"] = _Messages(names).read(fields)
    # Clients put their beginning of an answer and what comes together: the answer goes on where it ends.
    chat["continue_final_message"] = bool(
        messages and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    )
    chat["max_tokens"] = values.get("max_tokens")
    output = fields.object("output_config")
    chat["response_format"] = _response_format(output.object("format"))
    chat["reasoning_effort"] = output.any("effort")
    chat["stop"] = fields.any("stop_sequences")
    chat["user"] = fields.object("metadata").any("user_id")
    kwargs = dict(fields.mapping("chat_template_kwargs"))
    if (thinking := fields.object("thinking").string("type", None)) is not None:
        kwargs.setdefault("enable_thinking", thinking != "disabled")
    chat["chat_template_kwargs"] = kwargs
    chat["tools"] = _tools(fields.any("tools"), names)
    choice = fields.object("tool_choice")
    chat["tool_choice"] = _tool_choice(choice, has_tools=bool(chat["tools"]))
    chat["parallel_tool_calls"] = not choice.boolean("disable_parallel_tool_use")
    return chat, names


def _tool_choice(choice: Fields, has_tools: bool) -> object:
    kind = choice.string("type", "auto" if has_tools else "none")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.required("name")}}
    if kind not in _CHOICES:
        wrong_value("tool_choice.type", "auto, any, tool or none", kind)
    return _CHOICES[kind]


def _response_format(form: Fields) -> dict[str, Any] | None:
    """Return what the answer must be: a schema or nothing."""
    if (kind := form.string("type", None)) is None:
        return None
    if kind != "json_schema":
        raise InvalidRequestError("`output_config.format` must have type json_schema.", param="output_config.format")
    return {"type": "json_schema", "json_schema": {"schema": form.required("schema")}}


class _Messages:
    """Messages of chat as they are made of the client's; one of his may become several."""

    def __init__(self, names: FieldNames) -> None:
        self._names = names
        self._made: list[dict[str, Any]] = []

    def read(self, fields: Fields) -> list[dict[str, Any]]:
        """Return the messages of chat, the system's first."""
        given = fields.required("messages")
        if not isinstance(given, list):
            wrong_type("messages", "a list of messages", given)
        if not given:
            wrong_value("messages", "at least one message", given)
        if system := fields.any("system"):
            self._add({"role": "system", "content": _text(system, "system")}, "system", is_whole=True)
        for index, item in enumerate(given):
            param = f"messages[{index}]"
            if not isinstance(item, dict):
                wrong_type(param, "an object", item)
            content = item.get("content")
            if isinstance(content, list):
                self._add_blocks(item.get("role"), content, param)
            else:
                self._add({"role": item.get("role"), "content": content}, param)
        return self._made

    def _add(self, message: dict[str, Any], own: str, is_whole: bool = False) -> None:
        self._names.add(f"messages[{len(self._made)}]", own, is_whole)
        self._names.add(f"messages[{len(self._made)}].tool_calls", f"{own}.content", is_whole=True)
        self._made.append(message)

    def _add_blocks(self, role: object, blocks: list[Any], param: str) -> None:
        """Add a message of blocks; the results of tools in it become messages of their own, before its text."""
        texts: list[str] = []
        calls: list[dict[str, Any]] = []
        for index, block in enumerate(blocks):
            where = f"{param}.content[{index}]"
            if not isinstance(block, dict):
                wrong_type(where, "an object", block)
            fields = Fields(block, f"{where}.")
            match block.get("type"):
                case "text":
                    texts.append(fields.string("text", ""))
                case "tool_use":
                    function = {"name": fields.string("name", ""), "arguments": block.get("input")}
                    calls.append({"id": fields.string("id", ""), "type": "function", "function": function})
                case "tool_result":
                    content, tool_use_id = block.get("content") or "", fields.string("tool_use_id", "")
                    result = {"role": "tool", "tool_call_id": tool_use_id, "content": content}
                    self._add(result, where)
                case "thinking" | "redacted_thinking":
                    pass  # templates leave out what was thought before
                case _:
                    raise InvalidRequestError(f"`{where}` has a type that is not supported.", param=where)
        if calls:
            self._add({"role": role, "content": "\n".join(texts) or None, "tool_calls": calls}, param)
        elif texts:
            self._add({"role": role, "content": "\n".join(texts)}, param)


def _text(content: object, param: str) -> str:
    """Return the text of a string or of text blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        wrong_type(param, "a string or a list of text blocks", content)
    texts = []
    for index, block in enumerate(content):
        where = f"{param}[{index}]"
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise InvalidRequestError(f"`{where}` is not text; nothing else is supported.", param=where)
        texts.append(block["text"])
    return "\n".join(texts)


def _tools(tools: object, names: FieldNames) -> object:
    if not isinstance(tools, list):
        return tools
    shown: list[object] = []
    for index, tool in enumerate(tools):
        own = f"tools[{index}]"
        if not isinstance(tool, dict):
            wrong_type(own, "an object", tool)
        if tool.get("type") not in (None, "custom"):
            raise InvalidRequestError(f"`{own}` has a type that is not supported.", param=f"{own}.type")
        function = {name: tool[name] for name in ("name", "description") if name in tool}
        shown.append({"type": "function", "function": {**function, "parameters": tool.get("input_schema")}})
        names.add(f"{own}.function", own)
        names.add(f"{own}.function.parameters", f"{own}.input_schema")
    return shown
