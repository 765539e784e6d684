"""What the document says of a field and what the check makes of it are one."""

from __future__ import annotations

from functools import cache
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schema_values import near

from kunserve.api.ask.declared.anthropic import AnthropicMessages, Counted
from kunserve.api.ask.declared.chat import Chat, Tokenize
from kunserve.api.ask.declared.check import FEW_OBJECTS, read
from kunserve.api.ask.declared.fields import body_schema, fields_of
from kunserve.api.ask.declared.generation import Completion
from kunserve.api.ask.declared.others import Burst, Detokenize, Groups
from kunserve.api.ask.declared.responses import Response
from kunserve.api.ask.declared.values import MAX_BIASES
from kunserve.api.wire.fields import PIECE
from kunserve.errors import InvalidRequestError

LEAST: dict[type[msgspec.Struct], dict[str, Any]] = {
    Completion: {"prompt": "x"},
    Chat: {"messages": [{"role": "user", "content": "x"}]},
    Tokenize: {},
    Response: {"input": "x"},
    AnthropicMessages: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5},
    Counted: {"messages": [{"role": "user", "content": "x"}]},
    Detokenize: {"tokens": [1]},
    Burst: {},
    Groups: {},
}
# Each field once: most are the same ones in several bodies.
FIELDS = {
    (field.name, str(field.schema)): (declared, field.name)
    for declared in LEAST
    for field in fields_of(declared).values()
}.values()
WRONG: list[Any] = [True, -2, 5, 1.5, "\u00e9", [True], {"role": 5}, [{"role": 5}]]


def fault_of(declared: type[msgspec.Struct], body: dict[str, Any]) -> InvalidRequestError | None:
    try:
        read(body, declared)
    except InvalidRequestError as error:
        return error
    return None


@cache  # to make them takes as long as to check twenty values
def values_near(declared: type[msgspec.Struct], name: str) -> st.SearchStrategy[Any]:
    return near(body_schema(declared)["properties"][name])


@cache
def validator_of(declared: type[msgspec.Struct]) -> Any:
    return jsonschema.Draft202012Validator(body_schema(declared))


@pytest.mark.parametrize(("declared", "name"), FIELDS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_field_takes_exactly_what_its_schema_allows(
    declared: type[msgspec.Struct], name: str, data: st.DataObject
) -> None:
    value = data.draw(values_near(declared, name))
    body = {**LEAST[declared], name: value}
    fault = fault_of(declared, body)
    assert (fault is None) is validator_of(declared).is_valid(body), (value, fault)
    if fault is not None:
        assert (fault.param or "").startswith(name) and f"`{name}" in fault.message
        assert fault.message.count("\n") == 0 and fault.message.endswith(".") and len(fault.message) < 300


@pytest.mark.parametrize(("declared", "name"), FIELDS)
def test_every_field_is_checked(declared: type[msgspec.Struct], name: str) -> None:
    assert any(fault_of(declared, {**LEAST[declared], name: value}) for value in WRONG)


@pytest.mark.parametrize("declared", LEAST)
def test_null_is_absent_and_what_is_unknown_is_ignored(declared: type[msgspec.Struct]) -> None:
    nulls = dict.fromkeys(body_schema(declared)["properties"])
    assert read({**nulls, **LEAST[declared], "novelty": 1}, declared) == read(LEAST[declared], declared)
    for name in body_schema(declared)["required"]:
        error = fault_of(declared, {**LEAST[declared], name: None})
        assert error is not None and (error.message, error.param) == (f"`{name}` is required.", name)


@pytest.mark.parametrize(
    ("declared", "body", "message"),
    [
        (Completion, {"n": 129}, "`n` must be between 1 and 128, not 129."),
        (Completion, {"n": "2"}, '`n` must be an integer, not "2".'),
        (Completion, {"n": True}, "`n` must be an integer, not true."),
        (Completion, {"max_tokens": 1e30}, "`max_tokens` must be at most 9223372036854775807, not 1e+30."),
        (Completion, {"top_p": 7}, "`top_p` must be at least 0 and at most 1, not 7."),
        (Completion, {"stop": 5}, "`stop` must be a string or a list of strings, not 5."),
        (Completion, {"stop": ["x"] * 17}, "`stop` must have at most 16 strings, not 17."),
        (Completion, {"stop": ["a", ""]}, '`stop[1]` must have at least one character, not "".'),
        (Completion, {"logit_bias": {"5": "up"}}, '`logit_bias.5` must be a number, not "up".'),
        (
            Completion,
            {"stream_options": {"include_usage": 1}},
            "`stream_options.include_usage` must be true or false, not 1.",
        ),
        (Completion, {"truncation_side": "middle"}, '`truncation_side` must be left or right, not "middle".'),
        (Completion, {"use_beam_search": True}, "`use_beam_search` is not supported."),
        (
            Completion,
            {"seed": 2.0**64},
            "`seed` must be between -9223372036854775808 and 18446744073709551615, not 1.8446744073709552e+19.",
        ),
        (Completion, {"prompt": []}, "`prompt` must have at least one token id, not an empty list."),
        (
            Completion,
            {"prompt": 5},
            "`prompt` must be a string, a list of token ids, a list of strings or a list of lists of token ids, not 5.",
        ),
        (Chat, {"messages": "hi"}, '`messages` must be a list of messages, not "hi".'),
        (Chat, {"messages": [{"content": "x"}]}, "`messages[0].role` is required."),
        (
            Chat,
            {"messages": [{"role": "user", "content": 5}]},
            "`messages[0].content` must be a string or a list of strings or parts, not 5.",
        ),
        (
            Chat,
            {"messages": [{"role": "user", "content": [{"text": 5}]}]},
            "`messages[0].content[0].text` must be a string, not 5.",
        ),
        (Chat, {"tools": [5]}, "`tools[0]` must be an object, not 5."),
    ],
)  # fmt: skip
def test_what_is_said_of_a_fault(declared: type[msgspec.Struct], body: dict[str, Any], message: str) -> None:
    error = fault_of(declared, {**LEAST[declared], **body})
    assert error is not None and error.message == message


def test_long_lists_are_read_in_pieces_and_are_whole() -> None:
    ids = list(range(PIECE + 2))
    assert read({"prompt": ids}, Completion).prompt == ids
    assert read({"prompt": [*ids, 7.0]}, Completion).prompt == [*ids, 7]
    assert read({"prompt": [[1], ids]}, Completion).prompt == [[1], ids]
    biases = {str(token_id): 1 for token_id in ids}
    assert read({"prompt": "x", "logit_bias": biases}, Completion).logit_bias == biases
    messages = [{"role": "user", "content": "x", "unknown": 1}] * (FEW_OBJECTS + 1)
    assert read({"messages": messages}, Chat).messages is messages
    for body, place in (
        ({"prompt": [*ids, "x"]}, f"`prompt[{len(ids)}]`"),
        ({"prompt": [[1], [*ids, "x"]]}, f"`prompt[1][{len(ids)}]`"),
        ({"prompt": "x", "logit_bias": {**biases, "7": "x"}}, "`logit_bias.7`"),
        ({"prompt": "x", "logit_bias": {**biases, "x": 1}}, 'the key "x"'),
    ):
        error = fault_of(Completion, body)
        assert error is not None and place in error.message
    error = fault_of(Completion, {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(MAX_BIASES + 1)), 1)})
    assert (
        error is not None
        and error.message == f"`logit_bias` must have at most {MAX_BIASES} fields, not {MAX_BIASES + 1}."
    )
    error = fault_of(Chat, {"messages": [*messages, {"role": 5}]})
    assert error is not None and error.param == f"messages[{len(messages)}].role"


def test_defaults_count_where_a_body_does_not_say() -> None:
    defaults = {"temperature": 0.5, "top_k": 20}
    asked = read({"prompt": "x", "temperature": None, "top_k": 3}, Completion, defaults)
    assert (asked.temperature, asked.top_k) == (0.5, 3)
