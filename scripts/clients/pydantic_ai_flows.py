"""pydantic-ai: agents on its OpenAI chat, OpenAI Responses and Anthropic models."""

from __future__ import annotations

from typing import Any, Literal

from flows import Target, run
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "What is the capital of France?"
DESCRIBE = "Describe a ship's cook named Ann."


class Person(BaseModel):
    """Somebody."""

    name: str = Field(max_length=12)
    role: Literal["captain", "cook"]


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Tell the weather of a city."""
    return f"18 degrees in {city}"


def chat_model(target: Target) -> Any:
    return OpenAIChatModel(target.model, provider=OpenAIProvider(base_url=target.openai_url, api_key=target.key))


def responses_model(target: Target) -> Any:
    return OpenAIResponsesModel(target.model, provider=OpenAIProvider(base_url=target.openai_url, api_key=target.key))


def anthropic_model(target: Target) -> Any:
    return AnthropicModel(target.model, provider=AnthropicProvider(base_url=target.url, api_key=target.key))


def agent_of(model: Any, **fields: Any) -> Agent[None, Any]:
    settings = {"max_tokens": 100, "parallel_tool_calls": False}
    return Agent(model, model_settings=settings, **fields)


def _chat_and_go_on(model: Any) -> None:
    agent = agent_of(model, instructions="Answer in one sentence.")
    first = agent.run_sync(QUESTION)
    assert "Paris" in first.output, first
    second = agent.run_sync("And what is the capital of Italy?", message_history=first.all_messages())
    assert "Rome" in second.output, second


async def _stream(model: Any) -> None:
    async with agent_of(model).run_stream(QUESTION) as streamed:
        text = "".join([piece async for piece in streamed.stream_text(delta=True, debounce_by=None)])
    assert "Paris" in text, text


def _call(model: Any) -> None:
    """Let the model call a function whose result is the answer: an output function."""
    result = agent_of(model, output_type=get_weather).run_sync("How is the weather in Paris?")
    assert result.output in ("18 degrees in Paris", "18 degrees in Rome"), result


def _describe(model: Any, output_type: Any) -> None:
    assert isinstance(agent_of(model, output_type=output_type).run_sync(DESCRIBE).output, Person)


def chat_multi_turn(target: Target) -> None:
    _chat_and_go_on(chat_model(target))


async def chat_stream(target: Target) -> None:
    await _stream(chat_model(target))


def chat_tools(target: Target) -> None:
    _call(chat_model(target))


def chat_structured_output(target: Target) -> None:
    _describe(chat_model(target), Person)


def chat_native_output(target: Target) -> None:
    _describe(chat_model(target), NativeOutput(Person))


def responses_multi_turn(target: Target) -> None:
    _chat_and_go_on(responses_model(target))


async def responses_stream(target: Target) -> None:
    await _stream(responses_model(target))


def responses_tools(target: Target) -> None:
    _call(responses_model(target))


def responses_structured_output(target: Target) -> None:
    _describe(responses_model(target), Person)


def anthropic_multi_turn(target: Target) -> None:
    _chat_and_go_on(anthropic_model(target))


async def anthropic_stream(target: Target) -> None:
    await _stream(anthropic_model(target))


def anthropic_tools(target: Target) -> None:
    _call(anthropic_model(target))


def anthropic_structured_output(target: Target) -> None:
    _describe(anthropic_model(target), Person)


if __name__ == "__main__":
    run(
        "pydantic-ai",
        chat_multi_turn,
        chat_stream,
        chat_tools,
        chat_structured_output,
        chat_native_output,
        responses_multi_turn,
        responses_stream,
        responses_tools,
        responses_structured_output,
        anthropic_multi_turn,
        anthropic_stream,
        anthropic_tools,
        anthropic_structured_output,
        package="pydantic-ai-slim",
    )
