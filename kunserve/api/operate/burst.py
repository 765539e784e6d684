"""POST /kunserve/burst: a burst of made-up requests, so that anyone with the admin key can see what one does.

They pass through the queue like everybody's and are refused by it like everybody's. Whoever asked waits for the answer;
going away ends the burst.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

from aiohttp import web

from kunserve.api.ask.declared import others as declared
from kunserve.api.ask.declared.check import read
from kunserve.api.operate.admin import check_admin
from kunserve.api.say.generation import submitted
from kunserve.api.wire.body import read_body
from kunserve.api.wire.context import API, REQUEST_ID, Api, json_response
from kunserve.api.wire.fields import wrong_value
from kunserve.engine.request import Request
from kunserve.errors import ConflictError, InvalidRequestError, KunServeError, OverloadedError
from kunserve.sampling import SamplingParams

PROMPT_TOKENS, OUTPUT_TOKENS = 64, 256  # where nothing is said and the model has room
OWNER = "burst"  # of its requests: everybody else has a share of the queue as large


@dataclass(slots=True)
class Burst:
    """What a burst is, and what became of it so far. Lengths in tokens."""

    num_requests: int
    rate: float  # requests per second
    num_prompt_tokens: int
    num_output_tokens: int
    num_completed: int = 0
    num_refused: int = 0
    num_failed: int = 0


@dataclass(slots=True)
class Bursts:
    """The bursts of a server: at most one runs at a time."""

    is_running: bool = False


BURSTS = web.AppKey("bursts", Bursts)


async def start_burst(request: web.Request) -> web.Response:
    """Run `{requests, rate, prompt_tokens, output_tokens}`; answers when the last request has ended."""
    check_admin(request)
    api, bursts = request.app[API], request.app[BURSTS]
    asked = declared.Burst()
    if request.can_read_body:
        asked = await read_body(request, api, lambda values: read(values, declared.Burst))
    burst = _read(asked, api)
    if bursts.is_running:
        raise ConflictError("A burst is under way.", retry_after_s=5)
    bursts.is_running = True
    started_s = time.monotonic()
    try:
        await _run(api, burst, request[REQUEST_ID])
    finally:
        bursts.is_running = False
    return json_response(
        {
            "completed": burst.num_completed,
            "refused": burst.num_refused,
            "failed": burst.num_failed,
            "seconds": round(time.monotonic() - started_s, 3),
        }
    )


def _read(asked: declared.Burst, api: Api) -> Burst:
    room = api.model.max_model_len
    num_prompt_tokens = min(PROMPT_TOKENS, room // 2) if asked.prompt_tokens is None else asked.prompt_tokens
    if num_prompt_tokens >= room:
        wrong_value("prompt_tokens", f"between 1 and {room - 1}", num_prompt_tokens)
    least = room - num_prompt_tokens
    num_output_tokens = min(OUTPUT_TOKENS, least) if asked.output_tokens is None else asked.output_tokens
    burst = Burst(asked.requests, asked.rate, num_prompt_tokens, num_output_tokens)
    if burst.num_output_tokens > least:
        text = f"{num_prompt_tokens} + {burst.num_output_tokens} tokens are more than max_model_len {room}."
        raise InvalidRequestError(text, param="output_tokens")
    return burst


async def _run(api: Api, burst: Burst, burst_id: str) -> None:
    """Send every request at its time; being cancelled ends them all."""
    chance = random.Random(burst_id)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(burst.num_requests):
            prompt = [chance.randrange(api.tokenizer.vocab_size) for _ in range(burst.num_prompt_tokens)]
            params = SamplingParams(burst.num_output_tokens, temperature=0.0, ignore_eos=True)
            request = Request(f"burst-{burst_id}-{next(api.serials)}", prompt, params, owner=OWNER)
            tasks.create_task(_send(api, burst, request))
            await asyncio.sleep(chance.expovariate(burst.rate))


async def _send(api: Api, burst: Burst, request: Request) -> None:
    try:
        async with (
            api.admission.accepted(OWNER, 1, burst.num_prompt_tokens) as reservation,
            submitted(api, reservation, [request]) as outputs,
        ):
            outputs.take_now = lambda came: True
            async for _ in outputs:
                pass
        burst.num_completed += 1
    except OverloadedError:
        burst.num_refused += 1
    except KunServeError:
        burst.num_failed += 1
