"""What Open Responses asks of a server, case by case, and its schema of a response, written anew from its description.

WebSocket is left out: this server has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from api_fakes import Client, FakeEngine, error_of, say, serving
from test_responses import BOTH, CALL, TIME, URL, events_of, talking

from kunserve.api.wire.backend import ApiSettings
from kunserve.engine.request import Output
from kunserve.sampling import FinishReason, TokenLogprobs

NUMBER, TEXT, NULL = (int, float), str, type(None)
# Every field that a response must have, and its types.
RESPONSE: dict[str, Any] = {
    **dict.fromkeys(("id", "object", "status", "model", "truncation", "service_tier"), TEXT),
    **dict.fromkeys(("created_at", "top_logprobs"), int),
    **dict.fromkeys(("completed_at", "max_output_tokens", "max_tool_calls"), (int, NULL)),
    **dict.fromkeys(("previous_response_id", "instructions", "safety_identifier", "prompt_cache_key"), (TEXT, NULL)),
    **dict.fromkeys(("error", "incomplete_details", "usage", "reasoning"), (dict, NULL)),
    **dict.fromkeys(("output", "tools"), list),
    **dict.fromkeys(("parallel_tool_calls", "store", "background"), bool),
    **dict.fromkeys(("top_p", "temperature", "presence_penalty", "frequency_penalty"), NUMBER),
    **dict.fromkeys(("text", "metadata"), dict),
    "tool_choice": (TEXT, dict),
}
TOOL: dict[str, Any] = {
    "type": TEXT,
    "name": TEXT,
    "description": (TEXT, NULL),
    "parameters": (dict, NULL),
    "strict": (bool, NULL),
}
ITEMS: dict[str, dict[str, Any]] = {
    "message": {"id": TEXT, "status": TEXT, "role": TEXT, "content": list},
    "function_call": {"id": TEXT, "status": TEXT, "call_id": TEXT, "name": TEXT, "arguments": TEXT},
    "reasoning": {"id": TEXT, "summary": list, "content": list},
}
OUTPUT_TEXT: dict[str, Any] = {"type": TEXT, "text": TEXT, "annotations": list, "logprobs": list}


def fits(value: dict[str, Any], schema: dict[str, Any]) -> None:
    for name, types in schema.items():
        assert name in value, name
        assert isinstance(value[name], types), (name, value[name])


def check(response: dict[str, Any]) -> dict[str, Any]:
    """Hold a response against the schema."""
    fits(response, RESPONSE)
    for tool in response["tools"]:
        fits(tool, TOOL)
    for item in response["output"]:
        fits(item, ITEMS[item["type"]])
        if item["type"] == "message":
            for part in item["content"]:
                fits(part, OUTPUT_TEXT)
    assert response["text"]["format"]["type"] in ("text", "json_object", "json_schema")
    if response["usage"] is not None:
        usage = response["usage"]
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert usage["input_tokens_details"] == {"cached_tokens": 0}
    return response


async def create(client: Client, **body: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"model": "tiny", **body})
    assert response.status == 200, await response.text()
    return check(await response.json())


def text_of(response: dict[str, Any]) -> str:
    return "".join(p["text"] for i in response["output"] if i["type"] == "message" for p in i["content"])


@pytest.mark.parametrize(
    "given",
    [
        "Say hello",
        [{"type": "message", "role": "user", "content": "Say hello"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        [{"role": "developer", "content": "d"}, {"role": "user", "content": [{"type": "input_text", "text": "q"}]}],
        [
            {"type": "message", "role": "user", "content": "a"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"type": "message", "role": "user", "content": "c"},
        ],
    ],
)
async def test_a_conversation_is_answered(given: object) -> None:
    async with serving(talking("yes")) as client:
        response = await create(client, input=given)
    assert response["status"] == "completed" and response["completed_at"] >= response["created_at"]
    assert text_of(response) == "yes"


async def test_what_was_sent_comes_back() -> None:
    sent: dict[str, Any] = {
        "safety_identifier": "u",
        "prompt_cache_key": "k",
        "max_tool_calls": 3,
        "metadata": {"a": "b"},
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "top_p": 0.5,
        "temperature": 0.25,
        "top_logprobs": 0,
        "truncation": "auto",
        "parallel_tool_calls": False,
        "instructions": "i",
        "max_output_tokens": 9,
        "reasoning": {"effort": "low", "summary": None},
        "tool_choice": "none",
        "store": False,
    }
    async with serving(talking("yes"), BOTH) as client:
        response = await create(client, input="hi", tools=[{"type": "function", "name": "f"}], **sent)
    assert {name: response[name] for name in sent} == sent
    assert response["tools"] == [
        {"type": "function", "name": "f", "description": None, "parameters": None, "strict": None}
    ]


async def test_tools_are_called() -> None:
    async with serving(talking(CALL), BOTH) as client:
        response = await create(client, input="hi", tools=[TIME])
        answer = [item for item in response["output"] if item["type"] != "reasoning"]
        result = {"type": "function_call_output", "call_id": answer[-1]["call_id"], "output": "noon"}
        again = await create(client, input=[{"role": "user", "content": "hi"}, *answer, result], tools=[TIME])
    assert again["usage"]["input_tokens"] == len("[u:hi][a:Well.][t:noon]>")  # text and call are one turn
    assert [item["status"] for item in answer] == ["completed"] * 2


async def test_a_stream_tells_the_same() -> None:
    async with serving(talking(CALL), BOTH) as client:
        events = await events_of(await client.post(URL, json={"input": "hi", "tools": [TIME], "stream": True}))
        whole = await create(client, input="hi", tools=[TIME])
    for event in events:
        if "response" in event:
            check(event["response"])
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]

    def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in items]

    assert events[-1]["type"] == "response.completed" and events[-1]["response"]["output"] == done
    assert without_ids(done) == without_ids(whole["output"])
    assert events[-1]["response"]["usage"] == whole["usage"]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("text", "kind"), [("Well", "message"), (CALL[:70], "function_call")])
async def test_the_item_that_is_cut_is_incomplete(text: str, kind: str, is_stream: bool) -> None:
    async with serving(talking(text, FinishReason.LENGTH), BOTH) as client:
        answer = await client.post(URL, json={"input": "hi", "tools": [TIME], "stream": is_stream})
        response = (await events_of(answer))[-1]["response"] if is_stream else await answer.json()
    assert check(response)["status"] == "incomplete" and response["completed_at"] is None
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    *before, last = response["output"]
    assert (last["type"], last["status"]) == (kind, "incomplete")
    assert all(item["status"] == "completed" for item in before)


def scored(text: str) -> Callable[[Any], list[Output]]:
    outputs = say(text, FinishReason.STOP)
    return lambda _: [
        output._replace(logprobs=(TokenLogprobs(output.token_ids[0], -0.5, ((65, -0.25),)),)) for output in outputs
    ]


@pytest.mark.parametrize("settings", [ApiSettings(), BOTH])
async def test_logprobs_of_the_text(settings: ApiSettings) -> None:
    text = "<think>hm</think>yes" if settings is BOTH else "yes"
    engine = FakeEngine(scored(text))
    body = {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    async with serving(engine, settings) as client:
        whole = await create(client, **body)
        events = await events_of(await client.post(URL, json={**body, "stream": True}))
        assert (await create(client, input="hi"))["output"][-1]["content"][0]["logprobs"] == []
    assert engine.requests[0].params.num_logprobs == 1 and engine.requests[2].params.num_logprobs is None
    logprobs = whole["output"][-1]["content"][0]["logprobs"]
    assert "".join(token["token"] for token in logprobs) == "yes"
    assert logprobs[0] == {
        "token": "y",
        "logprob": -0.5,
        "bytes": [121],
        "top_logprobs": [{"token": "A", "logprob": -0.25, "bytes": [65]}],
    }
    streamed = [
        token for event in events if event["type"].endswith("text.delta") for token in event.get("logprobs", [])
    ]
    assert streamed == logprobs == events[-1]["response"]["output"][-1]["content"][0]["logprobs"]


async def test_allowed_tools_are_all_that_may_be_called() -> None:
    engine = talking("x")
    other = {**TIME, "name": "other"}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "time"}]}
    in_chat = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"function": {"name": "time"}}]}}
    async with serving(engine, BOTH, template=ToolNames()) as client:
        response = await create(client, input="hi", tools=[TIME, other], tool_choice=choice)
        tools = [{"type": "function", "function": {"name": name}} for name in ("time", "other")]
        body = {"messages": [{"role": "user", "content": "hi"}], "tools": tools, "tool_choice": in_chat}
        assert (await client.post("/v1/chat/completions", json=body)).status == 200
        in_chat["allowed_tools"]["tools"].append({"function": {"name": "none"}})  # type: ignore[index]
        assert (await error_of(await client.post("/v1/chat/completions", json=body)))["param"] == "tool_choice"
    assert response["tool_choice"] == choice and len(response["tools"]) == 2
    assert [bytes(request.prompt_token_ids) for request in engine.requests] == [b"time"] * 2


class ToolNames:
    """A prompt of nothing but the tools."""

    def render(self, messages: object, tools: Any = None, add_generation_prompt: bool = True, **kwargs: Any) -> str:
        return ",".join(tool["function"]["name"] for tool in tools)


async def test_a_response_goes_on_with_another() -> None:
    engine = talking("yes")
    async with serving(engine) as client:
        first = await create(client, input="a", instructions="only once")
        events = await events_of(
            await client.post(URL, json={"input": "b", "previous_response_id": first["id"], "stream": True})
        )
        second = events[-1]["response"]
        count = await client.post(f"{URL}/input_tokens", json={"input": "c", "previous_response_id": second["id"]})
        assert (await count.json()) == {
            "object": "response.input_tokens",
            "input_tokens": len("[u:a][a:yes][u:b][a:yes][u:c]>"),
        }
        shown = await (await client.get(f"{URL}/{second['id']}")).json()
        items = await (await client.get(f"{URL}/{second['id']}/input_items?order=asc")).json()
        page = await (await client.get(f"{URL}/{second['id']}/input_items?limit=1")).json()
    assert second["previous_response_id"] == first["id"]
    assert bytes(engine.requests[1].prompt_token_ids) == b"[u:a][a:yes][u:b]>"
    assert check(shown) == second and shown["store"] is True
    assert [item["role"] for item in items["data"]] == ["user", "assistant", "user"] and not items["has_more"]
    assert page["data"] == items["data"][-1:] and page["has_more"]


@pytest.mark.parametrize("kind", [{"type": "item_reference"}, {}, {"type": None}])
async def test_an_item_may_be_referred_to(kind: dict[str, Any]) -> None:
    engine = talking(CALL)
    async with serving(engine, BOTH) as client:
        first = await create(client, input="a", tools=[TIME])
        text, call = (item for item in first["output"] if item["type"] != "reasoning")
        given = [
            {"role": "user", "content": "a"},
            *({**kind, "id": item["id"]} for item in (text, call)),
            {"type": "function_call_output", "call_id": call["call_id"], "output": "noon"},
        ]
        second = await create(client, input=given)
        items = await (await client.get(f"{URL}/{second['id']}/input_items?order=asc")).json()
        unknown = [{"type": "item_reference", "id": "msg_none_0"}]
        response = await client.post(URL, json={"input": unknown})
        error = await error_of(response)
    assert bytes(engine.requests[1].prompt_token_ids) == b"[u:a][a:Well.][t:noon]>"
    assert [item["type"] for item in items["data"]] == ["message", "message", "function_call", "function_call_output"]
    assert (response.status, error["param"]) == (404, "input[0]") and "msg_none_0" in error["message"]
    async with serving(engine, ApiSettings(max_response_bytes=0)) as client:
        error = await error_of(await client.post(URL, json={"input": unknown}))
    assert "stores none" in error["message"]


async def test_what_is_deleted_or_not_stored_is_not_found() -> None:
    async with serving(talking("yes")) as client:
        kept, unkept = await create(client, input="a"), await create(client, input="a", store=False)
        answer = await (await client.delete(f"{URL}/{kept['id']}")).json()
        assert answer == {"id": kept["id"], "object": "response", "deleted": True}
        for response in (kept, unkept):
            for method, path in (("GET", ""), ("GET", "/input_items"), ("DELETE", "")):
                assert (await client.request(method, f"{URL}/{response['id']}{path}")).status == 404
            body = {"input": "b", "previous_response_id": response["id"]}
            assert (await error_of(await client.post(URL, json=body)))["param"] == "previous_response_id"
    async with serving(talking("yes"), ApiSettings(max_response_bytes=0)) as client:
        assert (await create(client, input="a"))["store"] is False


async def test_responses_are_their_keys_alone() -> None:
    mine, yours = ({"Authorization": f"Bearer {key}"} for key in ("mine", "yours"))
    async with serving(talking("yes"), ApiSettings(api_keys=("mine", "yours"))) as client:
        response = await (await client.post(URL, json={"input": "a"}, headers=mine)).json()
        assert (await client.get(f"{URL}/{response['id']}", headers=mine)).status == 200
        assert (await client.get(f"{URL}/{response['id']}", headers=yours)).status == 404
