"""The examples of the official clients' own documentation: only the server, the model and bounds are ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import openai
import pytest
from openai import pydantic_function_tool
from pydantic import BaseModel

from e2e.server_process import ServerProcess

MODEL = "smollm2-135m"
QUESTION = "How do I check if a Python object is an instance of a class?"
WEATHER: Any = {
    "name": "get_weather",
    "description": "Get the current weather for a location.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Bogotá"]}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}


class CalendarEvent(BaseModel):
    name: Literal["fair", "party"]
    day: Literal["Monday", "Friday"]
    is_outside: bool


class GetWeather(BaseModel):
    city: Literal["Paris", "Bogotá"]


@pytest.fixture
def client(smollm2_server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{smollm2_server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(smollm2_server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=smollm2_server.url, api_key="any", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Talk like a pirate."},
            {"role": "user", "content": QUESTION},
        ],
        max_completion_tokens=12,
        user="somebody",
    )
    assert completion.choices[0].message.content
    assert completion._request_id


def test_chat_streamed_by_the_helper(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
    text = ""
    with client.chat.completions.stream(model=MODEL, messages=messages, temperature=0) as stream:
        for event in stream:
            if event.type == "content.delta":
                text += event.delta
    assert stream.get_final_completion().choices[0].message.content == text == "The capital of France is Paris."


def test_structured_output(client: openai.OpenAI) -> None:
    text = "Alice and Bob are going to a science fair on Friday."
    completion = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "system", "content": "Extract the event."}, {"role": "user", "content": text}],
        response_format=CalendarEvent,
    )
    assert isinstance(completion.choices[0].message.parsed, CalendarEvent)
    response = client.responses.parse(model=MODEL, input=[{"role": "user", "content": text}], text_format=CalendarEvent)
    assert isinstance(response.output_parsed, CalendarEvent)


def test_tools(client: openai.OpenAI) -> None:
    """Asked, called, answered."""
    messages: Any = [{"role": "user", "content": "What is the weather like in Paris today?"}]
    tools: Any = [{"type": "function", "function": {**WEATHER, "strict": True}}]
    free = client.chat.completions.create(model=MODEL, messages=messages, tools=tools, max_completion_tokens=8)
    assert free.choices[0].message.content  # this model knows no tools
    completion = client.chat.completions.create(
        model=MODEL, messages=messages, tools=tools, tool_choice="required", parallel_tool_calls=False, temperature=0
    )
    message = completion.choices[0].message
    assert completion.choices[0].finish_reason == "tool_calls" and message.tool_calls
    call: Any = message.tool_calls[0]
    assert call.function.name == "get_weather" and set(json.loads(call.function.arguments)) == {"city", "unit"}
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "22 degrees"}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=tools, max_completion_tokens=8)
    assert answer.choices[0].message.role == "assistant"


def test_tools_from_types(client: openai.OpenAI) -> None:
    completion = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the weather like in Paris?"}],
        tools=[pydantic_function_tool(GetWeather)],
        tool_choice={"type": "function", "function": {"name": "GetWeather"}},
    )
    [call] = completion.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, GetWeather)


def test_responses(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL, instructions="You are a coding assistant.", input=QUESTION, max_output_tokens=16
    )
    assert response.output_text and response.status == "incomplete"
    events = [
        event.type for event in client.responses.create(model=MODEL, input=QUESTION, stream=True, max_output_tokens=16)
    ]
    assert events[:2] == ["response.created", "response.in_progress"] and events[-1] == "response.incomplete"
    tool: Any = {"type": "function", **WEATHER, "strict": True}
    called = client.responses.create(
        model=MODEL, input="Weather?", tools=[tool], tool_choice="required", parallel_tool_calls=False, temperature=0
    )
    [item] = called.output
    assert item.type == "function_call" and item.name == "get_weather"
    output: Any = {"type": "function_call_output", "call_id": item.call_id, "output": "22 degrees"}
    again: Any = [{"role": "user", "content": "Weather?"}, item.model_dump(), output]
    assert client.responses.create(model=MODEL, input=again, tools=[tool], max_output_tokens=16).output


def test_completions(client: openai.OpenAI) -> None:
    stream = client.completions.create(model=MODEL, prompt="Say this is a test", max_tokens=7, stream=True)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"


def test_messages(claude: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "Hello, Claude"}]
    message = claude.messages.create(model=MODEL, max_tokens=12, messages=messages, system="Be brief.")
    assert message.content[0].type == "text" and message.stop_reason in ("end_turn", "max_tokens")
    with claude.messages.stream(model=MODEL, max_tokens=12, messages=messages) as stream:
        text = "".join(stream.text_stream)
    final = stream.get_final_message()
    assert final.content[0].type == "text" and final.content[0].text == text
    usage, counted = final.usage, claude.messages.count_tokens(model=MODEL, messages=messages).input_tokens
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted  # as Anthropic adds them up


def test_messages_with_tools(claude: anthropic.Anthropic) -> None:
    tool: Any = {"name": "get_weather", "description": "x", "input_schema": WEATHER["parameters"]}
    messages: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked = claude.messages.create(
        model=MODEL,
        max_tokens=200,
        messages=messages,
        tools=[tool],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    )
    [use] = asked.content
    assert asked.stop_reason == "tool_use" and use.type == "tool_use" and set(use.input) == {"city", "unit"}
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "22 degrees"}
    messages += [{"role": "assistant", "content": asked.content}, {"role": "user", "content": [result]}]
    assert claude.messages.create(model=MODEL, max_tokens=8, messages=messages, tools=[tool]).role == "assistant"


def test_messages_parsed(claude: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "Alice and Bob meet on Friday."}]
    parsed = claude.messages.parse(model=MODEL, max_tokens=200, messages=messages, output_format=CalendarEvent)
    assert isinstance(parsed.parsed_output, CalendarEvent)


def test_streamed_and_parsed(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    """`examples/parsing_stream.py`, `responses/streaming.py`, `parsing_tools_stream.py` and `tools_stream.py`."""
    messages: Any = [{"role": "user", "content": "Alice and Bob are going to a science fair on Friday."}]
    with client.chat.completions.stream(model=MODEL, messages=messages, response_format=CalendarEvent) as chat:
        contents = [event for event in chat if event.type == "content.done"]
    assert isinstance(contents[0].parsed, CalendarEvent)
    with client.responses.stream(model=MODEL, input=messages, text_format=CalendarEvent) as response:
        text = "".join(event.delta for event in response if event.type == "response.output_text.delta")
    parsed = response.get_final_response().output_parsed
    assert isinstance(parsed, CalendarEvent) and parsed == CalendarEvent.model_validate_json(text)
    tool = pydantic_function_tool(GetWeather)
    forced: Any = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}  # else it calls for ever
    with client.chat.completions.stream(model=MODEL, messages=messages, **forced) as chat:
        calls = [event for event in chat if event.type == "tool_calls.function.arguments.done"]
    assert calls and all(isinstance(call.parsed_arguments, GetWeather) for call in calls)
    use: Any = {"name": "get_weather", "description": "x", "input_schema": WEATHER["parameters"]}
    with claude.messages.stream(
        model=MODEL, max_tokens=200, messages=messages, tools=[use], tool_choice={"type": "tool", "name": use["name"]}
    ) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
    [block] = stream.get_final_message().content
    assert block.type == "tool_use" and json.loads("".join(pieces)) == block.input
