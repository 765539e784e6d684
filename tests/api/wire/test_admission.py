from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from api_fakes import STATS, CharTokenizer, FakeEngine, PlainServer, error_of, make_app, serving

from kunserve.api.wire.admission import Admission, estimated_tokens
from kunserve.api.wire.backend import ApiSettings
from kunserve.api.wire.context import API
from kunserve.api.wire.turns import Turns
from kunserve.engine.schedule.waiting import Waiting
from kunserve.errors import InvalidRequestError, OverloadedError
from kunserve.observe.metrics import Metrics

KEYS = ("key of a", "key of b")


def admission(
    queued: Waiting | None = None, max_reqs: int = 4, max_tokens: int = 100, api_keys: tuple[str, ...] = ()
) -> tuple[Admission, Metrics]:
    """A door before a queue that holds `queued`, all of it owned by "a"."""
    metrics = Metrics("tiny", 64, lambda: STATS)
    settings = ApiSettings(max_num_queued_reqs=max_reqs, max_num_queued_tokens=max_tokens, api_keys=api_keys)

    def waiting(owner: str | None = None) -> Waiting:
        return queued if queued is not None and owner in (None, "a") else Waiting()

    return Admission(waiting, metrics, settings), metrics


async def test_what_is_accepted_counts_until_the_engine_has_it() -> None:
    door, metrics = admission()
    async with door.accepted("a", 3, 10), door.accepted("b", 1, 10):
        with pytest.raises(OverloadedError, match="4 requests are waiting") as caught:
            await door.check()
        assert caught.value.retry_after_s == 1
    await door.check("a", 4)
    assert b'vllm:admission_rejections_total{engine="0",model_name="tiny",reason="queue_full"} 1.0' in metrics.render()


async def test_what_waits_in_the_engine_counts() -> None:
    door, _ = admission(Waiting(3, 90))
    await door.check("a", 1, 10)
    with pytest.raises(OverloadedError, match="tokens are waiting"):
        await door.check("a", 1, 11)
    with pytest.raises(OverloadedError):
        await door.check("a", 2, 1)


async def test_a_flood_from_one_key_leaves_places_for_others() -> None:
    door, metrics = admission(Waiting(8, 8), max_reqs=12, api_keys=KEYS)
    async with door.accepted("a", 1, 1):  # three quarters
        with pytest.raises(OverloadedError, match="9 requests of this key are waiting"):
            await door.check("a")
        await door.check("b", 3)
        with pytest.raises(OverloadedError, match="The queue is full"):
            await door.check("b", 4)
    assert b'reason="key_share"} 1.0' in metrics.render()


async def test_a_flood_of_tokens_from_one_key_leaves_room_for_others() -> None:
    door, _ = admission(Waiting(1, 70), api_keys=KEYS)
    with pytest.raises(OverloadedError, match="of this key"):
        await door.check("a", 1, 20)
    await door.check("b", 1, 20)


async def test_the_only_key_may_fill_the_queue() -> None:
    for keys, is_refused in ((KEYS, True), (KEYS[:1], False)):
        door, _ = admission(Waiting(3, 3), api_keys=keys)
        with pytest.raises(OverloadedError, match="of this key") if is_refused else nullcontext():
            await door.check("a")


async def test_an_empty_queue_takes_any_one_prompt() -> None:
    door, _ = admission()
    async with door.accepted("a", 1, 1000):
        with pytest.raises(OverloadedError):
            await door.check("a", 1, 1)


async def test_more_than_the_queue_ever_holds_can_never_succeed() -> None:
    door, _ = admission()
    with pytest.raises(InvalidRequestError) as caught:
        await door.check("a", 5)
    assert caught.value.param == "n"


async def test_a_failure_gives_the_place_back() -> None:
    door, _ = admission()
    for _ in range(9):
        with pytest.raises(ValueError):
            async with door.accepted("a", 4, 4):
                raise ValueError
    await door.check("a", 4)


def test_estimates() -> None:
    assert estimated_tokens([1, 2, 3]) == 3
    assert estimated_tokens("x" * 400) == 101
    assert estimated_tokens("") == 1


class StuckTurns(Turns):
    """Whose turn it is waits until `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked, self.go = asyncio.Event(), asyncio.Event()

    async def take(self) -> None:
        self.is_asked.set()
        await self.go.wait()


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}),
        ("/v1/responses", {"input": "x"}),
    ],
)
async def test_a_refusal_waits_for_no_body_that_is_to_be_parsed(url: str, body: dict[str, Any]) -> None:
    turns, app = StuckTurns(), make_app(FakeEngine(), ApiSettings(max_num_queued_reqs=STATS.num_waiting + 1))
    app[API] = replace(app[API], turns=turns)
    async with TestClient(PlainServer(app)) as client:
        first = asyncio.create_task(client.post(url, json=body))
        await turns.is_asked.wait()
        async with asyncio.timeout(30):  # it is answered although the first still waits for its turn
            assert (await client.post(url, json=body)).status in (503, 529)
        turns.go.set()
        assert (await first).status == 200
        assert (await client.post(url, json=body)).status == 200


class StuckTokenizer(CharTokenizer):
    """Long text takes until `go`."""

    def __init__(self) -> None:
        self.began, self.go = threading.Event(), threading.Event()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) > 10:
            self.began.set()
            assert self.go.wait(60)
        return super().encode(text[:4], add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return ""


@pytest.mark.parametrize(
    ("url", "long", "short"),
    [
        ("/v1/completions", {"prompt": "x" * 9000}, {"prompt": "x"}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x" * 9000}]},
            {"messages": [{"role": "user", "content": "x"}]},
        ),
    ],
)
async def test_prompts_that_are_being_tokenized_count(url: str, long: Any, short: Any) -> None:
    import asyncio

    tokenizer, engine = StuckTokenizer(), FakeEngine()
    settings = ApiSettings(max_num_queued_reqs=STATS.num_waiting + 1)
    async with serving(engine, settings, tokenizer=tokenizer) as client:
        first = asyncio.ensure_future(client.post(url, json=long))
        assert await asyncio.to_thread(tokenizer.began.wait, 60)
        refused = await client.post(url, json=short)
        assert (await error_of(refused))["code"] == 503
        assert refused.headers["Retry-After"] == "1"
        assert engine.requests == []
        tokenizer.go.set()
        assert (await first).status == 200
        assert (await client.post(url, json=short)).status == 200
