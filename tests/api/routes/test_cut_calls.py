"""A call that is cut by the limit of tokens: no markup in any API, streamed or not, and each says that it is cut."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from aiohttp import ClientResponse
from api_fakes import FakeEngine, events_of, say, serving
from structures import VOCABULARY

from kunserve.api.wire.backend import ApiSettings
from kunserve.api.wire.grammars import Grammars
from kunserve.sampling import FinishReason

HERMES = ApiSettings(tool_call_parser="hermes")
HI = [{"role": "user", "content": "hi"}]
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
CALL = 'Well.<tool_call>\n{"name": "time", "arguments": {"zone": "UTC"}}\n</tool_call>'
IN_MARK, IN_NAME = CALL[:10], CALL[: CALL.index("me", 20)]
BEFORE_ARGUMENTS, IN_ARGUMENTS = CALL[: CALL.index("{", 20)], CALL[: CALL.index("C")]


def cut(text: str) -> FakeEngine:
    return FakeEngine(lambda _: say(text, FinishReason.LENGTH))


async def named_events_of(response: ClientResponse) -> list[dict[str, Any]]:
    *events, rest = (await response.read()).decode().split("\n\n")
    assert response.status == 200 and rest == ""
    return [orjson.loads(event.partition("data: ")[2]) for event in events]


async def chat(text: str, **more: Any) -> dict[str, Any]:
    """The answer's choice; that of a stream must be the same."""
    made = Grammars(VOCABULARY)
    async with serving(cut(text), HERMES, grammars=made) as client:
        body = {"messages": HI, "tools": [TIME], **more}
        answer = await (await client.post("/v1/chat/completions", json=body)).json()
        events = await events_of(await client.post("/v1/chat/completions", json={**body, "stream": True}))
    choice: dict[str, Any] = answer["choices"][0]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == (choice["message"]["content"] or "")
    calls = [call["function"] for delta in deltas for call in delta.get("tool_calls", [])]
    whole = [call["function"] for call in choice["message"].get("tool_calls", [])]
    assert [call["name"] for call in calls if "name" in call] == [call["name"] for call in whole]
    assert "".join(call["arguments"] for call in calls) == "".join(call["arguments"] for call in whole)
    assert events[-1]["choices"][0]["finish_reason"] == choice["finish_reason"] == "length"
    return choice


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (IN_MARK, []),
        (IN_NAME, []),
        (BEFORE_ARGUMENTS, [("time", "")]),
        (IN_ARGUMENTS, [("time", '{"zone": "UT')]),
        (CALL[:-3], [("time", '{"zone": "UTC"}')]),
    ],
)
async def test_a_call_that_is_cut_leaves_no_markup(text: str, calls: list[tuple[str, str]]) -> None:
    message = (await chat(text))["message"]
    assert message["content"] == "Well."
    told = [call["function"] for call in message.get("tool_calls", [])]
    assert [(function["name"], function["arguments"]) for function in told] == calls


async def test_of_a_required_call_that_is_cut_in_its_name_nothing_comes() -> None:
    for text in ("[", '[{\n    "name": "ti', '{"name": "ti'):
        message = (await chat(text, tool_choice="required"))["message"]
        assert message == {"role": "assistant", "content": None}


@pytest.mark.parametrize(("text", "status"), [(IN_ARGUMENTS, "incomplete"), (CALL[:-3], "completed")])
async def test_responses_says_which_item_is_incomplete(text: str, status: str) -> None:
    async with serving(cut(text), HERMES) as client:
        body = {"input": "hi", "tools": [TIME]}
        answer = await (await client.post("/v1/responses", json=body)).json()
        events = await named_events_of(await client.post("/v1/responses", json={**body, "stream": True}))
    assert answer["status"] == "incomplete"
    last = events[-1]
    assert last["type"] == "response.incomplete"
    for output in (answer["output"], last["response"]["output"]):
        assert [(item["type"], item["status"]) for item in output] == [
            ("message", "completed"),
            ("function_call", status),
        ]
        assert output[0]["content"][0]["text"] == "Well."


async def test_messages_stops_for_max_tokens() -> None:
    tool = {"name": "time", "input_schema": {"type": "object"}}
    body = {"messages": HI, "max_tokens": 40, "tools": [tool]}
    for text, blocks in ((IN_MARK, 1), (IN_NAME, 1), (IN_ARGUMENTS, 2), (CALL[:-3], 2)):
        async with serving(cut(text), HERMES) as client:
            answer = await (await client.post("/v1/messages", json=body)).json()
            events = await named_events_of(await client.post("/v1/messages", json={**body, "stream": True}))
        assert answer["stop_reason"] == "max_tokens" and len(answer["content"]) == blocks
        assert answer["content"][0] == {"type": "text", "text": "Well."}
        texts = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        assert "".join(delta.get("text", "") for delta in texts) == "Well."
        assert [event["delta"]["stop_reason"] for event in events if event["type"] == "message_delta"] == ["max_tokens"]
