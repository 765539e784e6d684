"""A history with calls, the same in every API: one turn is one message, and nothing in it ends the conversation."""

from __future__ import annotations

from typing import Any

import pytest
from api_fakes import FakeEngine, serving

CHAT, RESPONSES, ANTHROPIC = "/v1/chat/completions", "/v1/responses", "/v1/messages"
LEFT_OUT = "[image: left out, this model reads text only]"


def in_chat(result: Any, arguments: str = "{}") -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "w"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": result},
        ]
    }


def in_responses(result: Any, arguments: str = "{}") -> dict[str, Any]:
    return {
        "input": [
            {"role": "user", "content": "q"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "w"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments},
            {"type": "function_call_output", "call_id": "c", "output": result},
        ]
    }


def in_anthropic(result: Any, arguments: Any = None) -> dict[str, Any]:
    return {
        "max_tokens": 1,
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "w"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": arguments}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": result}]},
        ],
    }


async def prompt_of(url: str, body: dict[str, Any]) -> str:
    engine = FakeEngine()
    async with serving(engine) as client:
        response = await client.post(url, json=body)
        assert response.status == 200, await response.text()
    return bytes(engine.requests[0].prompt_token_ids).decode()


async def test_text_and_calls_of_a_turn_are_one_message_in_every_api() -> None:
    for url, body in ((CHAT, in_chat("r")), (RESPONSES, in_responses("r")), (ANTHROPIC, in_anthropic("r"))):
        assert await prompt_of(url, body) == "[u:q][a:w][t:r]>"


async def test_images_in_results_are_named_in_every_api() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    for url, body in (
        (CHAT, in_chat([{"type": "text", "text": "r"}, {"type": "image_url", "image_url": {"url": "data:"}}])),
        (RESPONSES, in_responses([{"type": "input_text", "text": "r"}, {"type": "input_image", "image_url": "data:"}])),
        (ANTHROPIC, in_anthropic([{"type": "text", "text": "r"}, image])),
    ):
        assert await prompt_of(url, body) == f"[u:q][a:w][t:r\n{LEFT_OUT}]>"


@pytest.mark.parametrize("arguments", ['{"city": "Be', "null", "f(x)", '{"text": "a\nb"}'])
async def test_a_broken_call_does_not_end_the_conversation(arguments: str) -> None:
    bodies = {
        CHAT: in_chat("r", arguments),
        RESPONSES: in_responses("r", arguments),
        ANTHROPIC: in_anthropic("r", arguments),
    }
    for url, body in bodies.items():
        assert await prompt_of(url, body) == "[u:q][a:w][t:r]>"
