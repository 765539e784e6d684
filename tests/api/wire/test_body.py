"""Large bodies mean the same as small ones, and are read on a thread."""

from __future__ import annotations

import threading
from typing import Any

import orjson
import pytest
from api_fakes import CharTokenizer, FakeEngine, error_of, serving

from kunserve.api.wire import body
from kunserve.api.wire.backend import ModelInfo
from kunserve.errors import InvalidRequestError

VALUES = [
    {"a": [1, -1, 0, 2**63, -(2**63), 2**64 - 1], "b": [1.5, 1e300, -0.0], "c": {"d": None, "e": [True, False]}},
    {"big": [2**64, 10**30, -(10**30)], "deep": [[["x"], []]], "text": 'é\n\t"\\ \U0001f600'},
    [1, 2],
    "text",
    {},
]


@pytest.mark.parametrize("value", VALUES)
def test_large_and_small_bodies_are_read_alike(value: Any) -> None:
    text = orjson.dumps(value) if "big" not in value else b'{"big": [18446744073709551616, 1e30], "deep": [[[]]]}'
    large, small = body.parse_large(text), body.parse_small(text)
    assert large == small and repr(large) == repr(small)


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}', b'{"a": "\xff"}', b'{"a": "\\ud800"}'),
        *(b'{"a": "\n"}', b'{"a": 01}', b"[1,]", b'{"a": 1} x', b"[" * 100_000 + b"]" * 100_000),
    ],
)
def test_what_is_no_json(text: bytes) -> None:
    for read in (body.parse_small, body.parse_large):
        with pytest.raises(InvalidRequestError):
            read(text)


@pytest.mark.parametrize("value", [[1], {}])
def test_too_many_lists_and_objects(value: object) -> None:
    body.parse_large(orjson.dumps({"prompt": [value] * body.MAX_LISTS}))
    with pytest.raises(InvalidRequestError, match="lists or objects within lists"):
        body.parse_large(orjson.dumps({"prompt": [value] * (body.MAX_LISTS * 9 // 8)}))


@pytest.mark.parametrize("value", ["", True, None])
def test_too_many_strings_and_the_like(value: object) -> None:
    with pytest.raises(InvalidRequestError, match="strings, truth values and nulls"):
        body.parse_large(orjson.dumps({"prompt": "x", "junk": [value] * (body.MAX_SCALARS * 9 // 8)}))


async def test_a_large_body_is_read_on_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    large = body.parse_large

    def watched(data: bytes) -> object:
        threads.append(threading.current_thread())
        return large(data)

    monkeypatch.setattr(body, "parse_large", watched)
    model = ModelInfo(("tiny",), 10, "/", 0)
    engine = FakeEngine()
    async with serving(engine, model=model, tokenizer=CharTokenizer()) as client:
        ids = [1, 2, 3] * 50_000
        response = await client.post("/v1/completions", json={"prompt": ids, "truncate_prompt_tokens": 4})
        assert response.status == 200
        assert engine.requests[0].prompt_token_ids == [3, 1, 2, 3]
        for bad, param in (({"prompt": [*ids, 128]}, "prompt"), ({"prompt": ids, "n": 0}, "n")):
            response = await client.post("/v1/completions", json={"truncate_prompt_tokens": 4, **bad})
            assert (await error_of(response))["param"] == param
    assert len(threads) == 3 and threading.main_thread() not in threads
