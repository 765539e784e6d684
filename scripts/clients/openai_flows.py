"""The openai client: chat, streams, tools, structured output, Responses."""

from __future__ import annotations

import json
from typing import Literal

from flows import Target, run
from openai import AsyncOpenAI, BadRequestError, OpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, Field

QUESTION = "What is the capital of France?"
DESCRIBE = "Describe a ship's cook named Ann, with the ages of her two children."
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


class Person(BaseModel):
    """Somebody."""

    name: str
    role: Literal["captain", "cook"]
    ages: list[int] = Field(max_length=2)


def client_of(target: Target) -> OpenAI:
    return OpenAI(base_url=target.openai_url, api_key=target.key)


def models(target: Target) -> None:
    client = client_of(target)
    assert target.model in [model.id for model in client.models.list()]
    assert client.models.retrieve(target.model).id == target.model


def chat(target: Target) -> None:
    answer = client_of(target).chat.completions.create(
        model=target.model, messages=[{"role": "user", "content": QUESTION}], max_tokens=32
    )
    assert "Paris" in (answer.choices[0].message.content or ""), answer
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def chat_stream(target: Target) -> None:
    stream = client_of(target).chat.completions.create(
        model=target.model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, finish_reasons, usages = "", [], []
    for chunk in stream:
        if chunk.usage:
            usages.append(chunk.usage)
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish_reasons.append(choice.finish_reason)
    assert "Paris" in text and finish_reasons[-1] == "stop" and len(usages) == 1, (text, finish_reasons, usages)


async def chat_async(target: Target) -> None:
    async with AsyncOpenAI(base_url=target.openai_url, api_key=target.key) as client:
        stream = await client.chat.completions.create(
            model=target.model,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=32,
            stream=True,
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert "Paris" in text


def multi_turn(target: Target) -> None:
    client = client_of(target)
    messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": "Answer in one sentence."}]
    for question in (QUESTION, "And what is the capital of Italy?"):
        messages.append({"role": "user", "content": question})
        answer = client.chat.completions.create(model=target.model, messages=messages, max_tokens=32)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    assert "Rome" in str(messages[-1]["content"]), messages


def logprobs(target: Target) -> None:
    answer = client_of(target).chat.completions.create(
        model=target.model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=8,
        logprobs=True,
        top_logprobs=3,
    )
    told = answer.choices[0].logprobs
    assert told and told.content and all(len(token.top_logprobs) == 3 for token in told.content), told
    text = "".join(token.token for token in told.content)  # with the token that ends it
    assert text.startswith(answer.choices[0].message.content or "no text"), answer


def tools(target: Target) -> None:
    client = client_of(target)
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How is the weather in Paris?"}]
    first = client.chat.completions.create(
        model=target.model,
        messages=messages,
        tools=[{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER, "strict": True}}],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls" and message.tool_calls, first
    messages.append(message.to_dict())  # type: ignore[arg-type]  # the client's guide does that
    for call in message.tool_calls:
        assert call.type == "function" and json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "18 degrees, sunny"})
    second = client.chat.completions.create(model=target.model, messages=messages, max_tokens=32)
    assert second.choices[0].message.content


def tools_stream(target: Target) -> None:
    with client_of(target).chat.completions.stream(
        model=target.model,
        messages=[{"role": "user", "content": "How is the weather in Paris?"}],
        tools=[{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER, "strict": True}}],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
    ) as stream:
        kinds = {event.type for event in stream}
        [call] = stream.get_final_completion().choices[0].message.tool_calls or []
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds, kinds
    assert call.function.name == "get_weather" and call.function.parsed_arguments, call


def structured_output(target: Target) -> None:
    answer = client_of(target).chat.completions.parse(
        model=target.model,
        messages=[{"role": "user", "content": DESCRIBE}],
        response_format=Person,
        max_tokens=100,
    )
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person), answer


def structured_output_stream(target: Target) -> None:
    with client_of(target).chat.completions.stream(
        model=target.model,
        messages=[{"role": "user", "content": DESCRIBE}],
        response_format=Person,
        max_tokens=100,
    ) as stream:
        kinds = {event.type for event in stream}
        person = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(person, Person) and "content.delta" in kinds and "content.done" in kinds, kinds


def completions(target: Target) -> None:
    answer = client_of(target).completions.create(
        model=target.model, prompt=["The capital of France is", "One, two, three,"], max_tokens=8, logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1] and "Paris" in answer.choices[0].text, answer


def errors(target: Target) -> None:
    try:
        client_of(target).chat.completions.create(model=target.model, messages=[], temperature=9)
    except BadRequestError as caught:
        refusal = caught
    assert refusal.status_code == 400 and refusal.param and refusal.message, refusal


def responses(target: Target) -> None:
    client = client_of(target)
    first = client.responses.create(model=target.model, input=QUESTION, max_output_tokens=32)
    assert first.status == "completed" and "Paris" in first.output_text, first
    second = client.responses.create(
        model=target.model,
        input="Which country did I ask about?",
        previous_response_id=first.id,
        max_output_tokens=32,
    )
    assert second.output_text and second.usage and first.usage
    assert second.usage.input_tokens > first.usage.input_tokens, "the first turn is not in the second's prompt"
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)


def responses_stream(target: Target) -> None:
    with client_of(target).responses.stream(model=target.model, input=QUESTION, max_output_tokens=32) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed", kinds
    assert "response.output_text.delta" in kinds and "Paris" in final.output_text


def responses_tools(target: Target) -> None:
    client = client_of(target)
    first = client.responses.create(
        model=target.model,
        input="How is the weather in Paris?",
        tools=[{"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": True}],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    calls = [item for item in first.output if item.type == "function_call"]
    assert calls and json.loads(calls[0].arguments)["city"] in ("Paris", "Rome"), first
    second = client.responses.create(
        model=target.model,
        previous_response_id=first.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees"} for call in calls],
        max_output_tokens=32,
    )
    assert second.output_text, second


def responses_structured_output(target: Target) -> None:
    answer = client_of(target).responses.parse(
        model=target.model,
        input=DESCRIBE,
        text_format=Person,
        max_output_tokens=100,
    )
    assert isinstance(answer.output_parsed, Person), answer


if __name__ == "__main__":
    run(
        "openai",
        models,
        chat,
        chat_stream,
        chat_async,
        multi_turn,
        logprobs,
        tools,
        tools_stream,
        structured_output,
        structured_output_stream,
        completions,
        errors,
        responses,
        responses_stream,
        responses_tools,
        responses_structured_output,
    )
