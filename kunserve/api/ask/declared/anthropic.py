"""The bodies of POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from kunserve.api.ask.declared.chat import Talk
from kunserve.api.ask.declared.fields import Refused, in_order
from kunserve.api.ask.declared.values import MAX_STOPS, AtLeastOne, NonEmpty, Object, Unsupported


class TextBlock(Struct):
    """A text block."""

    type: str | None = None
    text: str | None = None


class Block(Struct):
    """A block."""

    type: str | None = None
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: Any = None  # an object; but a broken call must not end its conversation
    tool_use_id: str | None = None
    content: str | list[Object] | None = None  # parts as chat has them, and images


class AnthropicMessage(Struct):
    """A message."""

    role: str
    content: str | list[Block] | None = None


class AnthropicTool(Struct):
    """A tool."""

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: Object | None = None


Choice = Annotated[Literal["auto", "any", "tool", "none"], in_order("auto", "any", "tool", "none")]


class AnthropicChoice(Struct):
    """Which tools may be called."""

    type: Choice | None = None
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct):
    """Whether the model thinks before."""

    type: str | None = None
    budget_tokens: AtLeastOne | None = None


class Metadata(Struct):
    """Whom the client asks for."""

    user_id: str | None = None


class OutputFormat(Struct):
    """What the answer must be."""

    type: Literal["json_schema"]
    schema: Object


class OutputConfig(Struct):
    """How the answer is written."""

    format: OutputFormat | None = None
    effort: str | None = None


class Counted(Talk, kw_only=True):
    """POST /v1/messages/count_tokens."""

    messages: Annotated[list[AnthropicMessage], Meta(min_length=1)]
    max_tokens: AtLeastOne | None = None
    system: str | list[TextBlock] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None
    parallel_tool_calls: bool = True
    stop_sequences: Annotated[list[NonEmpty], Meta(max_length=MAX_STOPS)] | None = None
    thinking: Thinking | None = None
    metadata: Metadata | None = None
    user: str = ""
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # where it stood before `output_config`
    n: Literal[1] = 1
    mcp_servers: Unsupported = None
    logprobs: Unsupported = None
    top_logprobs: Unsupported = None
    prompt_logprobs: Unsupported = None
    stop: Annotated[Any, Refused("is called `stop_sequences` here")] = None
    max_completion_tokens: Annotated[Any, Refused("is called `max_tokens` here")] = None
    response_format: Annotated[Any, Refused("is called `output_config.format` here")] = None
    reasoning_effort: Annotated[Any, Refused("is called `output_config.effort` here")] = None


class AnthropicMessages(Counted, kw_only=True):
    """POST /v1/messages."""

    max_tokens: AtLeastOne
