"""Conversations to prompts: where a continued message ends."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api_fakes import FakeEngine, error_of, serving
from tiny_models import CHAT_TEMPLATE, save_tiny_tokenizer

from kunserve.api.ask.chat_template import ChatTemplate
from kunserve.api.wire.backend import ApiSettings, ModelInfo
from kunserve.engine.text.tokenizer import Tokenizer

URL = "/v1/chat/completions"
MODEL = ModelInfo(served_names=("tiny",), max_model_len=1 << 20, root="/", created=1)
HI: dict[str, Any] = {"role": "user", "content": "| end assistant <|start|>"}
# As Llama 3's: it cuts blanks off.
TRIMMING = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# What templates write around a message, and what usual beginnings of answers are made of.
PIECES = (
    "|",
    "<",
    ">",
    "<|end|",
    "end",
    "\n",
    " ",
    "\t",
    "a",
    "```json\n",
    "{",
    "é",
    "😀",
    "assistant",
    "界",
    "</",
    "-",
)


def beginnings(num: int, rng: random.Random) -> list[str]:
    return ["", *PIECES, *("".join(rng.choices(PIECES, k=rng.randrange(1, 8))) for _ in range(num))]


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, TRIMMING])
async def test_the_prompt_ends_exactly_where_the_final_message_does(source: str, tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    tokenizer, template, engine = Tokenizer(tmp_path), ChatTemplate(source, {"bos_token": ""}), FakeEngine()
    opened = template.render([HI])
    async with serving(engine, model=MODEL, tokenizer=tokenizer, template=template) as client:
        for text in beginnings(200, random.Random(1)):
            messages = [HI, {"role": "assistant", "content": text}]
            response = await client.post(URL, json={"messages": messages, "continue_final_message": True})
            assert response.status == 200, await response.text()
            prompt = tokenizer.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
            assert prompt == opened + (text if source == CHAT_TEMPLATE else text.lstrip())


async def test_a_text_with_a_token_that_the_model_has_no_row_for_is_refused() -> None:
    """Tokenizers may know more tokens than models: "z" is the last of 122, "{" one beyond."""
    engine, model = FakeEngine(), replace(MODEL, vocab_size=ord("z") + 1)
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "{"}]}
    async with serving(engine, model=model) as client:
        asked: list[tuple[str, dict[str, Any], str]] = [
            ("/v1/completions", {"prompt": "x {"}, "prompt"),
            ("/v1/completions", {"prompt": ["x z", "x {"]}, "prompt"),
            ("/v1/completions", {"prompt": [120, 123]}, "prompt"),
            (URL, chat, "messages"),
        ]
        for url, body, param in asked:
            response = await client.post(url, json=body)
            assert response.status == 400
            error = await error_of(response)
            assert error["param"] == param and "token id 123, out of the vocabulary of 123" in error["message"]
        assert not engine.requests
        response = await client.post("/v1/completions", json={"prompt": "x z", "bad_words": ["a", "a{"]})
        assert response.status == 200, await response.text()
    assert set(engine.requests[-1].params.bad_words) == {(97,), (32, 97)}


async def test_a_final_message_that_calls_tools_does_not_go_on() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [HI, {"role": "assistant", "content": "x", "tool_calls": [call]}]
    async with serving(FakeEngine()) as client:
        error = await error_of(await client.post(URL, json={"messages": messages, "continue_final_message": True}))
    assert error["param"] == "continue_final_message" and "tool calls" in error["message"]


@pytest.mark.parametrize("parser", ["qwen3", "deepseek_r1"])
@pytest.mark.parametrize(
    ("begun", "content", "reasoning"),
    [("The answer is ", "ok", None), ("<think>a</think>b", "ok", None), ("<think>a", "", "ok")],
)
async def test_what_continues_an_answer_is_no_reasoning(
    parser: str, begun: str, content: str, reasoning: str | None
) -> None:
    body = {"messages": [HI, {"role": "assistant", "content": begun}], "continue_final_message": True}
    async with serving(FakeEngine(), ApiSettings(reasoning_parser=parser), MODEL) as client:
        answer = await (await client.post(URL, json=body)).json()
    message = answer["choices"][0]["message"]
    assert (message["content"], message.get("reasoning")) == (content, reasoning)
