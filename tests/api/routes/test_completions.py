from __future__ import annotations

from typing import Any

import pytest
from api_fakes import BOS, MODEL, FakeEngine, error_of, events_of, say, serving

from kunserve.engine.request import Output
from kunserve.errors import EngineError, OverloadedError
from kunserve.sampling import FinishReason

URL = "/v1/completions"


async def post(engine: FakeEngine, **body: Any) -> dict[str, Any]:
    async with serving(engine) as client:
        response = await client.post(URL, json={"prompt": "hi", **body})
        assert response.status == 200, await response.text()
        answer: dict[str, Any] = await response.json()
        return answer


async def stream(engine: FakeEngine, **body: Any) -> list[Any]:
    async with serving(engine) as client:
        return await events_of(await client.post(URL, json={"prompt": "hi", "stream": True, **body}))


async def test_whole_answer() -> None:
    engine = FakeEngine(lambda _: [*say("abc", None), Output("", (2,), (), FinishReason.STOP, 2)])
    answer = await post(engine, model="org/tiny")
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 0
    choice = {"index": 0, "text": "abc", "logprobs": None, "finish_reason": "stop", "stop_reason": 2}
    usage = {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer == {"object": "text_completion", "model": "org/tiny", "choices": [choice], "usage": usage}
    assert engine.requests[0].prompt_token_ids == [BOS, ord("h"), ord("i")]
    assert engine.requests[0].params.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[BOS, 97, 98]]),
        (["a", "b"], [[BOS, 97], [BOS, 98]]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
async def test_prompt_forms(prompt: object, expected: list[list[int]]) -> None:
    engine = FakeEngine()
    answer = await post(engine, prompt=prompt)
    assert [request.prompt_token_ids for request in engine.requests] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_n_choices_are_seeded_apart_and_count_the_prompt_once() -> None:
    engine = FakeEngine(lambda request: say("x" * (1 + (request.params.seed or 0) % 10)))
    answer = await post(engine, prompt=["a", "b"], n=2, best_of=2, seed=7)
    assert [request.params.seed for request in engine.requests] == [7, 8, 7, 8]
    assert len({request.request_id for request in engine.requests}) == 4
    assert [len(choice["text"]) for choice in answer["choices"]] == [8, 9, 8, 9]
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 34,
        "total_tokens": 38,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_stream_is_one_chunk_per_token() -> None:
    events = await stream(FakeEngine(lambda _: say("abc")))
    assert [event["choices"][0]["text"] for event in events] == ["a", "b", "c"]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, "length"]
    assert len({event["id"] for event in events}) == 1
    assert all(event["object"] == "text_completion" and event["model"] == "tiny" for event in events)
    assert all("usage" not in event for event in events)


async def test_stream_text_survives_json() -> None:
    text = 'q"\\\n\u2028é漢🙂'
    events = await stream(FakeEngine(lambda _: [Output(text, (3,), (), FinishReason.STOP, "</s>")]))
    assert events[0]["choices"][0]["text"] == text
    assert events[0]["choices"][0]["stop_reason"] == "</s>"


async def test_coalesced_delta_is_one_chunk() -> None:
    outputs = [Output("abc", (97, 98, 99)), Output("d", (100,), (), FinishReason.LENGTH)]
    events = await stream(FakeEngine(lambda _: outputs), stream_options={"include_usage": True})
    assert [event["choices"][0]["text"] for event in events[:2]] == ["abc", "d"]
    assert events[2]["usage"]["completion_tokens"] == 4


async def test_usage_comes_last_when_asked_for() -> None:
    events = await stream(FakeEngine(), stream_options={"include_usage": True})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert [event["usage"] for event in events[:-1]] == [None, None]


async def test_continuous_usage() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await stream(FakeEngine(), stream_options=options)
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 2]


async def test_stream_of_several_choices() -> None:
    engine = FakeEngine(lambda request: say("x" * request.prompt_token_ids[0]))
    events = await stream(engine, prompt=[[1], [3], [2]], stream_options={"include_usage": True})
    counts = [sum(e["choices"][0]["index"] == i for e in events[:-1]) for i in range(3)]
    assert counts == [1, 3, 2]
    assert events[-1]["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 6,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_echo() -> None:
    answer = await post(FakeEngine(), prompt=["hi", "yo"], echo=True)
    assert [choice["text"] for choice in answer["choices"]] == ["hiok", "yook"]
    events = await stream(FakeEngine(), prompt=[104, 105], echo=True)
    assert [event["choices"][0]["text"] for event in events] == ["hi", "o", "k"]


async def test_echo_of_a_truncated_prompt_is_what_is_left() -> None:
    engine = FakeEngine()
    answer = await post(engine, prompt="hello", echo=True, truncate_prompt_tokens=2)
    assert engine.requests[0].prompt_token_ids == [ord("l"), ord("o")]
    assert answer["choices"][0]["text"] == "look"


async def test_the_beginning_is_left_if_the_right_side_is_cut_off() -> None:
    engine = FakeEngine()
    more = {"truncate_prompt_tokens": 3, "truncation_side": "right"}
    answer = await post(engine, prompt="hello", echo=True, logprobs=0, **more)
    assert engine.requests[0].prompt_token_ids == [BOS, ord("h"), ord("e")]
    assert answer["choices"][0]["text"] == chr(BOS) + "heok"
    await post(engine, prompt=[5, 6, 7], truncate_prompt_tokens=2, truncation_side="left")
    assert engine.requests[1].prompt_token_ids == [6, 7]


async def test_return_token_ids() -> None:
    answer = await post(FakeEngine(), return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == [ord("o"), ord("k")]
    assert answer["choices"][0]["prompt_token_ids"] == [BOS, ord("h"), ord("i")]
    events = await stream(FakeEngine(), return_token_ids=True)
    assert events[0]["choices"][0]["prompt_token_ids"] == [BOS, ord("h"), ord("i")]
    assert [event["choices"][0]["token_ids"] for event in events] == [[], [ord("o")], [ord("k")]]


async def test_what_benchmark_clients_send_is_accepted() -> None:
    engine = FakeEngine()
    await post(engine, best_of=1, logprobs=None, repetition_penalty=1.0, ignore_eos=True, user="u", other={})
    assert engine.requests[0].params.ignore_eos


async def test_request_ids() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        for _ in range(2):  # the same id twice is the client's business, not the engine's
            response = await client.post(URL, json={"prompt": "hi"}, headers={"X-Request-ID": "mine"})
            assert response.headers["X-Request-ID"] == "mine"
            assert (await response.json())["id"] == "cmpl-mine"
        response = await client.post(URL, json={"prompt": "hi", "request_id": "body"})
        assert (await response.json())["id"] == "cmpl-body"
        assert response.headers["X-Request-ID"] == "body"
        response = await client.post(URL, json={"prompt": "hi"}, headers={"X-Request-ID": "not one word"})
        assert (await response.json())["id"] == f"cmpl-{response.headers['X-Request-ID']}"
        assert " " not in response.headers["X-Request-ID"]
    assert len({request.request_id for request in engine.requests}) == 4


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": 5}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [[]]}, 400, "prompt"),
        ({"prompt": ["a", 1]}, 400, "prompt"),
        ({"prompt": [True]}, 400, "prompt"),
        ({"prompt": [128]}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": "x" * 64}, 400, "prompt"),
        ({"prompt": [5] * 1000}, 400, "prompt"),
        ({"prompt": ["x"] * 2049}, 400, "prompt"),
        ({"prompt": "x" * 40, "max_tokens": 40}, 400, "max_tokens"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"min_tokens": 17}, 400, "min_tokens"),
        ({"model": "other"}, 404, "model"),
        ({"suffix": "x"}, 400, "suffix"),
        ({"prompt_embeds": "AAAA"}, 400, "prompt_embeds"),
        ({"echo": False, "max_tokens": 0}, 400, "max_tokens"),
        ({"stream": True, "prompt_logprobs": 0}, 400, "prompt_logprobs"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ],
)
async def test_bad_requests_never_reach_the_engine(body: dict[str, Any], status: int, param: str) -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        response = await client.post(URL, json={"prompt": "hi", **body})
        error = await error_of(response)
    assert (response.status, error["param"]) == (status, param)
    assert param in error["message"]
    assert engine.requests == []


async def test_extras_that_reach_the_engine() -> None:
    engine = FakeEngine()
    await post(engine, add_special_tokens=False, include_stop_str_in_output=True, stop=["x"], min_tokens=2)
    [request] = engine.requests
    assert request.prompt_token_ids == [ord("h"), ord("i")]
    assert request.params.include_stop_str_in_output and request.params.stop == ("x",)
    assert request.params.min_tokens == 2


async def test_usage_only_when_asked_for() -> None:
    """Clients look into `choices[0]` of every chunk; statistics of their own do not bring the last one."""
    for options in (None, {}, {"include_usage": False}, {"continuous_usage_stats": True}):
        events = await stream(FakeEngine(), stream_options=options)
        assert all(event["choices"] and "usage" not in event for event in events)


async def test_default_max_tokens_is_cut_to_what_fits() -> None:
    engine = FakeEngine()
    await post(engine, prompt=[5] * (MODEL.max_model_len - 3))
    assert engine.requests[0].params.max_tokens == 3


async def test_overload_says_when_to_come_back() -> None:
    engine = FakeEngine()
    engine.refusal = OverloadedError("the queue is full", retry_after_s=7)
    async with serving(engine) as client:
        for body in ({"prompt": "hi"}, {"prompt": "hi", "stream": True}):
            response = await client.post(URL, json=body)
            error = await error_of(response)
            assert (response.status, response.headers["Retry-After"]) == (503, "7")
            assert error["type"] == "ServiceUnavailableError"


async def test_failed_step() -> None:
    engine = FakeEngine(lambda _: [*say("a", None), EngineError("cpu:1 is gone")])
    async with serving(engine) as client:
        error = await error_of(await client.post(URL, json={"prompt": "hi"}))
        assert (error["code"], error["message"]) == (500, "cpu:1 is gone")
    events = await stream(engine)
    assert events[0]["choices"][0]["text"] == "a"
    assert events[1] == {
        "error": {"message": "cpu:1 is gone", "type": "InternalServerError", "param": None, "code": 500}
    }


async def test_unexpected_failure_tells_no_secrets() -> None:
    engine = FakeEngine(lambda _: [*say("a", None), RuntimeError("secret")])
    events = await stream(engine)
    assert events[1]["error"]["code"] == 500
    assert "secret" not in str(events)


async def test_one_failed_choice_ends_the_others() -> None:
    def script(request: Any) -> list[Any]:
        return [EngineError("boom")] if request.prompt_token_ids == [1] else say("a", None)

    engine = FakeEngine(script)
    async with serving(engine) as client:
        await error_of(await client.post(URL, json={"prompt": [[1], [2]]}))
    ended = {engine.aborted.get_nowait() for _ in range(engine.aborted.qsize())}
    assert ended == {request.request_id for request in engine.requests}


async def test_bad_words_and_allowed_tokens_reach_the_engine() -> None:
    engine = FakeEngine()
    await post(engine, bad_words=["no"], allowed_token_ids=[5, 6, 5])
    params = engine.requests[0].params
    assert params.bad_words == ((110, 111), (32, 110, 111))
    assert params.allowed_token_ids == (5, 6)
