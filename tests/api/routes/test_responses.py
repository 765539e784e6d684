from __future__ import annotations

from typing import Any

import orjson
import pytest
from aiohttp import ClientResponse
from api_fakes import FakeEngine, error_of, say, serving
from openai import AsyncOpenAI

from kunserve.api.wire.backend import ApiSettings
from kunserve.errors import EngineError
from kunserve.sampling import FinishReason

URL = "/v1/responses"
CALL = '<think>hm</think>Well.<tool_call>{"name": "time", "arguments": {"zone": "UTC"}}</tool_call>'
BOTH = ApiSettings(tool_call_parser="hermes", reasoning_parser="qwen3")
TIME: dict[str, Any] = {"type": "function", "name": "time", "parameters": {"type": "object"}, "strict": True}


def talking(text: str, reason: FinishReason = FinishReason.STOP) -> FakeEngine:
    return FakeEngine(lambda _: say(text, reason))


async def events_of(response: ClientResponse) -> list[dict[str, Any]]:
    assert response.status == 200
    *events, rest = (await response.read()).decode().split("\n\n")
    assert rest == ""
    values = []
    for event in events:
        name, data = event.split("\n")
        values.append(orjson.loads(data.removeprefix("data: ")))
        assert name == f"event: {values[-1]['type']}"
    assert [value["sequence_number"] for value in values] == list(range(len(values)))
    return values


async def test_whole_answer() -> None:
    engine = talking("yes")
    async with serving(engine) as client:
        body = {"input": "hi", "instructions": "be brief", "metadata": {"a": "b"}}
        answer = await (await client.post(URL, json=body)).json()
    assert bytes(engine.requests[0].prompt_token_ids) == b"[s:be brief][u:hi]>"
    assert (answer["object"], answer["status"], answer["metadata"]) == ("response", "completed", {"a": "b"})
    [item] = answer["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": "yes", "annotations": [], "logprobs": []}]
    assert answer["usage"]["input_tokens"] == 19 and answer["usage"]["output_tokens"] == 3


async def test_cut_by_length() -> None:
    engine = talking("ye", FinishReason.LENGTH)
    async with serving(engine) as client:
        answer = await (await client.post(URL, json={"input": "hi", "max_output_tokens": 2})).json()
    assert engine.requests[0].params.max_tokens == 2
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


async def test_items_of_every_kind() -> None:
    async with serving(talking(CALL), BOTH) as client:
        answer = await (await client.post(URL, json={"input": "hi", "tools": [TIME]})).json()
        events = await events_of(await client.post(URL, json={"input": "hi", "tools": [TIME], "stream": True}))
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message", "function_call"]
    for usage in (answer["usage"], events[-1]["response"]["usage"]):
        assert usage["output_tokens"] == len(CALL)
        thought = usage["output_tokens_details"]["reasoning_tokens"]
        assert len("hm") <= thought <= len("<think>hm</think>")
    call = answer["output"][2]
    assert (call["name"], call["arguments"]) == ("time", '{"zone": "UTC"}')
    last = events[-1]
    assert last["type"] == "response.completed"
    assert [item["type"] for item in last["response"]["output"]] == ["reasoning", "message", "function_call"]
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:2] == ["created", "in_progress"]
    assert kinds.count("output_item.added") == kinds.count("output_item.done") == 3
    written = "".join(event["delta"] for event in events if event["type"].endswith("arguments.delta"))
    assert written == '{"zone": "UTC"}'


async def test_items_of_the_input() -> None:
    engine = talking("x")
    async with serving(engine, BOTH) as client:
        items = [
            {"role": "developer", "content": "d"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "q"}]},
            {"type": "reasoning", "summary": []},
            {"type": "function_call", "call_id": "c", "name": "time", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "noon"},
        ]
        response = await client.post(URL, json={"input": items})
        assert response.status == 200, await response.text()
    assert bytes(engine.requests[0].prompt_token_ids) == b"[s:d][u:q][a:][t:noon]>"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"type": "image"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": "x", "previous_response_id": "r"}, "previous_response_id"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "x", "temperature": -1}, "temperature"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "max_output_tokens": 60}, "max_output_tokens"),
        ({"input": "x", "reasoning": {"effort": 5}}, "reasoning.effort"),
        ({"input": "x", "instructions": 5}, "instructions"),
        ({"input": "x", "instructions": "i" * 70}, "input"),
        ({"input": [{"role": "user", "content": 5}], "instructions": "i"}, "input[0].content"),
        ({"input": [{"type": "function_call_output", "output": 5}]}, "input[0].output"),
        ({"input": "x", "tools": [{**TIME, "parameters": 5}]}, "tools[0].parameters"),
        ({"input": "x", "tools": [TIME], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ({"input": "x", "tools": [TIME], "tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice"),
        ({"input": "x", "tools": [TIME], "tool_choice": {"type": "allowed_tools", "tools": 5}}, "tool_choice.tools"),
        ({"input": "x", "include": ["all"]}, "include"),
        ({"input": "x", "include": "all"}, "include"),
        ({"input": "x", "top_logprobs": 21}, "top_logprobs"),
        ({"input": "x", "truncation": "yes"}, "truncation"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ],
)
async def test_bad_requests(body: dict[str, Any], param: str) -> None:
    engine = FakeEngine()
    async with serving(engine, BOTH) as client:
        response = await client.post(URL, json=body)
        error = await error_of(response)
    assert response.status == 400 and error["param"] == param
    assert engine.requests == []


async def test_failed_step() -> None:
    async with serving(FakeEngine(lambda _: [*say("a", None), EngineError("cpu:1 is gone")])) as client:
        events = await events_of(await client.post(URL, json={"input": "hi", "stream": True}))
    assert (events[-2]["type"], events[-2]["message"]) == ("error", "cpu:1 is gone")
    assert events[-1]["type"] == "response.failed" and events[-1]["response"]["status"] == "failed"


async def test_the_openai_client_is_happy() -> None:
    async with (
        serving(talking(CALL), BOTH) as server,
        AsyncOpenAI(base_url=str(server.make_url("/v1")), api_key="none", max_retries=0) as client,
    ):
        answer = await client.responses.create(model="tiny", input="hi")
        assert answer.output_text.startswith("Well.") and answer.status == "completed"
        async with client.responses.stream(model="tiny", input="hi", tools=[TIME]) as stream:  # type: ignore[list-item]
            text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
            final = await stream.get_final_response()
        assert text == "Well." and final.output[-1].type == "function_call"
