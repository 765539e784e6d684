"""The anthropic client against /v1/messages."""

from __future__ import annotations

from typing import Any, Literal

from anthropic import Anthropic, AsyncAnthropic, BadRequestError, beta_tool
from anthropic.types import MessageParam, ToolParam
from flows import Target, run
from pydantic import BaseModel

QUESTION = "What is the capital of France?"
WEATHER: ToolParam = {
    "name": "get_weather",
    "description": "Tell the weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class Person(BaseModel):
    """Somebody."""

    name: str
    role: Literal["captain", "cook"]


def client_of(target: Target) -> Anthropic:
    return Anthropic(base_url=target.url, api_key=target.key)


def models(target: Target) -> None:
    assert target.model in [model.id for model in client_of(target).models.list()]


def chat(target: Target) -> None:
    message = client_of(target).messages.create(
        model=target.model, max_tokens=32, messages=[{"role": "user", "content": QUESTION}]
    )
    [block] = message.content
    assert block.type == "text" and "Paris" in block.text and message.stop_reason == "end_turn", message


def chat_stream(target: Target) -> None:
    with client_of(target).messages.stream(
        model=target.model, max_tokens=32, messages=[{"role": "user", "content": QUESTION}]
    ) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert "Paris" in text and final.usage.input_tokens > 0 and final.usage.output_tokens > 0, final


async def chat_async(target: Target) -> None:
    async with AsyncAnthropic(base_url=target.url, api_key=target.key) as client:
        message = await client.messages.create(
            model=target.model, max_tokens=32, messages=[{"role": "user", "content": QUESTION}]
        )
    assert message.content[0].type == "text"


def multi_turn(target: Target) -> None:
    client = client_of(target)
    messages: list[MessageParam] = []
    for question in (QUESTION, "And what is the capital of Italy?"):
        messages.append({"role": "user", "content": question})
        message = client.messages.create(
            model=target.model, max_tokens=32, system="Answer in one sentence.", messages=messages
        )
        messages.append({"role": "assistant", "content": message.content})
    assert message.content[0].type == "text" and "Rome" in message.content[0].text, message


def prefilled_answer(target: Target) -> None:
    message = client_of(target).messages.create(
        model=target.model,
        max_tokens=8,
        messages=[
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": "The capital of France is"},
        ],
    )
    assert message.content[0].type == "text" and message.content[0].text.startswith(" Paris"), message


def tools(target: Target) -> None:
    client = client_of(target)
    messages: list[Any] = [{"role": "user", "content": "How is the weather in Paris?"}]
    first = client.messages.create(
        model=target.model,
        max_tokens=100,
        tools=[WEATHER],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        messages=messages,
    )
    calls = [block for block in first.content if block.type == "tool_use"]
    assert first.stop_reason == "tool_use" and calls and calls[0].input in ({"city": "Paris"}, {"city": "Rome"}), first
    messages.append({"role": "assistant", "content": first.content})
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "18 degrees"} for call in calls]
    messages.append({"role": "user", "content": results})
    second = client.messages.create(model=target.model, max_tokens=32, tools=[WEATHER], messages=messages)
    assert second.content[0].type == "text" and second.content[0].text, second


def tools_stream(target: Target) -> None:
    with client_of(target).messages.stream(
        model=target.model,
        max_tokens=100,
        tools=[WEATHER],
        tool_choice={"type": "tool", "name": "get_weather"},
        messages=[{"role": "user", "content": "How is the weather in Paris?"}],
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    [block] = final.content
    assert "input_json" in kinds and block.type == "tool_use" and "city" in block.input, (kinds, final)


def tool_runner(target: Target) -> None:
    asked = []

    @beta_tool
    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """Tell the weather of a city."""
        asked.append(city)
        return "18 degrees"

    runner = client_of(target).beta.messages.tool_runner(
        model=target.model,
        max_tokens=100,
        max_iterations=2,
        tools=[get_weather],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        messages=[{"role": "user", "content": "How is the weather in Paris?"}],
    )
    assert len(list(runner)) == 2 and asked, asked


def structured_output(target: Target) -> None:
    message = client_of(target).messages.parse(
        model=target.model,
        max_tokens=200,
        messages=[{"role": "user", "content": "Describe a ship's cook named Ann."}],
        output_format=Person,
    )
    assert isinstance(message.parsed_output, Person), message


def count_tokens(target: Target) -> None:
    client = client_of(target)
    messages: list[MessageParam] = [{"role": "user", "content": QUESTION}]
    counted = client.messages.count_tokens(model=target.model, messages=messages)
    message = client.messages.create(model=target.model, max_tokens=1, messages=messages)
    assert counted.input_tokens == message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)


def errors(target: Target) -> None:
    try:
        client_of(target).messages.create(model=target.model, max_tokens=8, extra_body={"temperature": 9}, messages=[])
    except BadRequestError as caught:
        refusal = caught
    assert refusal.status_code == 400 and "invalid_request_error" in str(refusal.body), refusal


if __name__ == "__main__":
    run(
        "anthropic",
        models,
        chat,
        chat_stream,
        chat_async,
        multi_turn,
        prefilled_answer,
        tools,
        tools_stream,
        tool_runner,
        structured_output,
        count_tokens,
        errors,
    )
