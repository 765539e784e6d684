from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from api_fakes import FakeEngine, error_of, events_of, say, serving
from openai import AsyncOpenAI
from structures import VOCABULARY

from kunserve.api.ask.tools import Tools
from kunserve.api.say.calls.formats import TOOL_FORMATS, CallFormat
from kunserve.api.wire.backend import ApiSettings
from kunserve.api.wire.grammars import Grammars
from kunserve.engine.request import Constraint, Output, Request
from kunserve.errors import EngineError
from kunserve.sampling import FinishReason

URL = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "time"}}
HERMES = ApiSettings(tool_call_parser="hermes")
CALL = 'Well.<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'


def grammars() -> Grammars:
    return Grammars(VOCABULARY)


def talking(text: str) -> FakeEngine:
    return FakeEngine(lambda _: say(text, FinishReason.STOP))


async def test_calls_of_a_whole_answer() -> None:
    async with serving(talking(CALL), HERMES) as client:
        answer = await (await client.post(URL, json={"messages": HI, "tools": [WEATHER]})).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Well."
    [call] = choice["message"]["tool_calls"]
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}


async def test_calls_of_a_stream() -> None:
    async with serving(talking(CALL), HERMES) as client:
        body = {"messages": HI, "tools": [WEATHER], "stream": True, "logprobs": False}
        events = await events_of(await client.post(URL, json=body))
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Well."
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert calls[0]["function"]["name"] == "weather" and calls[0]["id"].startswith("call_")
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Bern"}'
    assert {call["index"] for call in calls} == {0}
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == "tool_calls"


async def test_text_where_calls_were_possible() -> None:
    async with serving(talking("no <b>calls</b>"), HERMES) as client:
        answer = await (await client.post(URL, json={"messages": HI, "tools": [WEATHER]})).json()
    choice = answer["choices"][0]
    assert (choice["message"], choice["finish_reason"]) == ({"role": "assistant", "content": "no <b>calls</b>"}, "stop")


async def test_one_call_if_not_parallel() -> None:
    both = '<tool_call>{"name": "time", "arguments": {}}</tool_call>' * 2
    async with serving(talking(both), HERMES) as client:
        for is_parallel, num in ((True, 2), (False, 1), (None, 2)):
            body = {"messages": HI, "tools": [TIME], "parallel_tool_calls": is_parallel}
            answer = await (await client.post(URL, json=body)).json()
            assert len(answer["choices"][0]["message"]["tool_calls"]) == num


async def test_tool_choice_none_leaves_the_text_alone() -> None:
    async with serving(talking(CALL), HERMES) as client:
        body = {"messages": HI, "tools": [WEATHER], "tool_choice": "none"}
        answer = await (await client.post(URL, json=body)).json()
    assert answer["choices"][0]["message"]["content"] == CALL


async def test_special_tokens_are_shown_where_they_mark_calls() -> None:
    for parser, shown in (("mistral", True), ("hermes", False)):
        engine = talking("x")
        async with serving(engine, ApiSettings(tool_call_parser=parser)) as client:
            await client.post(URL, json={"messages": HI, "tools": [TIME]})
            await client.post(URL, json={"messages": HI})
        assert [request.params.skip_special_tokens for request in engine.requests] == [not shown, True]


@pytest.mark.parametrize("has_special_marks", [True, False])
async def test_a_parser_that_is_added_says_itself_whether_its_marks_are_special_tokens(
    has_special_marks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = CallFormat(("<call>",), ("</call>",), has_special_marks=has_special_marks)
    monkeypatch.setitem(TOOL_FORMATS, "added", added)
    engine = talking('<call>{"name": "time", "arguments": {}}</call>')
    async with serving(engine, ApiSettings(tool_call_parser="added")) as client:
        answer = await (await client.post(URL, json={"messages": HI, "tools": [TIME]})).json()
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "time"
    [request] = engine.requests
    assert request.params.skip_special_tokens is not has_special_marks


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": "x"}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "tools[0].function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": 5}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ],
)
async def test_bad_requests_never_reach_the_engine(body: dict[str, Any], param: str) -> None:
    engine = FakeEngine()
    async with serving(engine, HERMES) as client:
        response = await client.post(URL, json={"messages": HI, **body})
        error = await error_of(response)
    assert response.status == 400 and error["param"] == param
    assert engine.requests == []


async def test_a_server_without_parser_says_so() -> None:
    async with serving(FakeEngine()) as client:
        error = await error_of(await client.post(URL, json={"messages": HI, "tools": [TIME]}))
    assert error["param"] == "tools" and "--tool-call-parser" in error["message"]


def obeying(text: str) -> FakeEngine:
    """Says `text`, and checks that the constraint allows it, byte by byte, and then the end."""

    class Obeyed:
        def __init__(self, constraint: Constraint) -> None:
            self.constraint = constraint

        async def wait(self) -> None:
            await take(self.constraint, text.encode())
            if not self.constraint.is_finished:
                await take(self.constraint, b"", 299)
            assert self.constraint.error is None

    def script(request: Request) -> Iterator[Output | Obeyed]:
        assert request.constraint is not None
        yield Obeyed(request.constraint)
        yield from say(text, FinishReason.STOP)

    return FakeEngine(script)


async def take(constraint: Constraint, text: bytes, *token_ids: int) -> None:
    for token_id in (*text, *token_ids):
        constraint.accept(token_id)
        await constraint.decided()


async def test_required_calls() -> None:
    text = '[{"name": "time", "parameters": {}}, {"name": "weather", "parameters": {"city": "Bern"}}]'
    async with serving(obeying(text), grammars=grammars()) as client:
        body = {"messages": HI, "tools": [WEATHER, TIME], "tool_choice": "required"}
        answer = await (await client.post(URL, json=body)).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["time", "weather"]


async def test_a_required_call_has_nothing_that_nobody_would_see() -> None:
    structure = Tools([TIME], "required").structure
    assert structure is not None
    made = grammars()
    constraint = await made.compile(structure, reasons=False)
    await take(constraint, b'[{"name": "time", "parameters": {}')
    assert not constraint.error
    await take(constraint, b",")
    assert isinstance(constraint.error, EngineError) and "does not allow token 44" in constraint.error.message
    await made.close()


FEW = {"a": {"enum": [1]}}


@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        ({"properties": FEW, "required": ["a"]}, '{"a": 1}', '"SmolLM"'),
        ({"properties": FEW}, "{}", '{"b": 1}'),
        ({"type": ["object", "null"], "properties": FEW}, "{}", "null"),
        ({"$ref": "#/$defs/P", "$defs": {"P": {"properties": FEW, "required": ["a"]}}}, '{"a": 1}', "1"),
        ({"anyOf": [{"properties": FEW, "required": ["a"]}, {"type": "string"}]}, '{"a": 1}', '"x"'),
        ({"type": "object"}, '{"x": 1}', "1"),
        ({}, "{}", '{"x": 1}'),
        (None, "{}", '{"x": 1}'),
    ],
)
async def test_arguments_are_an_object(parameters: dict[str, Any] | None, good: str, bad: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    made = grammars()
    for mode, shown in (("named", "@"), ("required", '[{"name": "f", "parameters": @}]')):
        structure = Tools([tool], mode, "f").structure  # type: ignore[arg-type]
        assert structure is not None
        for text, is_allowed in ((good, True), (bad, False)):
            constraint = await made.compile(structure, reasons=False)
            await take(constraint, shown.replace("@", text).encode())
            if not constraint.is_finished and not constraint.error:
                await take(constraint, b"", 299)
            assert (constraint.error is None) is is_allowed, (mode, text)
            constraint.close()
    await made.close()


async def test_a_named_call() -> None:
    async with serving(obeying('{"city": "Bern"}'), grammars=grammars()) as client:
        body = {
            "messages": HI,
            "tools": [WEATHER, TIME],
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
        }
        answer = await (await client.post(URL, json=body)).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}


async def test_reasoning() -> None:
    settings = ApiSettings(reasoning_parser="qwen3")
    async with serving(talking("<think>hm</think>\nyes"), settings) as client:
        answer = await (await client.post(URL, json={"messages": HI})).json()
        assert answer["choices"][0]["message"] == {
            "role": "assistant",
            "content": "yes",
            "reasoning": "hm",
            "reasoning_content": "hm",
        }
        events = await events_of(await client.post(URL, json={"messages": HI, "stream": True}))
        deltas = [event["choices"][0]["delta"] for event in events]
        assert "".join(delta.get("reasoning", "") for delta in deltas) == "hm"
        assert "".join(delta.get("content") or "" for delta in deltas) == "yes"
        # the template has opened or closed the reasoning itself
        for kwargs, message in (({"x": "<think>"}, "yes"), ({"x": "</think>"}, "<think>hm</think>\nyes")):
            body = {"messages": HI, "chat_template_kwargs": kwargs, "add_generation_prompt": False}
            answer = await (await client.post(URL, json=body)).json()
            assert answer["choices"][0]["message"]["content"] == message


async def test_a_final_message_goes_on() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        messages = [*HI, {"role": "assistant", "content": "Sure: "}]
        await client.post(URL, json={"messages": messages, "continue_final_message": True})
        assert bytes(engine.requests[0].prompt_token_ids) == b"[u:hi][a:Sure: "
        body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": True}
        assert (await error_of(await client.post(URL, json=body)))["param"] == "continue_final_message"


async def test_the_openai_client_reads_calls() -> None:
    async with (
        serving(talking(CALL), HERMES) as server,
        AsyncOpenAI(base_url=str(server.make_url("/v1")), api_key="none", max_retries=0) as client,
    ):
        async with client.chat.completions.stream(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            tools=[WEATHER],  # type: ignore[list-item]
        ) as stream:
            completion = await stream.get_final_completion()
        calls = completion.choices[0].message.tool_calls
        assert calls is not None and calls[0].function.name == "weather"
        assert completion.choices[0].finish_reason == "tool_calls"
