"""llama-index with its OpenAILike model: chat, streams, tools, structured output."""

from __future__ import annotations

from typing import Any, Literal

from flows import Target, run
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

QUESTION = "What is the capital of France?"


class Person(BaseModel):
    """Somebody."""

    name: str = Field(max_length=12)
    role: Literal["captain", "cook"]


def get_weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"18 degrees in {city}"


def model_of(target: Target, **fields: Any) -> Any:
    return OpenAILike(
        model=target.model,
        api_base=target.openai_url,
        api_key=target.key,
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=4096,
        max_tokens=64,
        max_retries=0,
        **fields,
    )


def complete(target: Target) -> None:
    assert "Paris" in model_of(target).complete(QUESTION).text


def chat_stream(target: Target) -> None:
    pieces = list(model_of(target).stream_chat([ChatMessage(role="user", content=QUESTION)]))
    assert "Paris" in "".join(piece.delta or "" for piece in pieces), pieces


async def chat_async(target: Target) -> None:
    answer = await model_of(target).achat([ChatMessage(role="user", content=QUESTION)])
    assert "Paris" in answer.message.content, answer


def multi_turn(target: Target) -> None:
    turns = [("user", QUESTION), ("assistant", "Paris."), ("user", "And what is the capital of Italy?")]
    answer = model_of(target).chat([ChatMessage(role=role, content=content) for role, content in turns])
    assert "Rome" in answer.message.content, answer


def tools(target: Target) -> None:
    model, tool = model_of(target), FunctionTool.from_defaults(get_weather)
    asked = ChatMessage(role="user", content="How is the weather in Paris?")
    called = model.chat_with_tools([tool], chat_history=[asked], tool_required=True, allow_parallel_tool_calls=False)
    history = [asked, called.message]
    for call in model.get_tool_calls_from_response(called):
        told = {"tool_call_id": call.tool_id}
        history.append(ChatMessage(role="tool", content=str(tool(**call.tool_kwargs)), additional_kwargs=told))
    assert len(history) == 3 and model.chat(history).message.content, history


def structured_output_by_call(target: Target) -> None:
    person = model_of(target).as_structured_llm(Person).complete("Describe a ship's cook named Ann.").raw
    assert isinstance(person, Person), person


def structured_output_by_schema(target: Target) -> None:
    model = model_of(target, should_use_structured_outputs=True)
    person = model.as_structured_llm(Person).complete("Describe a ship's cook named Ann.").raw
    assert isinstance(person, Person), person


if __name__ == "__main__":
    run(
        "llama-index",
        complete,
        chat_stream,
        chat_async,
        multi_turn,
        tools,
        structured_output_by_call,
        structured_output_by_schema,
        package="llama-index-llms-openai-like",
    )
