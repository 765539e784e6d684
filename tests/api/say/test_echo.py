"""Offsets of tokens are places in the text that was sent: streamed or not, echoed or generated."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from api_fakes import Client, FakeEngine, events_of, serving
from seeds import seeds
from tiny_models import BOS, EOS, save_tiny_tokenizer

from kunserve.api.wire.backend import ModelInfo
from kunserve.engine.request import Output, Request
from kunserve.engine.text.detokenizer import Detokenizer
from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.sampling import FinishReason, TokenLogprobs

URL = "/v1/completions"
MODEL = ModelInfo(served_names=("tiny",), max_model_len=4096, root="/", created=1)
WORDS = ("the ", "nothing ", "fox", "é", "界", "😀", "👩‍👩‍👧", "\n", "a😀b", "over")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(folder)
    return Tokenizer(folder)


def random_text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(WORDS, k=length))


def saying(tokenizer: Tokenizer, ids: list[int]) -> Callable[[Request], Iterator[Output]]:
    """What the engine's own detokenizer makes of these tokens, until a stop string or the last one."""

    def script(request: Request) -> Iterator[Output]:
        detokenizer = Detokenizer(tokenizer, request.params, request.prompt_token_ids)
        scores = tuple(TokenLogprobs(i, -1.0, ()) for i in request.prompt_token_ids[1:])
        for i, token_id in enumerate(ids):
            text, is_last = detokenizer.push(token_id), i == len(ids) - 1
            text += detokenizer.flush() if is_last else ""
            reason = FinishReason.STOP if detokenizer.stopped is not None else FinishReason.LENGTH if is_last else None
            yield Output(
                text, (token_id,), (TokenLogprobs(token_id, -1.0, ()),), reason, None, scores if i == 0 else ()
            )
            if reason is not None:
                return

    return script


async def both(client: Client, **body: Any) -> tuple[str, list[str], list[int]]:
    """Text, tokens and offsets of an answer, which are the same streamed and not."""
    answer = await (await client.post(URL, json={"logprobs": 0, **body})).json()
    [choice] = answer["choices"]
    chunks = await events_of(await client.post(URL, json={"logprobs": 0, "stream": True, **body}))
    chunks = [chunk["choices"][0] for chunk in chunks]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    for name in ("text_offset", "tokens"):
        streamed = [item for chunk in chunks if chunk["logprobs"] for item in chunk["logprobs"][name]]
        assert streamed == choice["logprobs"][name]
    return choice["text"], choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]


def check(text: str, tokens: list[str], offsets: list[int], hidden: frozenset[str]) -> None:
    """Every token that is whole text stands where its offset says; the others begin inside the text or at its end."""
    assert offsets == sorted(offsets)
    for token, offset in zip(tokens, offsets, strict=True):
        if not token.startswith("bytes:") and token not in hidden:
            assert text[offset : offset + len(token)] == token


@pytest.mark.parametrize("seed", seeds(200))
async def test_offsets_are_places_in_the_text(seed: int, tokenizer: Tokenizer) -> None:
    rng = random.Random(seed)
    said = random_text(rng, 12)
    ids = tokenizer.encode(said)
    for _ in range(rng.randrange(3)):
        ids.insert(rng.randrange(len(ids)), rng.choice((BOS, EOS)))
    is_shown, prompt = bool(seed % 2), random_text(rng, 4)
    begin = rng.randrange(len(said))
    stop = said[begin : begin + rng.randrange(1, 8)] if seed % 3 == 0 else "never"
    body = {"prompt": tokenizer.encode(prompt) if seed % 4 == 0 else prompt, "echo": seed % 5 < 3}
    more = {"stop": [stop, "the fox never"], "skip_special_tokens": not is_shown, "include_stop_str_in_output": True}
    async with serving(FakeEngine(saying(tokenizer, ids)), model=MODEL, tokenizer=tokenizer) as client:
        text, tokens, offsets = await both(client, **body, **more)
    hidden = frozenset() if is_shown else frozenset(map(tokenizer.token_text, (BOS, EOS)))
    check(text, tokens[:-1], offsets[:-1], hidden)  # a stop string may end inside the last token
    if body["echo"]:
        assert text.startswith(prompt) and offsets[0] == 0


async def test_special_tokens_of_a_prompt_are_echoed_as_they_were_sent(tokenizer: Tokenizer) -> None:
    begin, end = tokenizer.token_text(BOS), tokenizer.token_text(EOS)
    async with serving(FakeEngine(saying(tokenizer, [65])), model=MODEL, tokenizer=tokenizer) as client:
        for prompt in ([BOS, BOS, EOS], f"{begin}{begin}{end}"):
            text, tokens, offsets = await both(client, prompt=prompt, echo=True)
            assert text.startswith(begin * 2 + end) and tokens[:3] == [begin, begin, end]
            assert offsets == [0, len(begin), 2 * len(begin), 2 * len(begin) + len(end)]
            answer = await (await client.post(URL, json={"prompt": prompt, "echo": True})).json()
            assert answer["choices"][0]["text"] == text


async def test_text_that_is_held_back_counts(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("nothing over fox the")
    async with serving(FakeEngine(saying(tokenizer, ids)), model=MODEL, tokenizer=tokenizer) as client:
        text, tokens, offsets = await both(client, prompt="x", stop=["nothing over the"])
        assert text == "nothing over fox the"
        check(text, tokens, offsets, frozenset())
        cut, tokens, offsets = await both(client, prompt="x", stop=["over fox"])
    assert cut == "nothing "
    check(text, tokens, offsets, frozenset())
