"""A prompt of twice the positions that SmolLM2 has: an error that names both numbers, whatever the prompt comes as."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from api_fakes import MODEL, FakeEngine, error_of, serving

from kunserve.model.card import load_card

POSITIONS, NUM_TOKENS = load_card("smollm2-135m").config.max_position_embeddings, 16_384
TEXT = "a" * NUM_TOKENS  # a token each
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": [7] * NUM_TOKENS}),
    ("/v1/completions", {"prompt": TEXT, "max_tokens": 1}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": TEXT}]}),
    ("/v1/responses", {"input": TEXT}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_both_numbers_are_named(path: str, body: dict[str, Any]) -> None:
    engine = FakeEngine()
    async with serving(engine, model=replace(MODEL, max_model_len=POSITIONS)) as client:
        response = await client.post(path, json=body)
        assert response.status == 400
        message = (await error_of(response))["message"]
    positions, tokens = map(int, re.findall(r"\d{4,}", message))
    assert positions == 8192 and NUM_TOKENS <= tokens < NUM_TOKENS + 20, message
    assert not engine.requests
