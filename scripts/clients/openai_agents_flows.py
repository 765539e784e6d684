"""openai-agents: agents with tools and typed outputs, over chat completions and over Responses."""

from __future__ import annotations

from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
)
from flows import Target, run
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

QUESTION = "What is the capital of France?"


class Person(BaseModel):
    """Somebody."""

    name: str = Field(max_length=12)
    role: Literal["captain", "cook"]


def chat_model(target: Target) -> Any:
    return OpenAIChatCompletionsModel(target.model, AsyncOpenAI(base_url=target.openai_url, api_key=target.key))


def responses_model(target: Target) -> Any:
    return OpenAIResponsesModel(target.model, AsyncOpenAI(base_url=target.openai_url, api_key=target.key))


def agent_of(model: Any, settings: ModelSettings | None = None, **fields: Any) -> Any:
    return Agent(name="Assistant", model=model, model_settings=settings or ModelSettings(max_tokens=64), **fields)


async def _multi_turn(model: Any) -> None:
    agent, session = agent_of(model, instructions="Answer in one sentence."), SQLiteSession("one")
    first = await Runner.run(agent, QUESTION, session=session)
    second = await Runner.run(agent, "And what is the capital of Italy?", session=session)
    assert "Paris" in first.final_output and "Rome" in second.final_output, (first, second)


async def _stream(model: Any) -> None:
    streamed = Runner.run_streamed(agent_of(model), QUESTION)
    text = ""
    async for event in streamed.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            text += event.data.delta
    assert "Paris" in text and streamed.final_output == text, (text, streamed.final_output)


async def _tools(model: Any) -> None:
    asked = []

    @function_tool
    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """Tell the weather of a city."""
        asked.append(city)
        return f"18 degrees in {city}"

    # The library asks for a call in the first turn only.
    settings = ModelSettings(tool_choice="required", parallel_tool_calls=False, max_tokens=300)
    result = await Runner.run(agent_of(model, settings, tools=[get_weather]), "How warm is it in Paris? One word.")
    assert asked and result.final_output, (asked, result)


async def _structured_output(model: Any) -> None:
    result = await Runner.run(agent_of(model, output_type=Person), "Describe a ship's cook named Ann.")
    assert isinstance(result.final_output, Person), result


async def chat_multi_turn(target: Target) -> None:
    await _multi_turn(chat_model(target))


async def chat_stream(target: Target) -> None:
    await _stream(chat_model(target))


async def chat_tools(target: Target) -> None:
    await _tools(chat_model(target))


async def chat_structured_output(target: Target) -> None:
    await _structured_output(chat_model(target))


async def responses_multi_turn(target: Target) -> None:
    await _multi_turn(responses_model(target))


async def responses_stream(target: Target) -> None:
    await _stream(responses_model(target))


async def responses_tools(target: Target) -> None:
    await _tools(responses_model(target))


async def responses_structured_output(target: Target) -> None:
    await _structured_output(responses_model(target))


if __name__ == "__main__":
    run(
        "openai-agents",
        chat_multi_turn,
        chat_stream,
        chat_tools,
        chat_structured_output,
        responses_multi_turn,
        responses_stream,
        responses_tools,
        responses_structured_output,
    )
