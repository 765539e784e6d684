"""instructor: pydantic models as answers, in each of its modes for OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import instructor
from flows import Target, run
from openai import OpenAI
from pydantic import BaseModel, Field

DESCRIBE = [{"role": "user", "content": "Describe a ship's cook named Ann who is 30 years old."}]


class Person(BaseModel):
    """Somebody."""

    name: str = Field(max_length=12)
    role: Literal["captain", "cook"]
    age: int = Field(ge=0, le=120)


def client_of(target: Target, mode: instructor.Mode) -> Any:
    return instructor.from_openai(OpenAI(base_url=target.openai_url, api_key=target.key), mode=mode)


def _describe(target: Target, mode: instructor.Mode, messages: list[Any] = DESCRIBE, **fields: Any) -> None:
    person = client_of(target, mode).chat.completions.create(
        model=target.model, response_model=Person, messages=messages, max_tokens=150, max_retries=0, **fields
    )
    assert isinstance(person, Person), person


def tools_mode(target: Target) -> None:
    _describe(target, instructor.Mode.TOOLS)


def tools_strict_mode(target: Target) -> None:
    _describe(target, instructor.Mode.TOOLS_STRICT)


def json_schema_mode(target: Target) -> None:
    _describe(target, instructor.Mode.JSON_SCHEMA)


# The modes below leave it to the model to follow the schema in its prompt. A model as small as that of these flows
# needs an example for it, or has its words given: then it is checked that both sides understand each other.
ANN = '{"name": "Ann", "role": "cook", "age": 30}'
EXAMPLE = [
    {"role": "user", "content": "Describe a captain named Bob who is 40 years old."},
    {"role": "assistant", "content": '{"name": "Bob", "role": "captain", "age": 40}'},
    {"role": "user", "content": "Describe a cook named Ann who is 30 years old."},
]


def saying(text: str) -> dict[str, Any]:
    return {"extra_body": {"structured_outputs": {"choice": [text]}}}


def json_mode(target: Target) -> None:
    _describe(target, instructor.Mode.JSON, EXAMPLE)


def md_json_mode(target: Target) -> None:
    _describe(target, instructor.Mode.MD_JSON, **saying(f"```json\n{ANN}\n```"))


def parallel_tools_mode(target: Target) -> None:
    call = f'<tool_call>\n{{"name": "Person", "arguments": {ANN}}}\n</tool_call>'
    people = client_of(target, instructor.Mode.PARALLEL_TOOLS).chat.completions.create(
        model=target.model,
        response_model=Iterable[Person],
        messages=DESCRIBE,
        max_tokens=150,
        max_retries=0,
        **saying(f"{call}\n{call}"),
    )
    assert [person.name for person in people] == ["Ann", "Ann"]


def partial(target: Target) -> None:
    people = client_of(target, instructor.Mode.TOOLS).chat.completions.create_partial(
        model=target.model, response_model=Person, messages=DESCRIBE, max_tokens=150, max_retries=0
    )
    assert [person.role for person in people][-1] in ("captain", "cook")


if __name__ == "__main__":
    run(
        "instructor",
        tools_mode,
        tools_strict_mode,
        json_schema_mode,
        json_mode,
        md_json_mode,
        parallel_tools_mode,
        partial,
    )
