from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from api_fakes import BOS, MODEL, FakeEngine, error_of, serving

from kunserve.api.ask import prompts
from kunserve.api.wire.fields import PIECE


async def test_models() -> None:
    async with serving(FakeEngine()) as client:
        answer = await (await client.get("/v1/models")).json()
        card = {
            "id": "tiny",
            "object": "model",
            "created": 1234,
            "owned_by": "kunserve",
            "root": "/models/tiny",
            "parent": None,
            "max_model_len": 64,
            "permission": [],
        }
        assert answer == {"object": "list", "data": [card, {**card, "id": "org/tiny"}]}
        assert await (await client.get("/v1/models/org/tiny")).json() == {**card, "id": "org/tiny"}
        assert (await error_of(await client.get("/v1/models/other")))["code"] == 404


async def test_texts_that_are_not_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_TEXT_CHARS", 600)
    chat = {"messages": [{"role": "user", "content": "x" * 601}], "truncate_prompt_tokens": 4}
    async with serving(FakeEngine()) as client:
        assert (await client.post("/tokenize", json={"prompt": "x" * 600})).status == 200
        for body, param in (({"prompt": "x" * 601}, "prompt"), (chat, "messages")):
            error = await error_of(await client.post("/tokenize", json=body))
            assert error["param"] == param and "at most 600" in error["message"]


async def test_tokenize_and_back() -> None:
    async with serving(FakeEngine()) as client:
        answer = await (await client.post("/tokenize", json={"prompt": "hi", "model": "tiny"})).json()
        assert answer == {"count": 3, "max_model_len": 64, "tokens": [BOS, 104, 105], "token_strs": None}
        body: dict[str, Any] = {"prompt": "hi", "add_special_tokens": False, "return_token_strs": True}
        answer = await (await client.post("/tokenize", json=body)).json()
        assert (answer["tokens"], answer["token_strs"]) == ([104, 105], ["h", "i"])
        body = {"messages": [{"role": "user", "content": "hi"}]}
        answer = await (await client.post("/tokenize", json=body)).json()
        assert bytes(answer["tokens"]) == b"[u:hi]>"
        answer = await (await client.post("/detokenize", json={"tokens": [104, 105]})).json()
        assert answer == {"prompt": "hi"}


async def test_long_lists_of_tokens_are_whole() -> None:
    """They are written in pieces."""
    num = 2 * PIECE + 1
    text = ('he"\\\n ' * num)[:num]
    async with serving(FakeEngine()) as client:
        body = {"prompt": text, "add_special_tokens": False, "return_token_strs": True}
        answer = await (await client.post("/tokenize", json=body)).json()
        assert (answer["count"], answer["tokens"], answer["token_strs"]) == (num, list(map(ord, text)), list(text))
        answer = await (await client.post("/detokenize", json={"tokens": answer["tokens"]})).json()
        assert answer == {"prompt": text}
        answer = await (await client.post("/detokenize", json={"tokens": []})).json()
        assert answer == {"prompt": ""}


@pytest.mark.parametrize(
    ("url", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": ["hi"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "hi", "model": "other"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "hi"}, 400, "tokens"),
        ("/detokenize", {"tokens": [128]}, 400, "tokens"),
    ],
)
async def test_bad_tokens(url: str, body: dict[str, Any], status: int, param: str) -> None:
    async with serving(FakeEngine()) as client:
        error = await error_of(await client.post(url, json=body))
        assert (error["code"], error["param"]) == (status, param)


async def test_health_is_the_engines_progress() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        for url in ("/health", "/ping", "/ready"):
            assert (await client.get(url)).status == 200
        engine.illness = "no step for 60 s"
        for url in ("/health", "/ping", "/ready"):
            response = await client.get(url)
            assert (await error_of(response))["message"] == "no step for 60 s"
            assert (response.status, response.headers["Retry-After"]) == (503, "1")


async def test_a_server_that_lost_a_device_is_healthy_but_says_so() -> None:
    engine = FakeEngine()
    engine.infirmity = "cpu:1 is lost"
    async with serving(engine) as client:
        for url in ("/health", "/ping", "/ready"):
            response = await client.get(url)
            assert (response.status, await response.json()) == (200, {"status": "degraded", "reason": "cpu:1 is lost"})
        engine.illness = "no step for 60 s"
        assert [(await client.get(url)).status for url in ("/health", "/ping", "/ready")] == [503] * 3
        engine.illness = engine.infirmity = None
        assert await (await client.get("/health")).json() == {"status": "ok"}


async def test_a_stopping_server_is_healthy_but_not_ready() -> None:
    engine = FakeEngine()
    engine.is_ready = False
    async with serving(engine) as client:
        assert (await client.get("/health")).status == 200
        assert (await client.get("/ready")).status == 503


async def test_metrics_state_version() -> None:
    async with serving(FakeEngine()) as client:
        response = await client.get("/metrics")
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        assert 'vllm:num_requests_waiting{engine="0",model_name="tiny"} 3.0' in await response.text()
        assert (await client.head("/metrics")).status == 200
        assert (await (await client.get("/kunserve/state")).json())["epoch"] == 0
        assert set(await (await client.get("/version")).json()) == {"version"}


async def test_what_clients_ask_of_the_tokenizer() -> None:
    model = replace(MODEL, tokenizer={"eos_token": "<e>", "chat_template": "{{ x }}"})
    async with serving(FakeEngine(), model=model) as client:
        info = await (await client.get("/tokenizer_info")).json()
    assert (info["eos_token"], info["chat_template"], info["vocab_size"]) == ("<e>", "{{ x }}", 128)
    assert info["model_max_length"] == 64 and info["tokenizer_class"]
    async with serving(FakeEngine()) as client:
        assert (await client.get("/tokenizer_info")).status == 404


async def test_the_load_is_all_requests() -> None:
    async with serving(FakeEngine()) as client:
        assert await (await client.get("/load")).json() == {"server_load": 5}
