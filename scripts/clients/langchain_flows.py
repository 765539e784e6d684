"""langchain-openai and langchain-anthropic: chat models, streams, batches, bound tools, structured output."""

from __future__ import annotations

from typing import Any, Literal

from flows import Target, run
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

QUESTION = "What is the capital of France?"


class Person(BaseModel):
    """Somebody."""

    name: str = Field(max_length=12)
    role: Literal["captain", "cook"]


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Tell the weather of a city."""
    return f"18 degrees in {city}"


def openai_model(target: Target, **fields: Any) -> Any:
    given = {"max_tokens": 64, **fields}
    return ChatOpenAI(model=target.model, base_url=target.openai_url, api_key=target.key, **given)


def anthropic_model(target: Target) -> Any:
    return ChatAnthropic(model=target.model, base_url=target.url, api_key=target.key, max_tokens=64)


def chat(target: Target) -> None:
    answer = openai_model(target).invoke(QUESTION)
    assert "Paris" in answer.content and answer.usage_metadata["output_tokens"] > 0, answer


def chat_stream(target: Target) -> None:
    chunks = list(openai_model(target, stream_usage=True).stream(QUESTION))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert "Paris" in whole.content and whole.usage_metadata["output_tokens"] > 0, whole


async def chat_async(target: Target) -> None:
    answers = await openai_model(target).abatch([QUESTION, "What is the capital of Italy?"])
    assert ["Paris" in answers[0].content, "Rome" in answers[1].content] == [True, True], answers


def multi_turn(target: Target) -> None:
    messages = [SystemMessage("Answer in one sentence."), HumanMessage(QUESTION), AIMessage("Paris.")]
    answer = openai_model(target).invoke([*messages, HumanMessage("And what is the capital of Italy?")])
    assert "Rome" in answer.content, answer


def _call_and_answer(model: Any, **options: Any) -> None:
    """Let the model call the tool, run it, and let the model answer."""
    messages: list[Any] = [HumanMessage("How is the weather in Paris?")]
    called = model.bind_tools([get_weather], tool_choice="any", **options).invoke(messages)
    assert called.tool_calls and not called.invalid_tool_calls, called
    results = [get_weather.invoke(call) for call in called.tool_calls]
    assert all(isinstance(result, ToolMessage) for result in results)
    assert model.bind_tools([get_weather]).invoke([*messages, called, *results]).content


def tools(target: Target) -> None:
    _call_and_answer(openai_model(target), parallel_tool_calls=False)


def structured_output_by_schema(target: Target) -> None:
    model = openai_model(target).with_structured_output(Person, method="json_schema")
    assert isinstance(model.invoke("Describe a ship's cook named Ann."), Person)


def structured_output_by_call(target: Target) -> None:
    model = openai_model(target).with_structured_output(Person, method="function_calling")
    assert isinstance(model.invoke("Describe a ship's cook named Ann."), Person)


def json_mode(target: Target) -> None:
    model = openai_model(target).with_structured_output(None, method="json_mode")
    prompt = 'Answer with this JSON object and nothing else: {"name": "Ann"}'
    assert isinstance(model.invoke(prompt), dict)


def responses(target: Target) -> None:
    answer = openai_model(target, use_responses_api=True).invoke(QUESTION)
    assert "Paris" in answer.text, answer


def completions(target: Target) -> None:
    model = OpenAI(model=target.model, base_url=target.openai_url, api_key=target.key, max_tokens=4)
    assert "Paris" in model.invoke("The capital of France is")


def anthropic_chat(target: Target) -> None:
    assert "Paris" in anthropic_model(target).invoke(QUESTION).content


def anthropic_stream(target: Target) -> None:
    assert "Paris" in "".join(chunk.text for chunk in anthropic_model(target).stream(QUESTION))


def anthropic_tools(target: Target) -> None:
    _call_and_answer(anthropic_model(target), parallel_tool_calls=False)


def anthropic_structured_output(target: Target) -> None:
    model = anthropic_model(target).with_structured_output(Person)
    assert isinstance(model.invoke("Describe a ship's cook named Ann."), Person)


if __name__ == "__main__":
    run(
        "langchain-openai",
        chat,
        chat_stream,
        chat_async,
        multi_turn,
        tools,
        structured_output_by_schema,
        structured_output_by_call,
        json_mode,
        responses,
        completions,
    )
    run("langchain-anthropic", anthropic_chat, anthropic_stream, anthropic_tools, anthropic_structured_output)
