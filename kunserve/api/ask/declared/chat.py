"""The body of POST /v1/chat/completions, and that of POST /tokenize, which may be a conversation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from kunserve.api.ask.declared.fields import Kept
from kunserve.api.ask.declared.generation import ResponseFormat, Sampling, StreamOptions
from kunserve.api.ask.declared.values import AtLeastOne, Choices, Logprobs, Object, Stop, Unsupported


class ContentPart(Struct):
    """A part."""

    type: str | None = None
    text: str | None = None


class CalledFunction(Struct):
    """What a call calls."""

    name: str | None = None
    arguments: Any = None


class ToolCall(Struct):
    """A call."""

    id: str | None = None
    type: str | None = None
    function: CalledFunction | None = None


class Message(Struct):
    """A message."""

    role: str
    content: str | list[str | ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Struct):
    """What a model may call."""

    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct):
    """A tool."""

    type: str | None = None
    function: Function | None = None


Messages = Annotated[list[Object], Kept(Annotated[list[Message], Meta(min_length=1)])]
Tools = Annotated[list[Object] | None, Kept(list[Tool])]
ToolChoice = Literal["none", "auto", "required"] | Object


class Talk(Sampling, kw_only=True):
    """What all routes take that answer a conversation, whatever their words."""

    chat_template_kwargs: Object | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    include_reasoning: bool = True
    chat_template: Unsupported = None
    echo: Unsupported = None
    audio: Unsupported = None
    functions: Unsupported = None
    documents: Unsupported = None
    web_search_options: Unsupported = None


def common_fields(asked: Talk) -> dict[str, Any]:
    """Return what a request of another API says in the words of chat."""
    return {name: getattr(asked, name) for name in Talk.__struct_fields__}


class ChatOptions(Talk, kw_only=True):
    """What a chat request says beside its messages."""

    n: Choices = 1
    best_of: AtLeastOne | None = None
    stop: Stop | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Logprobs | None = None
    response_format: ResponseFormat | None = None
    user: str = ""
    safety_identifier: str | None = None
    max_tokens: AtLeastOne | None = None
    max_completion_tokens: AtLeastOne | None = None
    tools: Tools = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: Logprobs | None = None
    reasoning_effort: str | None = None
    modalities: Annotated[list[Literal["text"]], Meta(min_length=1)] | None = None


class Chat(ChatOptions, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Messages


class Tokenize(ChatOptions, kw_only=True):
    """POST /tokenize."""

    prompt: str | None = None
    messages: Annotated[list[Object] | None, Kept(Annotated[list[Message], Meta(min_length=1)])] = None
    return_token_strs: bool = False
