"""A request that fails while its neighbours are served: what each of the clients is told."""

from __future__ import annotations

import asyncio

import orjson
from tiny_models import VOCAB_SIZE

from e2e.client import Json, events_of, is_idle, post, session_of, until
from e2e.server_process import ServerProcess
from e2e.tiny import random_prompt

NEIGHBOURS: list[Json] = [
    {"prompt": random_prompt(20), "temperature": 0},
    {"prompt": random_prompt(9), "seed": 2, "n": 3},
    {"prompt": random_prompt(12), "seed": 3, "logprobs": 2, "top_p": 0.9},
    {"prompt": random_prompt(7), "seed": 4, "prompt_logprobs": 1, "presence_penalty": 0.5},
    {"prompt": random_prompt(8), "seed": 5, "guided_regex": "[a-h]{40}"},
]
# Every token ends it, and it must not end yet: nothing is left to choose.
HOPELESS: Json = {"prompt": random_prompt(15), "max_tokens": 9, "min_tokens": 9, "stop_token_ids": [*range(VOCAB_SIZE)]}
MESSAGE = "the largest logit is not finite: cannot sample a token"


async def test_who_fails_is_told_and_nobody_else_notices(tiny_server: ServerProcess) -> None:
    async with session_of(tiny_server) as session:

        async def ask(body: Json) -> object:
            body = {**body, "max_tokens": 60, "ignore_eos": True, "return_token_ids": True}
            return (await post(session, "/v1/completions", body))["choices"]

        async def fail(body: Json) -> None:
            async with session.post("/v1/completions", json=body) as response:
                answer = orjson.loads(await response.read())
                assert (response.status, answer["error"]["message"]) == (500, MESSAGE)

        async def fail_streaming(body: Json) -> None:
            async with session.post("/v1/completions", json={**body, "stream": True}) as response:
                *_, last = [event async for event in events_of(response)]
                assert (last["error"]["code"], last["error"]["message"]) == (500, MESSAGE)

        expected = await asyncio.gather(*map(ask, NEIGHBOURS))
        for _ in range(5):
            asked = asyncio.gather(*map(ask, NEIGHBOURS))
            await asyncio.gather(*[fail(HOPELESS), fail_streaming(HOPELESS), fail({**HOPELESS, "n": 2})] * 2)
            assert await asked == expected
        await until(session, is_idle)
