"""Formats of tool calls and reasoning behind the APIs: what the engine is asked for, and what is told."""

from __future__ import annotations

from typing import Any

import pytest
from api_fakes import FakeEngine, events_of, say, serving
from structures import VOCABULARY

from kunserve.api.wire.backend import ApiSettings
from kunserve.api.wire.grammars import Grammars
from kunserve.sampling import FinishReason

URL = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
DAYS = {"type": "object", "properties": {"days": {"type": "integer"}}, "required": ["days"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": DAYS}}
THOUGHT = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
CALL = f'{THOUGHT}<|channel|>commentary to=functions.f <|constrain|>json<|message|>{{"days": 5}}'
FINAL = f"{THOUGHT}<|channel|>final<|message|>yes"
HARMONY = ApiSettings(tool_call_parser="openai", reasoning_parser="openai_gptoss")


async def ask(settings: ApiSettings, text: str, **more: Any) -> tuple[dict[str, Any], FakeEngine]:
    """The answer's choice, of which a stream tells the same."""
    engine = FakeEngine(lambda _: say(text, FinishReason.STOP))
    async with serving(engine, settings, grammars=Grammars(VOCABULARY)) as client:
        answer = await (await client.post(URL, json={"messages": HI, **more})).json()
        events = await events_of(await client.post(URL, json={"messages": HI, **more, "stream": True}))
    choice: dict[str, Any] = answer["choices"][0]
    deltas = [event["choices"][0]["delta"] for event in events]
    message = choice["message"]
    assert "".join(delta.get("content") or "" for delta in deltas) == (message["content"] or "")
    assert "".join(delta.get("reasoning") or "" for delta in deltas) == message.get("reasoning", "")
    told = [call["function"] for call in message.get("tool_calls", [])]
    written = "".join(c["function"]["arguments"] for delta in deltas for c in delta.get("tool_calls", []))
    assert written == "".join(function["arguments"] for function in told)
    return choice, engine


async def test_channels_of_harmony() -> None:
    choice, engine = await ask(HARMONY, CALL, tools=[TOOL])
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["reasoning"], message["content"]) == ("hm", None)
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"days": 5}'}
    assert not engine.requests[0].params.skip_special_tokens
    choice, engine = await ask(HARMONY, FINAL)
    assert (choice["message"]["reasoning"], choice["message"]["content"]) == ("hm", "yes")
    assert not engine.requests[0].params.skip_special_tokens


async def test_what_a_grammar_forces_is_read_whatever_the_model_writes_itself() -> None:
    forced = '[{"name": "f", "parameters": {"days": 5}}]'
    for parser in ("openai", "qwen3_coder", "glm45", "kimi_k2", "deepseek_v31", "granite", "mistral"):
        settings = ApiSettings(
            tool_call_parser=parser, reasoning_parser="openai_gptoss" if parser == "openai" else None
        )
        for text, choice in ((forced, "required"), ('{"days": 5}', {"type": "function", "function": {"name": "f"}})):
            answer, _ = await ask(settings, text, tools=[TOOL], tool_choice=choice)
            [call] = answer["message"]["tool_calls"]
            assert call["function"] == {"name": "f", "arguments": '{"days": 5}'}
            assert len(call["id"]) == (9 if parser == "mistral" else len("call_") + 24)


async def test_structures_of_a_model_that_writes_harmony_are_text() -> None:
    choice, _ = await ask(HARMONY, '{"days": 5}', response_format={"type": "json_object"})
    assert choice["message"]["content"] == '{"days": 5}' and "reasoning" not in choice["message"]


async def test_arguments_as_text_get_the_types_of_the_request() -> None:
    text = "<tool_call>\n<function=f>\n<parameter=days>\n5\n</parameter>\n</function>\n</tool_call>"
    choice, _ = await ask(ApiSettings(tool_call_parser="qwen3_coder"), text, tools=[TOOL])
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"days": 5}'


@pytest.mark.parametrize(
    ("parser", "reasoning", "is_shown"),
    [
        *[(name, None, True) for name in ("kimi_k2", "glm45", "deepseek_v3", "granite")],
        ("qwen3_coder", None, False),
        ("hermes", "qwen3", False),
        ("hermes", "kimi_k2", True),
    ],
)
async def test_special_tokens_are_shown_where_they_are_marks(
    parser: str, reasoning: str | None, is_shown: bool
) -> None:
    settings = ApiSettings(tool_call_parser=parser, reasoning_parser=reasoning)
    _, engine = await ask(settings, "x", tools=[TOOL])
    assert engine.requests[0].params.skip_special_tokens is not is_shown
