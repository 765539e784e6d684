from __future__ import annotations

from typing import Any

import pytest
from anthropic import AsyncAnthropic, AuthenticationError, BadRequestError
from anthropic import InternalServerError as ServerError
from api_fakes import FakeEngine, say, serving

from kunserve.api.wire.backend import ApiSettings
from kunserve.engine.request import Output
from kunserve.errors import EngineError, OverloadedError
from kunserve.sampling import FinishReason

URL = "/v1/messages"
HI: list[Any] = [{"role": "user", "content": "hi"}]
CALL = '<think>hm</think>Well.<tool_call>{"name": "time", "arguments": {"zone": "UTC"}}</tool_call>'
BOTH = ApiSettings(tool_call_parser="hermes", reasoning_parser="qwen3")
TIME: Any = {"name": "time", "description": "d", "input_schema": {"type": "object"}}


def talking(text: str, reason: FinishReason = FinishReason.STOP) -> FakeEngine:
    return FakeEngine(lambda _: say(text, reason))


async def post(engine: FakeEngine, **body: Any) -> dict[str, Any]:
    async with serving(engine, BOTH) as client:
        response = await client.post(URL, json={"messages": HI, "max_tokens": 20, **body})
        assert response.status == 200, await response.text()
        answer: dict[str, Any] = await response.json()
        return answer


async def test_whole_answer() -> None:
    engine = talking("yes")
    answer = await post(engine, system="be brief", top_k=5)
    assert bytes(engine.requests[0].prompt_token_ids) == b"[s:be brief][u:hi]>True"[:-4]
    assert (engine.requests[0].params.max_tokens, engine.requests[0].params.top_k) == (20, 5)
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "yes"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 19,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 3,
        },
    }


async def test_reasons_to_stop() -> None:
    assert (await post(talking("x", FinishReason.LENGTH)))["stop_reason"] == "max_tokens"
    engine = FakeEngine(lambda _: [Output("x", (1,), (), FinishReason.STOP, "END")])
    answer = await post(engine, stop_sequences=["END"])
    assert engine.requests[0].params.stop == ("END",)
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "END")
    answer = await post(talking(CALL), tools=[TIME])
    assert answer["stop_reason"] == "tool_use"
    assert [block["type"] for block in answer["content"]] == ["thinking", "text", "tool_use"]
    assert answer["content"][2]["input"] == {"zone": "UTC"}


async def test_blocks_of_the_input() -> None:
    engine = talking("x")
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": ""},
                {"type": "text", "text": "w"},
                {"type": "tool_use", "id": "c", "name": "time", "input": {"zone": "UTC"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "noon"}]},
                {"type": "text", "text": "and?"},
            ],
        },
    ]
    await post(engine, messages=messages, system=[{"type": "text", "text": "s"}])
    assert bytes(engine.requests[0].prompt_token_ids) == b"[s:s][u:q\nr][a:w][t:noon][u:and?]>"


async def test_thinking_is_for_the_template() -> None:
    engine = talking("x")
    await post(engine, thinking={"type": "disabled"})
    await post(engine, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [bytes(request.prompt_token_ids) for request in engine.requests] == [b"[u:hi]False>", b"[u:hi]True>"]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
        ({"system": 5}, "system"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0]"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"temperature": 3.5, "top_p": 7}, "top_p"),
        ({"tools": [{"name": "f", "input_schema": "no"}]}, "`tools[0].input_schema` must be an object"),
        ({"tools": [{"name": "f g"}]}, "`tools[0].name`"),
        ({"tools": [{"name": "f", "input_schema": {"$defs": 5}}]}, "`tools[0].input_schema.$defs`"),
        ({"stop_sequences": ["a", ""]}, "`stop_sequences[1]`"),
        ({"stop_sequences": ["a", 5]}, "`stop_sequences[1]`"),
        ({"system": "s", "messages": [{"role": "user", "content": 5}]}, "`messages[0].content`"),
        ({"system": [{"type": "text", "text": 5}]}, "`system[0].text`"),
        ({"system": [{"type": "image"}]}, "`system[0]`"),
        ({"metadata": {"user_id": 5}}, "`metadata.user_id`"),
        ({"tool_choice": {"type": "required"}}, "`tool_choice.type` must be auto, any, tool or none"),
        ({"tool_choice": {"type": "tool", "name": "g"}, "tools": [TIME]}, "`tool_choice`"),
        ({"output_config": {"format": {"type": "json_schema", "schema": 5}}}, "`output_config.format.schema`"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {}}}}, "`output_config.format`"),
        ({"max_tokens": 60}, "`max_tokens`"),
    ],
)
async def test_bad_requests(body: dict[str, Any], word: str) -> None:
    engine = FakeEngine()
    async with serving(engine, BOTH) as client:
        response = await client.post(URL, json={"messages": HI, "max_tokens": 20, **body})
        error = await response.json()
    assert response.status == 400
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert word in error["error"]["message"]
    assert engine.requests == []


@pytest.mark.parametrize("thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}])
async def test_a_thread_is_refused_in_the_words_by_which_clients_send_all_messages_instead(thread: Any) -> None:
    async with serving(FakeEngine(), BOTH) as client:
        response = await client.post(URL, json={"messages": HI, "max_tokens": 20, "thread": thread})
        error = (await response.json())["error"]
    assert (response.status, error["type"]) == (400, "invalid_request_error")
    assert error["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


async def test_the_anthropic_client_is_happy() -> None:
    async with (
        serving(talking(CALL), BOTH) as server,
        AsyncAnthropic(base_url=str(server.make_url("/")), api_key="none", max_retries=0) as client,
    ):
        message = await client.messages.create(model="tiny", max_tokens=20, messages=HI, tools=[TIME])
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
        count = await client.messages.count_tokens(model="tiny", messages=HI)
        assert count.input_tokens == 7
        async with client.messages.stream(model="tiny", max_tokens=20, messages=HI, tools=[TIME]) as stream:
            text = "".join([text async for text in stream.text_stream])
            final = await stream.get_final_message()
        assert text == "Well." and final.stop_reason == "tool_use"
        call = final.content[-1]
        assert call.type == "tool_use" and call.input == {"zone": "UTC"}
        assert final.usage.output_tokens == len(CALL)
        with pytest.raises(BadRequestError, match="temperature"):
            await client.messages.create(model="tiny", max_tokens=2, messages=HI, extra_body={"temperature": -1})


async def test_errors_in_anthropic_words() -> None:
    engine = FakeEngine(lambda _: [*say("a", None), EngineError("cpu:1 is gone")])
    settings = ApiSettings(api_keys=("right",))
    async with serving(engine, settings) as server:
        url = str(server.make_url("/"))
        headers = {"anthropic-version": "2023-06-01", "x-api-key": "right"}
        for method, path, status in (("GET", "/v1/messages/x", 404), ("GET", URL, 405), ("GET", "/v1/models/x", 404)):
            answer = await server.request(method, path, headers=headers)
            error = await answer.json()
            assert (answer.status, error["type"]) == (status, "error")
            assert error["request_id"] == answer.headers["X-Request-ID"]
        async with AsyncAnthropic(base_url=url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(AuthenticationError, match="authentication_error"):
                await client.messages.create(model="tiny", max_tokens=2, messages=HI)
        async with AsyncAnthropic(base_url=url, api_key="right", max_retries=0) as client:
            with pytest.raises(ServerError, match="cpu:1 is gone"):
                await client.messages.create(model="tiny", max_tokens=2, messages=HI)
            engine.refusal = OverloadedError("full", retry_after_s=3)
            with pytest.raises(ServerError, match="overloaded_error") as caught:
                await client.messages.create(model="tiny", max_tokens=2, messages=HI)
            assert caught.value.response.headers["Retry-After"] == "3"


@pytest.mark.parametrize("begun", ["The capital is", "{", "It is ", "|"])
async def test_the_answer_goes_on_where_the_client_began_it(begun: str) -> None:
    engine = talking("x")
    for content in (begun, [{"type": "text", "text": begun}]):
        await post(engine, messages=[*HI, {"role": "assistant", "content": content}])
        assert bytes(engine.requests[-1].prompt_token_ids).decode() == f"[u:hi][a:{begun}"
    async with serving(engine) as client:
        body = {"messages": [*HI, {"role": "assistant", "content": begun}]}
        count = await (await client.post(f"{URL}/count_tokens", json=body)).json()
    assert count["input_tokens"] == len(f"[u:hi][a:{begun}")


async def test_models_in_anthropics_form() -> None:
    async with (
        serving(FakeEngine()) as server,
        AsyncAnthropic(base_url=str(server.make_url("/")), api_key="none", max_retries=0) as client,
    ):
        models = await client.models.list()
        assert [(model.type, model.id, model.display_name) for model in models.data] == [
            ("model", "tiny", "tiny"),
            ("model", "org/tiny", "org/tiny"),
        ]
        assert (await client.models.retrieve("org/tiny")).created_at.timestamp() == 1234
