"""Anthropic's words to those of chat: the conversation of /v1/messages, and what its parts are called in errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kunserve.api.ask.declared.anthropic import (
    AnthropicChoice,
    AnthropicMessages,
    AnthropicTool,
    Block,
    Counted,
    TextBlock,
)
from kunserve.api.ask.declared.chat import Chat, common_fields
from kunserve.api.ask.declared.check import read
from kunserve.api.ask.declared.faults import raise_missing
from kunserve.api.ask.declared.generation import ResponseFormat
from kunserve.api.wire.naming import FieldNames
from kunserve.errors import InvalidRequestError, UnsupportedThreadError

# Of what is checked when the conversation is made: types and bounds are complained about by their own names.
_NAMES = {
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "tool_choice.function": "tool_choice",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_of(
    values: dict[str, Any], declared: type[AnthropicMessages | Counted], defaults: Mapping[str, Any]
) -> tuple[Chat, FieldNames]:
    """Return the chat request that means the same as a body, and names for its errors. Raises KunServeError."""
    if values.get("thread") is not None:  # later requests would bring the newest messages alone, and no tools
        raise UnsupportedThreadError("`thread` is not supported: send all messages.", param="thread")
    asked, names = read(values, declared, defaults), FieldNames(_NAMES)
    common = common_fields(asked)
    messages = _Messages(names).read(asked)
    # Clients put their beginning of an answer and what comes together: the answer goes on where it ends.
    if messages and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        common["continue_final_message"] = True
    kwargs = dict(asked.chat_template_kwargs or {})
    if asked.thinking is not None and asked.thinking.type is not None:
        kwargs.setdefault("enable_thinking", asked.thinking.type != "disabled")
    common["chat_template_kwargs"] = kwargs
    choice = AnthropicChoice() if asked.tool_choice is None else asked.tool_choice
    user = None if asked.metadata is None else asked.metadata.user_id
    chat = Chat(
        **common,
        messages=messages,
        max_tokens=asked.max_tokens,
        response_format=_response_format(asked),
        reasoning_effort=None if asked.output_config is None else asked.output_config.effort,
        stop=asked.stop_sequences,
        user=asked.user if user is None else user,
        tools=None if asked.tools is None else _tools(asked.tools, names),
        tool_choice=_tool_choice(choice, has_tools=bool(asked.tools)),
        parallel_tool_calls=asked.parallel_tool_calls and not choice.disable_parallel_tool_use,
    )
    return chat, names


def _tool_choice(choice: AnthropicChoice, has_tools: bool) -> Any:
    if choice.type == "tool":
        if choice.name is None:
            raise_missing("tool_choice.name")
        return {"type": "function", "function": {"name": choice.name}}
    return _CHOICES[choice.type or ("auto" if has_tools else "none")]


def _response_format(asked: Counted) -> ResponseFormat | None:
    """Return what the answer must be: a schema or nothing."""
    format = None if asked.output_config is None else asked.output_config.format
    if format is not None and asked.output_format is not None:
        text = "`output_config.format` and `output_format` exclude each other."
        raise InvalidRequestError(text, param="output_format")
    format = format or asked.output_format
    return None if format is None else ResponseFormat(type="json_schema", json_schema={"schema": format.schema})


class _Messages:
    """Messages of chat as they are made of the client's; one of his may become several."""

    def __init__(self, names: FieldNames) -> None:
        self._names = names
        self._made: list[dict[str, Any]] = []

    def read(self, asked: Counted) -> list[dict[str, Any]]:
        """Return the messages of chat, the system's first."""
        if asked.system:
            self._add({"role": "system", "content": _text(asked.system, "system")}, "system", is_whole=True)
        for index, message in enumerate(asked.messages):
            param = f"messages[{index}]"
            if isinstance(message.content, list):
                self._add_blocks(message.role, message.content, param)
            else:
                self._add({"role": message.role, "content": message.content}, param)
        return self._made

    def _add(self, message: dict[str, Any], own: str, is_whole: bool = False) -> None:
        self._names.add(f"messages[{len(self._made)}]", own, is_whole)
        self._names.add(f"messages[{len(self._made)}].tool_calls", f"{own}.content", is_whole=True)
        self._made.append(message)

    def _add_blocks(self, role: str, blocks: list[Block], param: str) -> None:
        """Add a message of blocks; the results of tools in it become messages of their own, before its text."""
        texts: list[str] = []
        calls: list[dict[str, Any]] = []
        for index, block in enumerate(blocks):
            where = f"{param}.content[{index}]"
            match block.type:
                case "text":
                    texts.append(block.text or "")
                case "tool_use":
                    function = {"name": block.name or "", "arguments": block.input}
                    calls.append({"id": block.id or "", "type": "function", "function": function})
                case "tool_result":
                    result = {"role": "tool", "tool_call_id": block.tool_use_id or "", "content": block.content or ""}
                    self._add(result, where)
                case "thinking" | "redacted_thinking":
                    pass  # templates leave out what was thought before
                case _:
                    raise InvalidRequestError(f"`{where}` has a type that is not supported.", param=where)
        if calls:
            self._add({"role": role, "content": "\n".join(texts) or None, "tool_calls": calls}, param)
        elif texts:
            self._add({"role": role, "content": "\n".join(texts)}, param)


def _text(content: str | list[TextBlock], param: str) -> str:
    """Return the text of a string or of text blocks."""
    if isinstance(content, str):
        return content
    texts = []
    for index, block in enumerate(content):
        where = f"{param}[{index}]"
        if block.type != "text" or block.text is None:
            raise InvalidRequestError(f"`{where}` is not text; nothing else is supported.", param=where)
        texts.append(block.text)
    return "\n".join(texts)


def _tools(tools: list[AnthropicTool], names: FieldNames) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        own = f"tools[{index}]"
        if tool.type not in (None, "custom"):
            raise InvalidRequestError(f"`{own}` has a type that is not supported.", param=f"{own}.type")
        described = {} if tool.description is None else {"description": tool.description}
        function = {"name": tool.name, **described, "parameters": tool.input_schema}
        shown.append({"type": "function", "function": function})
        names.add(f"{own}.function", own)
        names.add(f"{own}.function.parameters", f"{own}.input_schema")
    return shown
