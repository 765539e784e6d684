from __future__ import annotations

from typing import Any

import pytest
from api_fakes import MODEL, FakeEngine, error_of, events_of, say, serving
from openai import AsyncOpenAI, NotFoundError

from kunserve.api.wire.backend import ApiSettings, TokenIdsOnly
from kunserve.engine.request import Output
from kunserve.sampling import FinishReason, TokenLogprobs

URL = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def text_of(prompt: list[int]) -> str:
    return "".join(map(chr, prompt))


async def post(engine: FakeEngine, **body: Any) -> dict[str, Any]:
    async with serving(engine) as client:
        response = await client.post(URL, json={"messages": HI, **body})
        assert response.status == 200, await response.text()
        answer: dict[str, Any] = await response.json()
        return answer


async def stream(engine: FakeEngine, **body: Any) -> list[Any]:
    async with serving(engine) as client:
        return await events_of(await client.post(URL, json={"messages": HI, "stream": True, **body}))


async def test_whole_answer() -> None:
    engine = FakeEngine(lambda _: say("yes", FinishReason.STOP))
    answer = await post(engine)
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 0
    message = {"role": "assistant", "content": "yes"}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    usage = {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer == {"object": "chat.completion", "model": "tiny", "choices": [choice], "usage": usage}
    [request] = engine.requests
    assert text_of(request.prompt_token_ids) == "[u:hi]>"  # and no BOS: that is the template's business
    assert request.params.max_tokens == MODEL.max_model_len - 7


async def test_parts_content_and_template_arguments() -> None:
    engine = FakeEngine()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
    extra = {"chat_template_kwargs": {"thinking": "T"}, "add_generation_prompt": False}
    await post(engine, messages=messages, **extra)
    assert text_of(engine.requests[0].prompt_token_ids) == "[s:s][u:a\nb]T"


async def test_stream() -> None:
    events = await stream(FakeEngine())
    assert all(event["object"] == "chat.completion.chunk" for event in events)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "o"}, {"content": "k"}]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, "length"]


async def test_each_choice_of_a_stream_has_its_role() -> None:
    events = await stream(FakeEngine(), n=3)
    roles = [e["choices"][0]["index"] for e in events if "role" in e["choices"][0]["delta"]]
    assert sorted(roles) == [0, 1, 2]


async def test_max_completion_tokens_goes_before_max_tokens() -> None:
    engine = FakeEngine()
    await post(engine, max_tokens=3, max_completion_tokens=5)
    assert engine.requests[0].params.max_tokens == 5


async def test_logprobs() -> None:
    entry = TokenLogprobs(97, -0.5, ((98, -0.25),))
    engine = FakeEngine(lambda _: [Output("a", (97,), (entry,), FinishReason.LENGTH)])
    other = {"token": "b", "logprob": -0.25, "bytes": [98]}
    content = [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [other]}]
    answer = await post(engine, logprobs=True, top_logprobs=1)
    assert engine.requests[0].params.num_logprobs == 1
    assert answer["choices"][0]["logprobs"] == {"content": content}
    events = await stream(engine, logprobs=True, top_logprobs=1)
    assert events[1]["choices"][0]["logprobs"] == {"content": content}


async def test_return_token_ids() -> None:
    prompt = [ord(c) for c in "[u:hi]>"]
    answer = await post(FakeEngine(), return_token_ids=True)
    assert answer["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == [ord("o"), ord("k")]
    events = await stream(FakeEngine(), return_token_ids=True)
    assert events[0]["prompt_token_ids"] == prompt
    assert [event["choices"][0]["token_ids"] for event in events[1:]] == [[ord("o")], [ord("k")]]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"messages": None}, 400, "messages"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "alien", "content": ""}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 80}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": ""}] * 65}, 400, "messages"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs"),
    ],
)
async def test_bad_requests_never_reach_the_engine(body: dict[str, Any], status: int, param: str) -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        response = await client.post(URL, json={"messages": HI, **body})
        error = await error_of(response)
    assert (response.status, error["param"]) == (status, param)
    assert engine.requests == []


async def test_tools_without_calling_them_are_for_the_template() -> None:
    engine = FakeEngine()
    await post(engine, tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="none")
    assert len(engine.requests) == 1


async def test_a_model_without_tokenizer() -> None:
    engine = FakeEngine()
    async with serving(engine, tokenizer=TokenIdsOnly(128)) as client:
        for url, body in ((URL, {"messages": HI}), ("/v1/completions", {"prompt": "hi"})):
            error = await error_of(await client.post(url, json=body))
            assert (error["code"], "token ids" in error["message"]) == (400, True)
        response = await client.post("/v1/completions", json={"prompt": [1, 2]})
        assert response.status == 200


async def test_a_model_without_chat_template() -> None:
    async with serving(FakeEngine(), template=None) as client:
        error = await error_of(await client.post(URL, json={"messages": HI}))
        assert (error["code"], error["param"]) == (400, "messages")


async def test_the_openai_client_is_happy() -> None:
    async with (
        serving(FakeEngine()) as server,
        AsyncOpenAI(base_url=str(server.make_url("/v1")), api_key="none", max_retries=0) as client,
    ):
        assert [model.id async for model in client.models.list()] == list(MODEL.served_names)
        answer = await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
        assert answer.choices[0].message.content == "ok"
        chunks = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage = "", None
        async for chunk in chunks:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage
        assert (text, usage and usage.completion_tokens) == ("ok", 2)
        completion = await client.completions.create(model="tiny", prompt=["a", "b"], logprobs=0)
        assert [choice.text for choice in completion.choices] == ["ok", "ok"]
        with pytest.raises(NotFoundError, match="does not exist"):
            await client.completions.create(model="gpt", prompt="x")


@pytest.mark.parametrize(
    ("parser", "text", "num_tokens"),
    [
        ("qwen3", "<think>hm</think>yes", len("<think>hm</think>")),
        ("qwen3", "yes", 0),
        ("qwen3", "<thin ice", 0),
        ("qwen3", "<think>never", len("<think>never")),
        ("deepseek_r1", "hm</think>yes", len("hm</think>")),
    ],
)
async def test_reasoning_tokens_are_counted_streamed_or_not(parser: str, text: str, num_tokens: int) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    async with serving(FakeEngine(lambda _: say(text)), ApiSettings(reasoning_parser=parser)) as client:
        answer = await (await client.post(URL, json=body)).json()
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        events = await events_of(await client.post(URL, json=asked))
    for usage in (answer["usage"], events[-1]["usage"]):
        assert usage["completion_tokens_details"] == {"reasoning_tokens": num_tokens}
        assert usage["completion_tokens"] == len(text)


@pytest.mark.parametrize(("path", "asked"), [(URL, "messages"), ("/v1/completions", "prompt")])
async def test_continuous_usage_is_on_every_chunk(path: str, asked: str) -> None:
    call = '<think>hm</think>Well.<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    settings = ApiSettings(tool_call_parser="hermes", reasoning_parser="qwen3")
    tool = {"type": "function", "function": {"name": "f"}}
    text = "hi" if asked == "prompt" else [{"role": "user", "content": "hi"}]
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with serving(FakeEngine(lambda _: say(call)), settings) as client:
        for more in ({}, {"tools": [tool]} if asked == "messages" else {"echo": True}):
            body = {asked: text, "stream": True, "stream_options": options, **more}
            events = await events_of(await client.post(path, json=body))
            counts = [event["usage"]["completion_tokens"] for event in events]
            assert counts == sorted(counts) and counts[-1] == len(call)
            assert all(event["usage"]["prompt_tokens"] > 0 for event in events)
