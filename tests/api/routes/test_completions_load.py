"""POST /v1/completions: what is long is tokenized and written off the event loop, or refused before."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from api_fakes import CharTokenizer, FakeEngine, Script, error_of, events_of, serving
from test_completions import URL

from kunserve.engine.request import Output
from kunserve.sampling import FinishReason, TokenLogprobs


class LateTokenizer(CharTokenizer):
    """Remembers which threads it worked on."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.threads.append(threading.current_thread().name)
        return super().encode(text[:4], add_special_tokens)


async def test_large_text_is_tokenized_off_the_event_loop() -> None:
    tokenizer = LateTokenizer()
    async with serving(FakeEngine(), tokenizer=tokenizer) as client:
        for prompt in ("short", "long" * 3000):
            response = await client.post(URL, json={"prompt": prompt})
            assert response.status == 200
    assert tokenizer.threads[0] == "MainThread"
    assert tokenizer.threads[1].startswith("tokenizer")


class WatchedTokenizer(CharTokenizer):
    """Remembers which threads it named tokens on and made text on."""

    def __init__(self) -> None:
        self.named: list[str] = []
        self.decoded: list[str] = []

    def token_text(self, token_id: int) -> str:
        self.named.append(threading.current_thread().name.split("_")[0])
        return super().token_text(token_id)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.decoded.append(threading.current_thread().name.split("_")[0])
        return super().decode(ids, skip_special_tokens)


def saying(outputs: list[Output]) -> Script:
    return lambda _: outputs


def scored(num: int, num_prompt: int) -> Output:
    entry = TokenLogprobs(97, -0.5, tuple((i, -1.0) for i in range(20)), 1)
    return Output("a" * num, (97,) * num, (entry,) * num, FinishReason.LENGTH, None, (entry,) * (num_prompt - 1))


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (URL, {"logprobs": 20}),
        (URL, {"prompt_logprobs": 20}),
        (URL, {"echo": True, "logprobs": 20}),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 20}),
    ],
)
async def test_many_logprobs_are_written_off_the_event_loop(url: str, body: dict[str, Any]) -> None:
    for num, num_prompt, thread in ((30, 30, "tokenizer"), (1, 2, "MainThread")):
        tokenizer = WatchedTokenizer()
        outputs = [scored(num, num_prompt)]
        async with serving(FakeEngine(saying(outputs)), tokenizer=tokenizer) as client:
            given = {"prompt": [97] * num_prompt} if url == URL else {"messages": [{"role": "user", "content": "x"}]}
            response = await client.post(url, json={**given, **body, "max_tokens": num})
            assert response.status == 200, await response.text()
        assert set(tokenizer.named) == {thread}


async def test_an_echo_with_many_logprobs_is_written_off_the_event_loop() -> None:
    tokenizer = WatchedTokenizer()
    async with serving(FakeEngine(lambda _: [scored(1, 30)]), tokenizer=tokenizer) as client:
        body = {"prompt": [97] * 30, "echo": True, "logprobs": 20, "stream": True}
        events = await events_of(await client.post(URL, json=body))
    assert [len(event["choices"][0]["logprobs"]["tokens"]) for event in events] == [30, 1]
    is_chunk = [thread == "MainThread" for thread in tokenizer.named]
    assert is_chunk == sorted(is_chunk) and 0 < sum(is_chunk) < 50  # the opening, then one token


async def test_long_echoes_are_made_off_the_event_loop() -> None:
    for num, thread in ((10, "MainThread"), (40, "tokenizer")):
        tokenizer = WatchedTokenizer()
        async with serving(FakeEngine(), tokenizer=tokenizer) as client:
            body = {"prompt": [[97] * 50] * num, "echo": True, "max_tokens": 1}
            answer = await (await client.post(URL, json=body)).json()
        assert answer["choices"][0]["text"] == "a" * 50 + "ok"
        assert tokenizer.decoded == [thread] * num


async def test_text_that_cannot_fit_is_not_tokenized() -> None:
    tokenizer = LateTokenizer()
    async with serving(FakeEngine(), tokenizer=tokenizer) as client:
        error = await error_of(await client.post(URL, json={"prompt": "x" * 256 * 65}))
    assert error["code"] == 400
    assert tokenizer.threads == []
