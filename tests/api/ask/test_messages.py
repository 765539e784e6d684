from __future__ import annotations

from typing import Any

import pytest

from kunserve.api.ask.chat_template import ChatTemplate
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
        ([{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}], 400, "messages[0].content[0]"),
        ([{"role": "tool", "content": [{"type": 5}]}], 400, "messages[0].content[0]"),
    ],
)
def test_errors_name_the_place(messages: Any, status: int, names: str) -> None:
    with pytest.raises(KunServeError) as info:
        read_messages(messages)
    assert info.value.status == status
    assert f"`{names}`" in info.value.message


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [
        ('{"city": "Be', {"raw_arguments": '{"city": "Be'}),
        ('{"text": "a\nb"}', {"text": "a\nb"}),
        ("f(x=1)", {"raw_arguments": "f(x=1)"}),
        ('{"half": "\\ud800"}', {"raw_arguments": '{"half": "\\ud800"}'}),
        ('"{\\"x\\": 1}"', {"x": 1}),
        ("[1]", {"raw_arguments": "[1]"}),
        ("5", {"raw_arguments": "5"}),
        ("[" * 100_000, {"raw_arguments": "[" * 100_000}),
        ("", {}),
        (" ", {}),
        ("null", {}),
        ("[]", {}),
        ('""', {}),
        (None, {}),
        ([], {}),
        ({"x": 1}, {"x": 1}),
        ([1], {"raw_arguments": [1]}),
    ],
)
def test_arguments_that_are_no_object_become_one(arguments: object, parsed: dict[str, Any]) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    [message] = read_messages([{"role": "assistant", "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"]["arguments"] == parsed
    template = ChatTemplate(
        "{% for m in messages %}{{ m.tool_calls[0].function.arguments.items() | list }}{% endfor %}"
    )
    assert template.render([message]) == str(list(parsed.items()))


def test_templates_may_write_arguments_as_they_like() -> None:
    call = {"function": {"name": "f", "arguments": '{"a": "é"}'}}
    messages = read_messages([{"role": "assistant", "tool_calls": [call]}])
    for written in ("a | tojson", "'' + a", "a + ''", "'' ~ a", "a"):
        source = "{% set a = messages[0].tool_calls[0].function.arguments %}{{ " + written + " }}"
        assert ChatTemplate(source).render(messages) == '{"a": "é"}', written


def test_images_in_the_results_of_tools_are_named() -> None:
    parts = [{"type": "text", "text": "seen:"}, {"type": "image_url", "image_url": {"url": "data:"}}, {"type": "image"}]
    for role in ("tool", "function"):
        [message] = read_messages([{"role": role, "content": parts}])
        image = "[image: left out, this model reads text only]"
        assert message["content"] == f"seen:\n{image}\n{image}"


def test_a_refusal_of_the_assistant_is_its_text() -> None:
    [message] = read_messages([{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}])
    assert message["content"] == "no"


def test_text_and_calls_of_a_turn_are_one_message() -> None:
    def calling(name: str, content: str | None = None) -> dict[str, Any]:
        function = {"name": name, "arguments": {}}
        return {"role": "assistant", "content": content, "tool_calls": [{"id": name, "function": function}]}

    def saying(text: str) -> dict[str, Any]:
        return {"role": "assistant", "content": text}

    def shape(*messages: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
        return [
            (m["role"], m["content"], [c["id"] for c in m.get("tool_calls", [])]) for m in read_messages([*messages])
        ]

    user, result = {"role": "user", "content": "hi"}, {"role": "tool", "content": "1"}
    assert shape(user, saying("Well."), calling("f"), result) == [
        ("user", "hi", []),
        ("assistant", "Well.", ["f"]),
        ("tool", "1", []),
    ]
    assert shape(calling("f", "a"), calling("g", "b"), result)[0] == ("assistant", "a\nb", ["f", "g"])
    assert shape(calling("f"), saying("Well."), result)[0] == ("assistant", "Well.", ["f"])
    assert shape(calling("f"), saying("and then")) == [("assistant", "", ["f"]), ("assistant", "and then", [])]
    assert len(shape(saying("a"), saying("b"), user)) == 3
    assert len(shape(calling("f"), result, calling("g"), result)) == 4
