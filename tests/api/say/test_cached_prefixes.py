"""Who may find whose cached prefix, and what clients are told of it."""

from __future__ import annotations

import json

import pytest
from api_fakes import FakeEngine, say, serving

from kunserve.api.wire.backend import ApiSettings
from kunserve.engine.request import Output, Request

MESSAGES = [{"role": "user", "content": "x"}]
BODIES = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4},
}


async def salts(settings: ApiSettings, *asked: tuple[str, str]) -> list[str]:
    """Of requests by (key, cache_salt)."""
    engine = FakeEngine()
    async with serving(engine, settings) as client:
        for key, salt in asked:
            body = {"prompt": "x", **({"cache_salt": salt} if salt else {})}
            response = await client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
            assert response.status == 200
    return [request.cache_salt for request in engine.requests]


@pytest.mark.parametrize("path", BODIES)
async def test_keys_find_their_own_prefixes_only(path: str) -> None:
    engine = FakeEngine()
    async with serving(engine, ApiSettings(api_keys=("a", "b"))) as client:
        for key in ("a", "b", "a"):
            response = await client.post(path, json=BODIES[path], headers={"Authorization": f"Bearer {key}"})
            assert response.status == 200
    first, second, again = (request.cache_salt for request in engine.requests)
    assert first == again != second


async def test_one_key_or_a_flag_shares_them() -> None:
    one, two = await salts(ApiSettings(api_keys=("a",)), ("a", ""), ("a", ""))
    assert one == two
    one, two = await salts(ApiSettings(api_keys=("a", "b"), shares_prefixes=True), ("a", ""), ("b", ""))
    assert one == two


async def test_a_salt_of_the_client_s_keeps_prefixes_apart_within_its_key() -> None:
    plain, salted, other, others = await salts(
        ApiSettings(api_keys=("a", "b")), ("a", ""), ("a", "s"), ("a", "t"), ("b", "s")
    )
    assert len({plain, salted, other, others}) == 4


async def test_a_salt_is_a_text_of_bounded_length() -> None:
    async with serving(FakeEngine()) as client:
        for salt in (3, "x" * 10_000):
            response = await client.post("/v1/completions", json={"prompt": "x", "cache_salt": salt})
            assert response.status == 400 and "cache_salt" in await response.text()


@pytest.mark.parametrize("path", BODIES)
async def test_usage_says_how_much_of_the_prompt_was_cached(path: str) -> None:
    def script(request: Request) -> list[Output]:
        request.num_cached_tokens = 1  # as the engine does when it admits it
        return say("ok")

    engine = FakeEngine(script)
    async with serving(engine) as client:
        told = json.loads(await (await client.post(path, json=BODIES[path])).text())["usage"]
    if path == "/v1/messages":
        assert told["cache_read_input_tokens"] == 1
        assert told["input_tokens"] == engine.requests[-1].num_prompt_tokens - 1
    elif path == "/v1/responses":
        assert told["input_tokens_details"] == {"cached_tokens": 1}
    else:
        assert told["prompt_tokens_details"] == {"cached_tokens": 1}
