"""The body of POST /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Struct

from kunserve.api.ask.declared.chat import Function, Talk, ToolChoice
from kunserve.api.ask.declared.fields import Kept, Refused
from kunserve.api.ask.declared.generation import ResponseFormat
from kunserve.api.ask.declared.values import AtLeastOne, Logprobs, Object, Stop, Unsupported

LOGPROBS = "message.output_text.logprobs"


class ItemPart(Struct):
    """A part."""

    type: str | None = None
    text: str | None = None
    refusal: str | None = None


class Item(Struct):
    """An item."""

    type: str | None = None
    id: str | None = None
    role: str | None = None
    content: str | list[ItemPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ItemPart] | None = None


class ResponseTool(Struct):
    """A tool."""

    type: str | None = None
    name: str | None = None
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None
    function: Function | None = None  # as chat writes it


class TextFormat(ResponseFormat):
    """What the text must be."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(Struct):
    """How the text is written."""

    format: TextFormat | None = None


class Reasoning(Struct):
    """How much is thought before."""

    effort: str | None = None
    summary: str | None = None


# What may be asked for beside the text; all but log-probabilities are details of items that never come from here.
Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
]


class Response(Talk, kw_only=True):
    """POST /v1/responses."""

    input: Annotated[str | list[Object], Kept(str | list[Item])]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: AtLeastOne | None = None
    tools: Annotated[list[Object] | None, Kept(list[ResponseTool])] = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: list[Include] | None = None
    top_logprobs: Logprobs | None = None
    truncation: Literal["auto", "disabled"] | None = None
    stop: Stop | None = None
    metadata: Object | None = None
    store: bool = True
    max_tool_calls: AtLeastOne | None = None
    user: str = ""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    n: Literal[1] = 1
    conversation: Unsupported = None
    background: Unsupported = None
    prompt: Unsupported = None
    prompt_logprobs: Unsupported = None
    messages: Annotated[Any, Refused("is called `input` here")] = None
    max_tokens: Annotated[Any, Refused("is called `max_output_tokens` here")] = None
    max_completion_tokens: Annotated[Any, Refused("is called `max_output_tokens` here")] = None
    response_format: Annotated[Any, Refused("is called `text.format` here")] = None
    reasoning_effort: Annotated[Any, Refused("is called `reasoning.effort` here")] = None
    logprobs: Annotated[Any, Refused(f"is asked for by `include`, with `{LOGPROBS}`, here")] = None
