"""litellm: one call for every provider, here through its OpenAI, vLLM and Anthropic ones."""

from __future__ import annotations

import json
from typing import Any, Literal

import litellm
from flows import Place, run
from pydantic import BaseModel, Field

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


class Person(BaseModel):
    """Somebody."""

    name: str = Field(max_length=12)
    role: Literal["captain", "cook"]


def ask(place: Place, provider: str = "openai", **fields: Any) -> Any:
    url = place.url if provider == "anthropic" else place.openai_url
    given = {"messages": QUESTION, "max_tokens": 32, **fields}
    return litellm.completion(model=f"{provider}/{place.model}", api_base=url, api_key=place.key, **given)


def chat(place: Place) -> None:
    assert "Paris" in ask(place).choices[0].message.content


def chat_as_vllm(place: Place) -> None:
    assert "Paris" in ask(place, "hosted_vllm").choices[0].message.content


def chat_as_anthropic(place: Place) -> None:
    assert "Paris" in ask(place, "anthropic").choices[0].message.content


def chat_stream(place: Place) -> None:
    chunks = list(ask(place, stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks, messages=QUESTION)
    assert "Paris" in whole.choices[0].message.content and whole.usage.completion_tokens > 0, whole


async def chat_async(place: Place) -> None:
    answer = await litellm.acompletion(
        model=f"openai/{place.model}", api_base=place.openai_url, api_key=place.key, messages=QUESTION, max_tokens=32
    )
    assert "Paris" in answer.choices[0].message.content


def tools(place: Place) -> None:
    messages: list[Any] = [{"role": "user", "content": "How is the weather in Paris?"}]
    chosen: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    message = ask(place, messages=messages, max_tokens=100, **chosen).choices[0].message
    messages.append(message)
    for call in message.tool_calls:
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "18 degrees"})
    assert ask(place, messages=messages, tools=[WEATHER]).choices[0].message.content


def structured_output(place: Place) -> None:
    described = [{"role": "user", "content": "Describe a ship's cook named Ann."}]
    content = ask(place, messages=described, response_format=Person, max_tokens=100).choices[0].message.content
    Person.model_validate_json(content)


def multi_turn(place: Place) -> None:
    messages: list[Any] = [*QUESTION, ask(place).choices[0].message]
    messages.append({"role": "user", "content": "And what is the capital of Italy?"})
    assert "Rome" in ask(place, messages=messages).choices[0].message.content


def text_completion(place: Place) -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{place.model}",
        api_base=place.openai_url,
        api_key=place.key,
        prompt="The capital of France is",
        max_tokens=4,
    )
    assert "Paris" in answer.choices[0].text


def responses(place: Place) -> None:
    answer = litellm.responses(
        model=f"openai/{place.model}",
        api_base=place.openai_url,
        api_key=place.key,
        input="What is the capital of France?",
        max_output_tokens=32,
    )
    assert "Paris" in answer.output[0].content[0].text


if __name__ == "__main__":
    run(
        "litellm",
        chat,
        chat_as_vllm,
        chat_as_anthropic,
        chat_stream,
        chat_async,
        tools,
        structured_output,
        multi_turn,
        text_completion,
        responses,
    )
