"""litellm: one call for every provider, here through its OpenAI, vLLM and Anthropic ones."""

from __future__ import annotations

import json
from typing import Any, Literal

import litellm
from flows import Target, run
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


def ask(target: Target, provider: str = "openai", **fields: Any) -> Any:
    url = target.url if provider == "anthropic" else target.openai_url
    given = {"messages": QUESTION, "max_tokens": 32, **fields}
    return litellm.completion(model=f"{provider}/{target.model}", api_base=url, api_key=target.key, **given)


def chat(target: Target) -> None:
    assert "Paris" in ask(target).choices[0].message.content


def chat_as_vllm(target: Target) -> None:
    assert "Paris" in ask(target, "hosted_vllm").choices[0].message.content


def chat_as_anthropic(target: Target) -> None:
    assert "Paris" in ask(target, "anthropic").choices[0].message.content


def chat_stream(target: Target) -> None:
    chunks = list(ask(target, stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks, messages=QUESTION)
    assert "Paris" in whole.choices[0].message.content and whole.usage.completion_tokens > 0, whole


async def chat_async(target: Target) -> None:
    answer = await litellm.acompletion(
        model=f"openai/{target.model}", api_base=target.openai_url, api_key=target.key, messages=QUESTION, max_tokens=32
    )
    assert "Paris" in answer.choices[0].message.content


def tools(target: Target) -> None:
    messages: list[Any] = [{"role": "user", "content": "How is the weather in Paris?"}]
    chosen: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    message = ask(target, messages=messages, max_tokens=100, **chosen).choices[0].message
    messages.append(message)
    for call in message.tool_calls:
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "18 degrees"})
    assert ask(target, messages=messages, tools=[WEATHER]).choices[0].message.content


def structured_output(target: Target) -> None:
    described = [{"role": "user", "content": "Describe a ship's cook named Ann."}]
    content = ask(target, messages=described, response_format=Person, max_tokens=100).choices[0].message.content
    Person.model_validate_json(content)


def multi_turn(target: Target) -> None:
    messages: list[Any] = [*QUESTION, ask(target).choices[0].message]
    messages.append({"role": "user", "content": "And what is the capital of Italy?"})
    assert "Rome" in ask(target, messages=messages).choices[0].message.content


def text_completion(target: Target) -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{target.model}",
        api_base=target.openai_url,
        api_key=target.key,
        prompt="The capital of France is",
        max_tokens=4,
    )
    assert "Paris" in answer.choices[0].text


def responses(target: Target) -> None:
    answer = litellm.responses(
        model=f"openai/{target.model}",
        api_base=target.openai_url,
        api_key=target.key,
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
