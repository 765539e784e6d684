"""A server process as its clients see it: the official openai client, and every promise of the answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
import torch
from prompts import PROMPTS
from tiny_models import VOCAB_SIZE, load_reference

from e2e.client import Json, is_idle, metrics_of, post, session_of, state_of, stream_tokens, until
from e2e.memory import pool_bytes, resident_bytes_beside_pools
from e2e.server_process import POLL_S, ServerProcess
from e2e.tiny import TinyModels, random_prompt

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
MIB = 1 << 20


@pytest.fixture
async def client(smollm2_server: ServerProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{smollm2_server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


async def test_the_capital_of_france(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="smollm2-135m", messages=QUESTION, temperature=0)  # type: ignore[arg-type]
    [choice] = answer.choices
    assert choice.message.content == "The capital of France is Paris."
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8  # seven of text and the end
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


async def test_the_capital_of_france_streamed(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(  # type: ignore[call-overload]
        model="smollm2-135m", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "The capital of France is Paris."
    assert len(chunks) > 5, "it came in one piece"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == 8 and not chunks[-1].choices


async def test_content_in_parts_is_the_same_question(client: openai.AsyncOpenAI) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    answer = await client.chat.completions.create(model="smollm2-135m", messages=parts, temperature=0)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "The capital of France is Paris."


async def test_who_does_not_say_gets_what_the_models_authors_recommend(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.create(model="smollm2-135m", input=QUESTION[0]["content"], max_output_tokens=16)
    assert (answer.temperature, answer.top_p) == (0.2, 0.9)
    answer = await client.responses.create(model="smollm2-135m", input="Hi", max_output_tokens=1, temperature=1.5)
    assert (answer.temperature, answer.top_p) == (1.5, 0.9)


async def test_errors_reach_the_client_as_its_own_classes(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        await client.chat.completions.create(model="gpt-4", messages=QUESTION)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        await client.completions.create(model="smollm2-135m", prompt="word " * 3000)
    assert [model.id async for model in client.models.list()] == ["smollm2-135m"]


async def test_text_and_token_ids_are_the_same_prompt(
    smollm2_server: ServerProcess, smollm2_prompts: list[list[int]], smollm2_greedy: list[list[int]]
) -> None:
    body: Json = {"temperature": 0, "max_tokens": 64, "ignore_eos": True, "return_token_ids": True}
    async with session_of(smollm2_server) as session:
        by_text, by_ids, streamed = await asyncio.gather(
            post(session, "/v1/completions", {**body, "prompt": PROMPTS[:4]}),
            post(session, "/v1/completions", {**body, "prompt": smollm2_prompts[:4]}),
            stream_tokens(session, {**body, "prompt": PROMPTS[4]}),
        )
        for answer in (by_text, by_ids):
            assert [choice["token_ids"] for choice in answer["choices"]] == smollm2_greedy[:4]
            assert [choice["prompt_token_ids"] for choice in answer["choices"]] == smollm2_prompts[:4]
            assert answer["usage"]["prompt_tokens"] == sum(map(len, smollm2_prompts[:4]))
            assert answer["usage"]["completion_tokens"] == 4 * 64
        assert [c["text"] for c in by_text["choices"]] == [c["text"] for c in by_ids["choices"]]
        assert streamed == smollm2_greedy[4]
        text = await post(session, "/detokenize", {"tokens": smollm2_greedy[0]})
        assert text["prompt"] == by_text["choices"][0]["text"]
        tokens = await post(session, "/tokenize", {"prompt": PROMPTS[0]})
        assert tokens["tokens"] == smollm2_prompts[0] and tokens["count"] == len(smollm2_prompts[0])


async def test_stop_strings_cut_the_text_before_them(smollm2_server: ServerProcess) -> None:
    body: Json = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": 64}
    async with session_of(smollm2_server) as session:
        whole = (await post(session, "/v1/completions", body))["choices"][0]["text"]
        stop = whole[20:26]
        [choice] = (await post(session, "/v1/completions", {**body, "stop": ["not to be found", stop]}))["choices"]
        assert choice["text"] == whole[: whole.index(stop)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        more = {"stop": stop, "include_stop_str_in_output": True}
        [choice] = (await post(session, "/v1/completions", {**body, **more}))["choices"]
        assert choice["text"] == whole[: whole.index(stop)] + stop


async def test_the_budget_holds_and_little_else_takes_memory(
    smollm2_server: ServerProcess, smollm2_prompts: list[list[int]]
) -> None:
    """Pools are the devices' memfds: as large as the budget, whatever runs; the rest of the process is small."""
    body: Json = {"temperature": 0, "max_tokens": 32, "ignore_eos": True, "logprobs": 5}
    async with session_of(smollm2_server) as session:
        running = asyncio.create_task(post(session, "/v1/completions", {**body, "prompt": smollm2_prompts}))
        seen = []
        while not running.done():
            seen.append(await state_of(session))
            assert pool_bytes(smollm2_server.pid) == [730 * MIB] * 2
            await asyncio.sleep(POLL_S)
        await running
        assert any(not is_idle(state) for state in seen)
        for device in (device for state in seen for device in state["devices"]):
            chunks = device["chunks"]
            assert chunks["budget"] * device["chunk_bytes"] == 730 * MIB
            assert chunks["weights"] + chunks["kv"] + chunks["free"] == chunks["budget"]
            assert min(chunks.values()) >= 0
    assert resident_bytes_beside_pools(smollm2_server.pid) < 400 * MIB


# --- what does not need a model that makes sense -------------------------------------------------------------------


async def test_logprobs_are_the_models(tiny_server: ServerProcess, tiny_models: TinyModels) -> None:
    more: Json = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
    async with session_of(tiny_server) as session:
        asked = {**more, "messages": [{"role": "user", "content": "fox"}], "logprobs": True, "top_logprobs": 4}
        chat = await post(session, "/v1/chat/completions", asked)
        prompt, ids = chat["prompt_token_ids"], chat["choices"][0]["token_ids"]
        [choice] = (await post(session, "/v1/completions", {**more, "prompt": prompt, "logprobs": 4}))["choices"]
    model = load_reference(tiny_models.folder("llama", max_position_embeddings=2048))
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = logprobs.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()
    content = chat["choices"][0]["logprobs"]["content"]
    assert [token["logprob"] for token in content] == pytest.approx(expected, abs=1e-3)
    for token, row in zip(content, logprobs, strict=True):
        top = [other["logprob"] for other in token["top_logprobs"]]
        assert top == pytest.approx(row.topk(4).values.tolist(), abs=1e-3)
    assert choice["token_ids"] == ids
    assert choice["logprobs"]["token_logprobs"] == [token["logprob"] for token in content]
    for name, token in zip(choice["logprobs"]["tokens"], content, strict=True):
        is_half = "\ufffd" in token["token"]
        written = "bytes:" + "".join(f"\\x{byte:02x}" for byte in token["bytes"])
        assert name == (written if is_half else token["token"])
    assert len(choice["logprobs"]["text_offset"]) == len(choice["logprobs"]["top_logprobs"]) == 12


async def test_choices_are_reproducible_and_apart(tiny_server: ServerProcess) -> None:
    body: Json = {"prompt": random_prompt(8), "max_tokens": 20, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    async with session_of(tiny_server) as session:
        answers = [await post(session, "/v1/completions", {**body, "n": 4, "return_token_ids": True}) for _ in range(2)]
        first, second = ([choice["token_ids"] for choice in answer["choices"]] for answer in answers)
        assert first == second and len(set(map(tuple, first))) == 4
        assert [choice["index"] for choice in answers[0]["choices"]] == [0, 1, 2, 3]
        details = {"prompt_tokens_details": {"cached_tokens": 0}}
        assert answers[0]["usage"] == {"prompt_tokens": 8, "completion_tokens": 80, "total_tokens": 88, **details}
        assert await stream_tokens(session, body) == first[0]


async def test_metrics_and_state_say_the_same(tiny_server: ServerProcess) -> None:
    async with session_of(tiny_server) as session:
        await until(session, is_idle)
        before = await metrics_of(session)
        for i in range(5):
            body = {"prompt": random_prompt(10 + i), "max_tokens": 7, "ignore_eos": True}
            await post(session, "/v1/completions", body)
        state = await until(session, is_idle)
        success = "vllm:request_success_total/length"
        while (after := await metrics_of(session))[success] < before[success] + 5:  # counters may be 0.25 s old
            await asyncio.sleep(POLL_S)
        assert after[success] == before[success] + 5
        grown = {name: after[f"vllm:{name}_total"] - before[f"vllm:{name}_total"] for name in TOKENS}
        assert grown == {"prompt_tokens": 10 + 11 + 12 + 13 + 14, "generation_tokens": 35}
        assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
        assert after["vllm:kv_cache_usage_perc"] == 0
        total = sum(group["blocks"]["total"] for group in state["groups"])
        assert after[f"vllm:cache_config_info/16/{total}"] == 1
        for device in state["devices"]:
            for owner in ("weights", "kv", "free"):
                name = f"kunserve:device_memory_bytes/{device['name']}/{owner}"
                assert after[name] == device["chunks"][owner] * device["chunk_bytes"]


TOKENS = ("prompt_tokens", "generation_tokens")


async def test_the_whole_vocabulary_can_be_asked_for(tiny_server: ServerProcess) -> None:
    async with session_of(tiny_server) as session:
        prompt = list(range(VOCAB_SIZE))
        answer = await post(session, "/v1/completions", {"prompt": prompt, "max_tokens": 1, "echo": True})
        assert answer["usage"]["prompt_tokens"] == VOCAB_SIZE
