from __future__ import annotations

from typing import Any

import pytest

from kunserve.api.ask.messages import read_messages
from kunserve.errors import KunServeError


def test_text_parts_become_text_and_other_fields_stay() -> None:
    parts = ["a", {"type": "text", "text": "b"}, {"text": "c"}]
    [message] = read_messages([{"role": "user", "content": parts, "name": "Ann"}])
    assert message == {"role": "user", "content": "a\nb\nc", "name": "Ann"}


def test_tool_calls_get_their_arguments_as_objects() -> None:
    calls: list[dict[str, Any]] = [
        {"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"function": {"arguments": ""}},
    ]
    messages = read_messages(
        [
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "2", "tool_call_id": "1"},
        ]
    )
    functions = [call["function"] for call in messages[0]["tool_calls"]]
    assert functions == [{"name": "f", "arguments": {"x": 1}}, {"arguments": {}}]
    assert calls[0]["function"] == {"name": "f", "arguments": '{"x": 1}'}  # the caller's are untouched
    assert messages[1]["tool_call_id"] == "1"


@pytest.mark.parametrize(
    ("messages", "status", "names"),
    [
        ({}, 400, "messages"),
        ([5], 400, "messages[0]"),
        ([{"content": "x"}], 400, "messages[0].role"),
        ([{"role": 5, "content": "x"}], 400, "messages[0].role"),
        ([{"role": "user"}], 400, "messages[0].content"),
        ([{"role": "user", "content": 5}], 400, "messages[0].content"),
        ([{"role": "user", "content": [5]}], 400, "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], 400, "messages[0].content[0]"),
        ([{"role": "user", "content": [{"text": 5}]}], 400, "messages[0].content[0].text"),
        ([{"role": "assistant", "tool_calls": 5}], 400, "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"function": 5}]}], 400, "messages[0].tool_calls.function"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}],
            400,
            "messages[0].tool_calls.function.arguments",
        ),
    ],
)
def test_errors_name_the_place(messages: Any, status: int, names: str) -> None:
    with pytest.raises(KunServeError) as info:
        read_messages(messages)
    assert info.value.status == status
    assert f"`{names}`" in info.value.message
