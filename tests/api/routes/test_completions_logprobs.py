"""POST /v1/completions: log-probabilities, of what was generated and of the prompt."""

from __future__ import annotations

from typing import Any

import pytest
from api_fakes import BOS, CharTokenizer, FakeEngine, serving
from test_completions import post, stream

from kunserve.engine.request import Output
from kunserve.sampling import FinishReason, TokenLogprobs


async def test_logprobs() -> None:
    entries = (TokenLogprobs(97, -0.5, ((98, -0.25), (97, -0.5))), TokenLogprobs(99, -3.0, ((98, -0.1),)))
    engine = FakeEngine(lambda _: [Output("ac", (97, 99), entries, FinishReason.LENGTH)])
    answer = await post(engine, logprobs=2)
    assert engine.requests[0].params.num_logprobs == 2
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a", "c"],
        "token_logprobs": [-0.5, -3.0],
        "top_logprobs": [{"a": -0.5, "b": -0.25}, {"c": -3.0, "b": -0.1}],
        "text_offset": [0, 1],
    }


class HalfTokenizer(CharTokenizer):
    """Tokens 3 and 4 are the first bytes of longer characters."""

    def token_bytes(self, token_id: int) -> bytes:
        return {3: b"\xe2\x82", 4: b"\xf0"}.get(token_id) or super().token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")


HALVES = (TokenLogprobs(3, -0.5, ((4, -1.0), (97, -2.0))),)


@pytest.mark.parametrize(
    ("more", "names"),
    [({}, (r"bytes:\xe2\x82", r"bytes:\xf0", "a")), ({"return_tokens_as_token_ids": True}, ("3", "4", "97"))],
)
async def test_logprobs_of_half_characters_stay_apart(more: dict[str, Any], names: tuple[str, ...]) -> None:
    names = tuple(name if not more else f"token_id:{name}" for name in names)
    engine = FakeEngine(lambda _: [Output("", (3,), HALVES, FinishReason.LENGTH)])
    async with serving(engine, tokenizer=HalfTokenizer()) as client:
        body = {"prompt": "x", "logprobs": 2, **more}
        logprobs = (await (await client.post("/v1/completions", json=body)).json())["choices"][0]["logprobs"]
        body = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2, **more}
        [chat] = (await (await client.post("/v1/chat/completions", json=body)).json())["choices"][0]["logprobs"][
            "content"
        ]
    assert logprobs["tokens"] == [names[0]]
    assert logprobs["top_logprobs"] == [dict(zip(names, (-0.5, -1.0, -2.0), strict=True))]
    assert chat["bytes"] == [0xE2, 0x82] and [top["bytes"] for top in chat["top_logprobs"]] == [[0xF0], [97]]


async def test_stream_logprobs_offsets_go_on() -> None:
    outputs = [
        Output("", (97,), (TokenLogprobs(97, -1.0, ()),)),  # held back: a stop string may begin like that
        Output("ab", (98,), (TokenLogprobs(98, -1.0, ()),)),
        Output("c", (99,), (TokenLogprobs(99, -2.0, ()),), FinishReason.LENGTH),
    ]
    events = await stream(FakeEngine(lambda _: outputs), logprobs=0)
    assert [event["choices"][0]["logprobs"]["text_offset"] for event in events] == [[0], [1], [2]]


SCORES = (TokenLogprobs(104, -1.0, ((5, -0.5),), 2), TokenLogprobs(105, -2.0, ((6, -0.25),), 7))


def scoring(_: Any) -> list[Output]:
    """A prompt of BOS, h, i."""
    return [Output("o", (111,), (TokenLogprobs(111, -3.0, ((7, -0.1),)),), FinishReason.LENGTH, None, SCORES)]


async def test_echo_with_logprobs() -> None:
    answer = await post(FakeEngine(scoring), echo=True, logprobs=1, max_tokens=1)
    choice = answer["choices"][0]
    assert choice["text"] == "hio"
    assert choice["logprobs"] == {
        "tokens": [chr(BOS), "h", "i", "o"],
        "token_logprobs": [None, -1.0, -2.0, -3.0],
        "top_logprobs": [None, {"h": -1.0, chr(5): -0.5}, {"i": -2.0, chr(6): -0.25}, {"o": -3.0, chr(7): -0.1}],
        "text_offset": [0, 0, 1, 2],  # the text does not show the token that begins it
    }
    events = await stream(FakeEngine(scoring), echo=True, logprobs=1, max_tokens=1)
    assert events[0]["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    assert events[1]["choices"][0]["logprobs"]["token_logprobs"] == [-3.0]


async def test_echo_of_nothing_but_the_prompt() -> None:
    engine = FakeEngine(scoring)
    answer = await post(engine, echo=True, logprobs=0, max_tokens=0)
    assert engine.requests[0].params.max_tokens == 1
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hi", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    assert choice["logprobs"]["top_logprobs"] == [None, {"h": -1.0}, {"i": -2.0}]
    assert answer["usage"]["completion_tokens"] == 0
    events = await stream(FakeEngine(scoring), echo=True, max_tokens=0, stream_options={"include_usage": True})
    assert [event["choices"][0]["text"] for event in events[:-1]] == ["hi", ""]
    assert events[-1]["usage"]["completion_tokens"] == 0


async def test_prompt_logprobs() -> None:
    engine = FakeEngine(scoring)
    answer = await post(engine, prompt_logprobs=1)
    assert engine.requests[0].params.num_prompt_logprobs == 1
    assert answer["choices"][0]["prompt_logprobs"] == [
        None,
        {
            "104": {"logprob": -1.0, "rank": 2, "decoded_token": "h"},
            "5": {"logprob": -0.5, "rank": 1, "decoded_token": "\x05"},
        },
        {
            "105": {"logprob": -2.0, "rank": 7, "decoded_token": "i"},
            "6": {"logprob": -0.25, "rank": 1, "decoded_token": "\x06"},
        },
    ]
